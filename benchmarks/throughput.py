"""Latency, cost, task accuracy and fidelity of serving policies, side by side on soma-serve.

What is compared. An arm is a policy (`soma`, `original`, `surrogate`, …) with the cores and settings that
study/arms.py gives it; every arm may use all cores, and `original_one_core` shows what the second one is worth.
Users arrive in an open loop: sessions begin at exponential intervals whatever the server does, and within a
session the next turn follows an answer after an exponential think time. Dialogues come from workloads, whose
answers have a programmatic truth (docs/workloads.md), or from a file, or are made up where only lengths matter.

Why it is fair.
* Arms take turns in blocks: in each repeat every arm has a server to itself for the same dialogues, arrivals
  and think times, in an order drawn anew from the seed; arms with the same settings share a server. A block
  ends when nothing of it runs in the background any more, so that training and audits are paid by the arm that
  caused them; then its sessions are removed.
* The sessions that thresholds were chosen on are never those that are told: tuning, development and test parts
  are separate, and the test part is played only with the thresholds that were frozen for it (--freeze).
* Every session is a tenant of its own: no prefix cache is shared between sessions, repeats or arms.
* A warm-up is played first and not counted. A run in which a planned turn is missing fails.
* Costs are seconds times prices. An engine's seconds are those in which it had a request running, users' or
  background's, times its cores, because that long they were taken; the trainers' and soma-serve's own are
  processor seconds. They hold everything an arm caused: users' turns, held-out answers, training, audits.
  Ray's housekeeping is reported and not priced. --seconds cpu counts processor seconds of engines instead.
* Latencies are the client's, over HTTP. `dispatch_overhead_ms` compares the same prompts, one at a time in
  random order, between soma-serve and a vLLM server started alike without the plugin.
* Fidelity is 1 - mean gap to what the arm `original` answered to the same later turn, each arm going on from
  its own answers; the original played again gives the floor of that measure. Task accuracy asks no model.
* Ratios are of means, with intervals by a bootstrap over dialogues (study/outcome.py). Capacity is the rate of
  arrivals at which nine turns of ten are within the target (study/capacity.py).

Every block is kept under --keep and a run goes on where it ended.

    python benchmarks/throughput.py --workloads benchmarks/workloads --quick [--json FILE] [--out DIR]
    python benchmarks/throughput.py --workloads benchmarks/workloads --config A --config B   # the test part
    python benchmarks/throughput.py --dialogues FILE [--json FILE] [--out DIR]
    python benchmarks/throughput.py --report FILE [--out DIR]       # an earlier run's tables and figures
    python benchmarks/throughput.py --workloads DIR --freeze        # before a test part is played
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from study import figures, table
from study.planned import Study
from study.prepare import pairs, prepared
from study.report import IncompleteRun
from study.run import run
from study.server import Say
from study.workloads import PARTS, freeze, load_workloads

from soma_vllm.config import load_config
from soma_vllm.errors import ConfigError, SomaError
from soma_vllm.tools.command_line import write_json
from soma_vllm.versions import versions

HERE = Path(__file__).parent
DEMO = HERE.parent / "dialogues" / "demo.json"
FULL = {
    "arms": ("original", "surrogate", "soma", "history_prefix", "history_ft"),
    "repeats": 3, "sessions": 9, "limit_turns": None, "max_tokens": 32, "arrival": 8.0, "think": 3.0,
    "overhead_rounds": 60, "capacity": 0, "drift": 0,
}  # fmt: skip
WORKLOADS = {
    "arms": (
        "original", "original_one_core", "surrogate", "switch_all", "random", "history_prefix", "history_ft",
        "soma", "soma_paper", "speculative",
    ),
    "repeats": 1, "max_tokens": 64, "capacity": 4, "drift": 9,
}  # fmt: skip
QUICK = {
    "arms": ("original", "surrogate", "soma"),
    "repeats": 1, "sessions": 4, "limit_turns": 10, "max_tokens": 16, "arrival": 4.0, "think": 1.0,
    "overhead_rounds": 20, "capacity": 0, "drift": 0,
}  # fmt: skip
QUICK_WORKLOADS = {
    "repeats": 1, "sessions": 3, "limit_turns": 8, "max_tokens": 48, "overhead_rounds": 0,
}  # fmt: skip
"""What options that were not given stand for; those of workloads come before the others."""


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, presets filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=versions())
    parser.add_argument("--config", type=Path, action="append", help="a pair; repeatable, each has its report")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="key=value; repeatable")
    parser.add_argument("--url", help="a running soma-serve of this machine, started from the same --config")
    parser.add_argument("--workloads", type=Path, metavar="DIR", help="folders of dialogues with a truth")
    parser.add_argument("--part", choices=PARTS, default="test", help="of the workloads")
    parser.add_argument("--freeze", action="store_true", help="write what the test part is played with; no run")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="blocks that were played, to go on from")
    parser.add_argument(
        "--dialogues", type=Path, help="dialogues without a truth; default: dialogues/demo.json"
    )
    parser.add_argument("--only", action="append", help="this dialogue alone; repeatable")
    parser.add_argument("--synthetic", metavar="TURNS:WORDS", help="made-up dialogues instead of --dialogues")
    parser.add_argument(
        "--quick", action="store_true", help="few arms, sessions and tokens: 10 minutes on 2 cores"
    )
    parser.add_argument("--arms", type=lambda text: tuple(text.split(",")), help="policies, comma-separated")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--sessions", type=int, help="sessions of a block")
    parser.add_argument("--limit-turns", type=int, help="play the first N turns only")
    parser.add_argument("--max-tokens", type=int, help="longest answer")
    parser.add_argument("--arrival", type=float, help="mean seconds between two arrivals of sessions")
    parser.add_argument("--think", type=float, help="mean seconds between an answer and the next turn")
    parser.add_argument("--capacity", type=int, help="rates of arrival to try for soma and original; 0: none")
    parser.add_argument("--drift", type=int, help="sessions whose topic changes, for arms with a gate; 0: none")
    parser.add_argument("--target-ttft", type=float, default=3.0, help="seconds; for goodput")
    parser.add_argument("--target-latency", type=float, default=6.0, help="seconds; for goodput")
    parser.add_argument("--prices", type=Path, default=HERE.parent / "configs" / "prices.yaml")
    parser.add_argument("--tariff", help="the tariff of `net_cost`; default: the first in --prices")
    parser.add_argument(
        "--seconds",
        choices=("busy", "cpu"),
        default="busy",
        help="of engines: with a request running, or processor's",
    )
    parser.add_argument("--overhead-config", type=Path, default=HERE.parent / "configs" / "tiny.yaml")
    parser.add_argument(
        "--overhead-rounds", type=int, help="requests for dispatch_overhead_ms; 0: leave it out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the document here")
    parser.add_argument("--out", type=Path, help="directory for the figures")
    parser.add_argument("--write", type=Path, help="document whose tables, of --json's name, to replace")
    parser.add_argument("--report", type=Path, help="print and draw this document; nothing is run")
    options = parser.parse_args(arguments)
    if options.quick:
        presets = {**QUICK, **(QUICK_WORKLOADS if options.workloads else {})}
    else:
        presets = {**FULL, **(WORKLOADS if options.workloads else {})}
    options.all_arms = options.arms is None
    for name, value in presets.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    shipped = [HERE.parent / "configs" / f"{name}.yaml" for name in ("cpu_demo", "cpu_weak")]
    options.config = options.config or (shipped if options.freeze else shipped[:1])
    if not options.workloads and options.dialogues is None:
        options.dialogues = DEMO
    sources = [path.name for path in (options.workloads, options.dialogues) if path is not None]
    options.source = " and ".join(sources)
    if options.keep is None and options.out is not None:
        options.keep = options.out / "blocks"
    return options


async def _run(study: Study, say: Say) -> dict[str, Any]:
    """`run`, also unwound by SIGTERM: servers started here must be stopped."""
    current = asyncio.current_task()
    assert current is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current.cancel)
    return await run(study, say)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, 1 for a run that failed, 2 for wrong input."""
    options = parsed(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)

    def say(line: str) -> None:
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    try:
        if options.freeze:
            return _freeze(options)
        if options.report is not None:
            _show(options, json.loads(options.report.read_text(encoding="utf-8")), console)
            return 0
        for number, one in enumerate([prepared(each) for each in pairs(options)]):
            document = asyncio.run(_run(one, say))
            _show(one.options, document, console, one.options.config.stem if number else "")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (SomaError, IncompleteRun, LookupError) as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("throughput: interrupted; what was played is kept, nothing was reported", file=sys.stderr)
        return 130
    return 0


def _freeze(options: argparse.Namespace) -> int:
    """Write what the test part will be played with, for both shipped pairs unless others are named."""
    if options.workloads is None:
        raise ConfigError("--freeze", ["found no --workloads; expected the folder to freeze"])
    configs = {path.stem: load_config(path, options.overrides) for path in options.config}
    print(freeze(options.workloads, load_workloads(options.workloads), configs))
    return 0


def _show(options: argparse.Namespace, document: dict[str, Any], console: Console, pair: str = "") -> None:
    """Print, and write what was asked for; a second pair's files are named after it."""
    table.show(document, console)
    if options.json:
        path = options.json.with_suffix(f".{pair}.json") if pair else options.json
        write_json(path, document, allow_nan=False)
    drawn = figures.draw(document, options.out / pair) if options.out else []
    for path in drawn:
        console.print(f"figure {path}", highlight=False)
    if options.write:
        source = options.json or options.report
        stem = f"{source.stem}.{pair}" if pair and source else source.stem if source else "study"
        table.rewrite(options.write, document, drawn, "" if stem == "study" else stem)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
