"""One run of the study: servers started, blocks played and measured, the document made.

Guarantees: a server started here is stopped here, whatever happens; nothing is reported unless everything that
was planned happened.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from soma_vllm.config import Config, Prices, load_config
from soma_vllm.errors import EngineUnavailable
from soma_vllm.tools.replay.child_server import run_server, serve_command, while_alive
from study.client import Played, Users
from study.cost import Counting
from study.meter import Meter, machine, server_process
from study.overhead import overhead, plain_server
from study.plan import Block, Dialogues, Visit, order
from study.ports import free_port
from study.report import IncompleteRun, Measured, Targets, check, report

Say = Callable[[str], None]

SECONDS = {"busy": "of engines time with a request running", "cpu": "of engines processor seconds"}


@dataclass(frozen=True)
class Study:
    """One run, read and checked."""

    options: argparse.Namespace
    config: Config
    tariffs: dict[str, Prices]
    dialogues: Dialogues
    blocks: list[Block]


async def served(
    stack: AsyncExitStack, path: Path, overrides: Sequence[str], say: Say, told_tokens: bool
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
        run_server(serve_command(path, own), root, 2 * config.original.start_timeout_s, say)
    )
    return root, process


async def run(study: Study, say: Say) -> dict[str, Any]:
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


async def played(study: Study, root: str, say: Say) -> list[Measured]:
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
    how = Counting(options.seconds == "busy", study.config.training.device == "cuda")
    # Where only lengths matter, answers have theirs.
    users = Users(root, options.max_tokens, settle_s, told, ignore_eos=bool(options.synthetic))
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
                measured.append(Measured.of(block, sessions, seconds, reading, meter.idling, how))
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


async def overheads(study: Study, root: str, config: Config, say: Say) -> dict[str, Any]:
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
        "seconds_are": f"{SECONDS[options.seconds]}, of trainers and server processor seconds",
        **{
            name: getattr(options, name)
            for name in ("arms", "repeats", "sessions", "arrival", "think", "seed", "quick", "overhead_rounds")
        },
        "max_tokens": options.max_tokens,
    }
