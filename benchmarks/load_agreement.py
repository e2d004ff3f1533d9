"""Do our own figures agree with those of other load generators? All against one server, in one run.

One soma-serve; the same workload by `benchmarks/throughput.py`'s own users, by guidellm and by aiperf:
dialogues of made-up words, one after the other, a second to think, answers of a fixed length. Each round runs
all three, in an order that turns. Prints what each saw (medians of a round) and ours over theirs.

    make load-tools && python benchmarks/load_agreement.py [--rounds N] [--json FILE]
    python benchmarks/load_agreement.py --url http://127.0.0.1:8000 --model soma:original
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from study.client import Users
from study.load_tools import READERS, LoadFailed, Seen, Workload, installed, run_tool, seen
from study.plan import Load, plan, synthetic
from study.run import served

from soma_vllm.config import load_config
from soma_vllm.models.hub import local_path

HERE = Path(__file__).parent
OURS = "ours"
THINK_S = 1
"""guidellm takes no 0."""
WORDS, ANSWER = 13, 16
"""Words of a query, which are about the 24 tokens of docs/load.md's, and tokens of an answer."""
FIGURES = {
    "first token, s": "ttft_s",
    "between tokens, s": "token_s",
    "turn, s": "latency_s",
    "prompt, tokens": "prompt_tokens",
    "answer, tokens": "completion_tokens",
}


async def measured(root: str, options: argparse.Namespace, tokenizer: Path, say: Any) -> list[dict[str, Seen]]:
    """What everybody saw, round by round.

    Raises:
        LoadFailed: somebody was not answered as often as it asked.
    """
    rounds = []
    names = [OURS, *READERS]
    await ours(root, options, -1)  # warms up, not counted
    for number in range(options.rounds):
        found = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name == OURS:
                found[name] = await ours(root, options, number)
            else:
                found[name] = await asyncio.to_thread(theirs, name, root, options, tokenizer, number)
            say(f"round {number + 1} of {options.rounds}, {name}: a turn takes {found[name].latency_s:.2f} s")
        rounds.append(found)
    return rounds


async def ours(root: str, options: argparse.Namespace, seed: int) -> Seen:
    """Our users, one session after the other."""
    dialogues = synthetic(options.sessions, options.turns, WORDS, seed)
    arm = options.model.partition(":")[2]
    users = Users(root, ANSWER, 60.0, lambda one: None, ignore_eos=True)
    turns = []
    try:
        run = f"agreement-{secrets.token_hex(3)}"
        for name, queries in dialogues.items():
            (block,) = plan({name: queries}, (arm,), 1, Load(1, 0.0, THINK_S), seed, f"{run}-{name}")
            sessions, _ = await users.play(block)
            if sessions[0].error:
                raise LoadFailed(f"{OURS}: {sessions[0].error}")
            turns += sessions[0].turns
            await users.remove(sessions)
    finally:
        await users.close()
    return Seen(
        median(turn.ttft_s for turn in turns),
        median(turn.token_s or 0.0 for turn in turns),
        median(turn.latency_s for turn in turns),
        median(turn.prompt_tokens for turn in turns),
        median(turn.completion_tokens for turn in turns),
    )


def theirs(tool: str, root: str, options: argparse.Namespace, tokenizer: Path, seed: int) -> Seen:
    """A load generator, one request at a time."""
    requests = options.sessions * options.turns
    alone = {"PROFILE": "kind=synchronous", "LOAD": "--concurrency 1", "SEED": str(seed)}
    with tempfile.TemporaryDirectory() as folder:
        load = Workload(options.model, options.turns, requests, THINK_S, alone)
        run_tool(tool, root, tokenizer, Path(folder), load)
        return seen(tool, Path(folder), requests)


def rows(rounds: Sequence[Mapping[str, Seen]]) -> list[tuple[str, list[str]]]:
    """For each figure what everybody saw, then ours over theirs with its range over rounds."""
    made = []
    for heading, name in FIGURES.items():
        values = {who: [getattr(found[who], name) for found in rounds] for who in (OURS, *READERS)}
        cells = [f"{median(of):.3f}" for of in values.values()]
        for tool in READERS:
            ratios = sorted(mine / other for mine, other in zip(values[OURS], values[tool], strict=True))
            cells.append(f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")
        made.append((heading, cells))
    return made


async def main(options: argparse.Namespace, console: Console) -> None:
    """Run it all and print the table."""
    if missing := [tool for tool in READERS if not installed(tool)]:
        raise SystemExit(f"{', '.join(missing)}: not installed; expected `make load-tools` to have been run")
    config = load_config(options.config).for_serving(str(options.config))
    assert config.surrogate_model is not None, "for_serving has checked"
    tokenizer = local_path(config.surrogate_model)
    async with AsyncExitStack() as stack:
        root = options.url
        if root is None:
            root, _ = await served(stack, options.config, (), lambda line: None, told_tokens=False)
        rounds = await measured(root, options, tokenizer, console.print)
    heads = ["", OURS, *READERS, *(f"ours over {tool}'s" for tool in READERS)]
    table = Table(*heads)
    for heading, cells in rows(rounds):
        table.add_row(heading, *cells)
    console.print(table)
    if options.json:
        document = [{who: asdict(found) for who, found in one.items()} for one in rounds]
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE.parent / "configs" / "cpu_demo.yaml")
    parser.add_argument("--url", help="a running soma-serve; default: one is started from --config")
    parser.add_argument("--model", default="soma:surrogate", help="the policy, as soma:NAME")
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rounds here")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(parsed(), Console()))
