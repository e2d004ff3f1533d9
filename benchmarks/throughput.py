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
* Costs are seconds times prices. Seconds are processor seconds of each process where engines compute on
  processors, which other work on the machine changes little, and on GPUs the time an engine had a request
  running; both are in the report. They hold everything an arm caused: users' turns, held-out answers,
  training, audits. What the idle server's polling takes is measured before the first block and taken off;
  Ray's housekeeping is reported and not priced.
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
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from study import figures, table
from study.client import Played, Users
from study.cost import load_prices
from study.meter import Meter, machine, server_process
from study.overhead import overhead, plain_server
from study.plan import Block, Dialogues, Load, Visit, order, plan, synthetic
from study.ports import free_port
from study.report import REFERENCE, IncompleteRun, Measured, Targets, check, report

from soma_vllm.cli.child_server import serve_command, started_server, while_alive
from soma_vllm.cli.dialogues import load_dialogues
from soma_vllm.config import Config, Prices, load_config
from soma_vllm.errors import ConfigError, EngineUnavailable, SomaError
from soma_vllm.evaluation.report import write

HERE = Path(__file__).parent
FULL = {
    "arms": ("original", "surrogate", "soma", "history_prefix", "history_ft"),
    "repeats": 3, "sessions": 6, "limit_turns": None, "max_tokens": None, "arrival": 20.0, "think": 4.0,
    "overhead_rounds": 300,
}  # fmt: skip
QUICK = {
    "arms": ("original", "surrogate", "soma"),
    "repeats": 2, "sessions": 2, "limit_turns": 10, "max_tokens": 16, "arrival": 4.0, "think": 1.0,
    "overhead_rounds": 100,
}  # fmt: skip
"""What options that were not given stand for."""


@dataclass(frozen=True)
class Study:
    """One run, read and checked."""

    options: argparse.Namespace
    config: Config
    tariffs: dict[str, Prices]
    dialogues: Dialogues
    blocks: list[Block]
    by_busy: bool

    @property
    def load(self) -> Load:
        """How users behave."""
        return Load(self.options.sessions, self.options.arrival, self.options.think)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, presets filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--max-tokens", type=int, help="longest answer; default: max_new_tokens")
    parser.add_argument("--arrival", type=float, help="mean seconds between two arrivals of sessions")
    parser.add_argument("--think", type=float, help="mean seconds between an answer and the next turn")
    parser.add_argument("--target-ttft", type=float, default=3.0, help="seconds; for goodput")
    parser.add_argument("--target-latency", type=float, default=6.0, help="seconds; for goodput")
    parser.add_argument("--prices", type=Path, default=HERE.parent / "configs" / "prices.yaml")
    parser.add_argument("--tariff", help="the tariff of `net_cost`; default: the first in --prices")
    parser.add_argument(
        "--seconds", choices=("cpu", "busy"), help="what costs; default: by the engines' device"
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
    default = "cpu" if config.original.device == config.surrogate.device == "cpu" else "busy"
    return Study(options, config, tariffs, dialogues, blocks, (options.seconds or default) == "busy")


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


async def served(
    stack: AsyncExitStack, path: Path, overrides: Sequence[str], say: Any, told_tokens: bool
) -> tuple[str, Any]:
    """(address, process) of a soma-serve of its own port and files, stopped with `stack`."""
    config = load_config(path, overrides)
    port = free_port()
    own = [
        *overrides,
        *("server.host=127.0.0.1", f"server.port={port}"),
        "storage.url=sqlite+aiosqlite:///{run_dir}/sessions.db",
        "adapters.root='{run_dir}/adapters'",
    ]
    if told_tokens:  # usage then says what the prefix cache had
        for name, engine in (("original", config.original), ("surrogate", config.surrogate)):
            arguments = json.dumps([*engine.extra_args, "--enable-prompt-tokens-details"])
            own.append(f"{name}.extra_args={arguments}")
    root = f"http://127.0.0.1:{port}"
    process = await stack.enter_async_context(
        started_server(serve_command(path, own), root, 2 * config.original.start_timeout_s, say)
    )
    return root, process


async def run(study: Study, say: Any) -> dict[str, Any]:
    """Play everything, and the document.

    Raises:
        EngineUnavailable: a server did not start, or died.
        IncompleteRun: what was planned did not all happen.
    """
    options, measured = study.options, list[Measured]()
    same = options.overhead_config.resolve() == options.config.resolve()
    found: dict[str, Any] | None = None

    async def play(root: str) -> None:
        nonlocal found
        measured.extend(await played(study, root, say))
        if same and options.overhead_rounds:
            found = await overheads(study, root, study.config, say)

    facts = settings(study)
    async with AsyncExitStack() as stack:
        if options.url:
            await play(options.url.rstrip("/").removesuffix("/v1"))
        else:
            root, process = await served(stack, options.config, options.overrides, say, told_tokens=True)
            await while_alive(process, play(root))
    check(measured, study.blocks)
    if not same and options.overhead_rounds:
        async with AsyncExitStack() as stack:
            other = load_config(options.overhead_config).for_serving(str(options.overhead_config))
            root, _ = await served(stack, options.overhead_config, (), say, told_tokens=False)
            found = await overheads(study, root, other, say)
    targets = Targets(options.target_ttft, options.target_latency)
    encode = encoder(study.config)
    return report(measured, study.config, study.tariffs, targets, encode, found, facts)


async def played(study: Study, root: str, say: Any) -> list[Measured]:
    """Every block, in the order of the plan, after a warm-up."""
    options = study.options
    turns = {"done": 0}
    planned = sum(block.planned for block in study.blocks)

    def told(one: Played) -> None:
        turns["done"] += 1
        last = one.turns[-1]
        who = f"{last.engine} with an adapter" if last.adapter else last.engine
        where = f"{one.visit.session} {one.visit.dialogue} turn {last.turn}"
        say(f"{turns['done']}/{planned}  {where}: {who}, {last.latency_s:.2f} s")

    settle_s = study.config.adaptation.train_timeout_s
    users = Users(root, options.max_tokens or study.config.max_new_tokens, settle_s, told)
    warming = Users(root, 4, settle_s, lambda one: None)
    measured = []
    port = urlsplit(root).port
    if port is None:
        raise EngineUnavailable(f"--url {root}: expected a port")
    try:
        async with Meter(server_process(port), root) as meter:
            await warm_up(study, warming)
            await meter.learn_idling()
            for block in study.blocks:
                before = await meter.read()
                sessions, seconds = await users.play(block)
                reading = (await meter.read()).since(before, meter.idling)
                measured.append(Measured.of(block, sessions, seconds, reading, meter.idling, study.by_busy))
                say(f"block done: {block.arm}, repeat {block.repeat}, {seconds:.0f} s")
                await users.remove(sessions)
    finally:
        await users.close()
        await warming.close()
    return measured


async def warm_up(study: Study, users: Users) -> None:
    """Two short turns in every arm, not counted.

    Raises:
        IncompleteRun: an arm does not answer, such as a policy that is not set up.
    """
    name, turns = next(iter(study.dialogues.items()))
    for arm in study.options.arms:
        visit = Visit(f"warm-up-{secrets.token_hex(3)}-{arm}", name, tuple(turns[:2]), 0.0, (0.0,))
        sessions, _ = await users.play(Block(0, arm, (visit,)))
        if sessions[0].error:
            raise IncompleteRun(f"warm-up of {arm}: {sessions[0].error}")
        await users.remove(sessions)


async def overheads(study: Study, root: str, config: Config, say: Any) -> dict[str, Any]:
    """What dispatch adds, measured at a running soma-serve of `config`."""
    assert config.surrogate_model is not None, "for_serving has checked"
    name = config.surrogate.name or config.surrogate_model.rstrip("/").rsplit("/", 1)[-1].lower()
    say(f"dispatch overhead: starting a vLLM server of {name} without the plugin")
    said: deque[str] = deque(maxlen=30)
    try:
        async with plain_server(config, said.append) as plain:
            found = await overhead(root, plain, name, study.options.overhead_rounds, study.options.seed)
    except EngineUnavailable:
        for line in said:
            say(f"vLLM | {line}")
        raise
    return {"surrogate": name, **found}


def encoder(config: Config) -> Any:
    """The gate's own encoder."""
    from soma_vllm.method.encoder import SentenceEncoder
    from soma_vllm.models.hub import local_path
    from soma_vllm.models.quiet import quiet

    with quiet():
        folder = local_path(config.encoder.model)
        return SentenceEncoder(folder, config.gate.encoder_max_tokens, config.encoder.threads).encode


def settings(study: Study) -> dict[str, Any]:
    """What the numbers rest on; asked before anything starts."""
    options, config = study.options, study.config
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "original": config.original_model or config.original.name,
        "surrogate": config.surrogate_model,
        "config": config.model_dump(mode="json"),
        "dialogues": {
            "source": options.synthetic or options.dialogues.name,
            "turns": {visit.dialogue: len(visit.turns) for visit in study.blocks[0].visits},
        },
        "order": order(options.arms, options.repeats, options.seed),
        "tariffs": list(study.tariffs),
        "prices": {name: prices.model_dump() for name, prices in study.tariffs.items()},
        "seconds_are": "time with a request running" if study.by_busy else "processor seconds",
        **{
            name: getattr(options, name)
            for name in ("arms", "repeats", "sessions", "arrival", "think", "seed", "quick", "overhead_rounds")
        },
        "max_tokens": options.max_tokens or config.max_new_tokens,
    }


async def _run(study: Study, say: Any) -> dict[str, Any]:
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
        write(options.json, document)
    if options.write:
        table.rewrite(options.write, document)
    if options.out:
        for path in figures.draw(document, options.out):
            console.print(f"figure {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
