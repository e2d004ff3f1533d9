"""The server of one stage: started when a block needs it, warmed up, metered, stopped with its stage."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from soma_vllm.config import load_config
from soma_vllm.errors import EngineUnavailable
from soma_vllm.tools.replay.child_server import run_server, serve_command, while_alive
from study import arms, kept
from study.client import Played, Users
from study.meter import Meter, server_process
from study.plan import Block, Visit
from study.planned import Stage, Study
from study.ports import free_port
from study.report import IncompleteRun

Say = Callable[[str], None]
BLOCK_S = 1200.0
"""Longest a block may take; it is what a run that was ended loses."""


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
        "limits.policies=['*']",
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


class Server:
    """A stage's server, started when the first block needs it."""

    def __init__(
        self, study: Study, stage: Stage, stack: AsyncExitStack, say: Say, told: Callable[[Played], None]
    ) -> None:
        self.stage = stage
        self.cores = {
            "original": arms.count(study.config.original.cpu_cores),
            "surrogate": arms.count(study.config.surrogate.cpu_cores),
        }
        self._study = study
        self._stack = stack
        self._say = say
        self._told = told
        self._open: tuple[Users, Meter, Any] | None = None

    async def play(self, block: Block) -> dict[str, Any]:
        """One block, as it is kept.

        Raises:
            IncompleteRun: a session broke off, or the block took longer than `BLOCK_S`.
        """
        users, meter, process = self._open or await self._started()
        found: list[dict[str, Any]] = []

        async def measured() -> None:
            found.append(await self._measured(block, users, meter))

        try:
            async with asyncio.timeout(BLOCK_S):
                await (measured() if process is None else while_alive(process, measured()))
        except TimeoutError as error:
            where = f"{block.arm}, repeat {block.repeat}"
            raise IncompleteRun(
                f"{where}: found no end after {BLOCK_S:g} s; expected fewer --sessions"
            ) from error
        if errors := [one["error"] for one in found[0]["sessions"] if one["error"]]:
            raise IncompleteRun(f"{block.arm}, repeat {block.repeat}: {errors[0]}")
        return found[0]

    async def _measured(self, block: Block, users: Users, meter: Meter) -> dict[str, Any]:
        before = await meter.read()
        sessions, seconds = await users.play(block)
        reading = (await meter.read()).since(before, meter.idling)
        self._say(f"block done: {block.arm}, repeat {block.repeat}, {seconds:.0f} s")
        await users.remove(sessions)
        return kept.written(sessions, seconds, reading, meter.idling)

    async def _started(self) -> tuple[Users, Meter, Any]:
        options, config = self._study.options, self._study.config
        process = None
        if options.url:
            root = options.url.rstrip("/").removesuffix("/v1")
        else:
            given = (*options.overrides, *self.stage.overrides)
            root, process = await served(self._stack, options.config, given, self._say, told_tokens=True)
        port = urlsplit(root).port
        if port is None:
            raise EngineUnavailable(f"--url {root}: expected a port")
        settle_s = config.adaptation.train_timeout_s
        # Where only lengths matter, answers have theirs.
        users = Users(root, options.max_tokens, settle_s, self._told, ignore_eos=bool(options.synthetic))
        self._stack.push_async_callback(users.close)
        warming = Users(root, 4, settle_s, lambda one: None)
        self._stack.push_async_callback(warming.close)
        meter = await self._stack.enter_async_context(Meter(server_process(port), root))
        names = list(dict.fromkeys(block.arm for block in (*self.stage.blocks, *self.stage.ladders)))
        await warm_up(self._study, names, warming)
        await meter.learn_idling()
        self._open = users, meter, process
        return self._open


async def warm_up(study: Study, names: Sequence[str], users: Users) -> None:
    """Two short turns in every arm, not counted.

    Raises:
        IncompleteRun: an arm does not answer, such as a policy that is not set up.
    """
    dialogue, turns = next(iter(study.dialogues.items()))
    for arm in names:
        policies = arms.policies(arm, 2, 1)
        session = f"warm-up-{secrets.token_hex(3)}-{arm}"
        visit = Visit(session, dialogue, tuple(turns[:2]), 0.0, (0.0,), policies)
        sessions, _ = await users.play(Block(0, arm, (visit,)))
        if sessions[0].error:
            raise IncompleteRun(f"warm-up of {arm}: {sessions[0].error}")
        await users.remove(sessions)
