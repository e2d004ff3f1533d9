"""Latency, cost and fidelity of serving policies, side by side on one running soma-serve.

What is compared. An arm is a policy (`soma`, `original`, `surrogate`, `history_prefix`, `history_ft`, …),
chosen per request by `model: soma:<policy>`. Users arrive in an open loop: sessions begin at exponential
intervals whatever the server does, and within a session the next turn follows an answer after an exponential
think time. Dialogues come from a file, or are made up where only lengths matter.

Why it is fair.
* One server, one pair of engines, one run. Arms take turns in blocks: in each repeat every arm has the server
  to itself for the same dialogues, arrivals and think times, in an order drawn anew from the seed.
  Interleaved more finely, one arm's load would be another's latency. A block ends when nothing of it runs in
  the background any more, so that training and audits are paid by the arm that caused them; then its sessions
  are removed.
* Every session is a tenant of its own: no prefix cache is shared between sessions, repeats or arms.
* A warm-up is played first and not counted. A run in which a planned turn is missing fails.
* Costs are seconds times prices. An engine's seconds are those in which it had a request running, users' or
  background's, because that long its core or GPU was taken; the trainers' and soma-serve's own are processor
  seconds. They hold everything an arm caused: users' turns, held-out answers, training, audits. Processor
  seconds of engines are reported beside them and not the default: vLLM's processes poll while they wait for
  each other and for a second afterwards. Ray's housekeeping is reported and not priced.
* Latencies are the client's, over HTTP. `dispatch_overhead_ms` compares the same prompts, one at a time in
  random order, between soma-serve and a vLLM server started alike without the plugin.
* Fidelity is 1 - mean gap to what the arm `original` answered to the same later turn, each arm going on from
  its own answers; the original played again gives the floor of that measure. See study/fidelity.py.

`speculative` needs a server that drafts (`--set original.draft_tokens=4`), which then drafts in the arm
`original` too: give both a run of their own, and compare it with a run without.

    python benchmarks/throughput.py --quick [--json FILE] [--out DIR]     # embedded pair, 2 cores, 10 minutes
    python benchmarks/throughput.py --dialogues FILE [--json FILE] [--out DIR]
    python benchmarks/throughput.py --report FILE [--out DIR]             # an earlier run's tables and figures
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from study import figures, table
from study.cost import load_prices
from study.plan import Dialogues, Load, plan, synthetic
from study.report import REFERENCE, IncompleteRun
from study.run import Say, Study, run

from soma_vllm.config import load_config
from soma_vllm.errors import ConfigError, SomaError
from soma_vllm.tools.command_line import write_json
from soma_vllm.tools.replay.dialogues import load_dialogues
from soma_vllm.versions import versions

HERE = Path(__file__).parent
FULL = {
    "arms": ("original", "surrogate", "soma", "history_prefix", "history_ft"),
    "repeats": 3, "sessions": 9, "limit_turns": None, "max_tokens": 32, "arrival": 8.0, "think": 3.0,
    "overhead_rounds": 60,
}  # fmt: skip
QUICK = {
    "arms": ("original", "surrogate", "soma"),
    "repeats": 2, "sessions": 2, "limit_turns": 10, "max_tokens": 16, "arrival": 4.0, "think": 1.0,
    "overhead_rounds": 20,
}  # fmt: skip
"""What options that were not given stand for."""


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, presets filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=versions())
    parser.add_argument("--config", type=Path, default=HERE.parent / "configs" / "cpu_demo.yaml")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="key=value; repeatable")
    parser.add_argument("--url", help="a running soma-serve of this machine, started from the same --config")
    parser.add_argument("--dialogues", type=Path, default=HERE.parent / "dialogues" / "demo.json")
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
    parser.add_argument("--write", type=Path, help="document whose tables to replace, such as docs/results.md")
    parser.add_argument("--report", type=Path, help="print and draw this document; nothing is run")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def prepared(options: argparse.Namespace) -> Study:
    """Everything read and checked.

    Raises:
        ConfigError: something does not fit, with all that is wrong with one source.
    """
    config = load_config(options.config, options.overrides).for_serving(str(options.config))
    tariffs = load_prices(options.prices)
    problems = []
    if options.tariff is not None:
        if options.tariff not in tariffs:
            problems.append(f"--tariff {options.tariff}: expected one of {', '.join(tariffs)}")
        else:
            tariffs = {options.tariff: tariffs[options.tariff], **tariffs}
    if REFERENCE not in options.arms or len(set(options.arms)) != len(options.arms):
        problems.append(f"--arms {','.join(options.arms)}: expected {REFERENCE} among arms that all differ")
    if "speculative" in options.arms and set(options.arms) != {REFERENCE, "speculative"}:
        problems.append(
            "--arms: a server that drafts does so in every arm; expected original,speculative alone"
        )
    if config.access.mode == "keys":
        problems.append("access.mode: found keys; expected open: every session is a tenant of its own")
    if config.original.url is not None and next(iter(tariffs.values())).original_prompt_thousand is None:
        problems.append(
            "original.url: a remote original's seconds are not ours; expected a tariff by the token"
        )
    least = config.warm_window + 2
    dialogues = _dialogues(options)
    short = [name for name, turns in dialogues.items() if len(turns) < least]
    dialogues = {name: turns for name, turns in dialogues.items() if name not in short}
    if not dialogues:
        problems.append(f"found no dialogue of {least} turns or more; expected later turns to measure")
    if problems:
        raise ConfigError("throughput", problems)
    load = Load(options.sessions, options.arrival, options.think)
    blocks = plan(dialogues, options.arms, options.repeats, load, options.seed, secrets.token_hex(3))
    return Study(options, config, tariffs, dialogues, blocks)


def _dialogues(options: argparse.Namespace) -> Dialogues:
    if options.synthetic:
        turns, _, words = options.synthetic.partition(":")
        if not (turns.isdecimal() and words.isdecimal()):
            raise ConfigError(
                "--synthetic", [f"found {options.synthetic!r}; expected TURNS:WORDS, such as 12:40"]
            )
        found: Dialogues = synthetic(options.sessions, int(turns), int(words), options.seed)
    else:
        found = load_dialogues(options.dialogues)
    unknown = [name for name in options.only or () if name not in found]
    if unknown:
        raise ConfigError("--only", [f"found {', '.join(unknown)}; expected of {', '.join(found)}"])
    return {
        name: turns[: options.limit_turns]
        for name, turns in found.items()
        if not options.only or name in options.only
    }


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
        if options.report is not None:
            document = json.loads(options.report.read_text(encoding="utf-8"))
        else:
            document = asyncio.run(_run(prepared(options), say))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (SomaError, IncompleteRun, LookupError) as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("throughput: interrupted; nothing was reported", file=sys.stderr)
        return 130
    table.show(document, console)
    if options.json:
        write_json(options.json, document, allow_nan=False)
    drawn = figures.draw(document, options.out) if options.out else []
    for path in drawn:
        console.print(f"figure {path}", highlight=False)
    if options.write:
        table.rewrite(options.write, document, drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
