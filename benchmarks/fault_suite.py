"""What breaks under a server, played and counted: no wrong adapter, no lost turn, no needless error, no leak.

    python benchmarks/fault_suite.py [--only NAME]… [--quick] [--json FILE] [--resume] [--write DOCUMENT]

Ends with 1 if a figure that must be zero is not. Parts that were played are kept in the JSON; --only plays some
anew, --resume those that it lacks. Needs the tiny models (`soma models make-tiny`). Linux, loopback only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))  # the fakes and servers that the tests use

from faults.matrix import FAULTS  # noqa: E402 - needs the path
from faults.report import Kept, markdown, rows_of, show  # noqa: E402
from faults.suite import play  # noqa: E402
from marked import replace_marked  # noqa: E402
from study.meter import machine  # noqa: E402


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", action="append", choices=names, help="this kind of fault; repeatable")
    parser.add_argument("--quick", action="store_true", help="fewer requests and sessions")
    parser.add_argument("--json", type=Path, help="keep every part here, beside those of earlier runs")
    parser.add_argument("--resume", action="store_true", help="play the parts alone that --json lacks")
    parser.add_argument("--write", type=Path, help="document whose table to replace by that of --json")
    parser.add_argument("--report", action="store_true", help="play nothing; show and --write what --json has")
    options = parser.parse_args(arguments)
    if (options.resume or options.report or options.write) and options.json is None:
        parser.error("--resume, --report and --write need --json")
    return options


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    options, console = parsed(arguments), Console(soft_wrap=True)
    kept = Kept(options.json, machine())
    wanted = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    if options.resume:
        wanted = [fault for fault in wanted if fault.name not in kept.document["parts"]]
    command = "make faults" + (" --quick" if options.quick else "")
    for fault, rows in play([] if options.report else wanted, quick=options.quick):
        kept.add(fault.name, rows, command)
        show(rows, console)
    rows = rows_of(kept.document)
    if options.report:
        show(rows, console)
    if options.write is not None:
        replace_marked(options.write, "faults", markdown(json.loads(options.json.read_text())))
    failed = [row.name for row in rows if not row.fine]
    console.print(f"{len(rows)} rows, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
