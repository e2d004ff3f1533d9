"""`soma replay`: plays dialogues against a server as an ordinary chat client, and records who answered.

Guarantees: every mistake in the command line, the configuration and the dialogues is reported at once, before
anything starts; the log is written whole or not at all, also after an interruption.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from soma_vllm.config import Config, load_config
from soma_vllm.errors import EngineUnavailable
from soma_vllm.tools.command_line import (
    DialogueFile,
    InputProblems,
    Overrides,
    make_out,
    sigterm_cancels,
    write_json,
)
from soma_vllm.tools.replay import replay_view as view
from soma_vllm.tools.replay import timeline
from soma_vllm.tools.replay.child_server import run_server, serve_command, while_alive
from soma_vllm.tools.replay.client import Player
from soma_vllm.tools.replay.dialogues import Script, load_dialogues, make_script
from soma_vllm.tools.replay.expectations import Expectation, unmet
from soma_vllm.tools.replay.pace import Rules, Timekeeper
from soma_vllm.tools.replay.plan import fit_to_machine
from soma_vllm.tools.replay.replay_view import Screen, SessionRecord

CONNECT_S = 60.0
"""Longest wait for a connection to the server."""


def replay(
    config: Annotated[Path, typer.Option(help="Configuration of the server.")],
    dialogues: DialogueFile,
    out: Annotated[Path, typer.Option(help="Directory for soma_log.json and timeline.png.")],
    url: Annotated[
        str | None,
        typer.Option(help="A running server, such as http://127.0.0.1:8000/v1. Without it one is started."),
    ] = None,
    overrides: Overrides = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Most dialogues under way at once.")] = 3,
    think_time: Annotated[float, typer.Option(min=0, help="Seconds a user waits between turns.")] = 0.0,
    await_verdicts: Annotated[
        bool,
        typer.Option(
            "--await-verdicts",
            help="After the warm start the user reads until the session has its verdict: training done, "
            "judged, or given up. It stands for reading time; no user ever waits for training.",
        ),
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Be over in about so many minutes: measures this machine first (some seconds), then leaves "
            "out what it has no time for, says so, and lets no dialogue begin that would not end in time.",
        ),
    ] = None,
    first: Annotated[
        list[str] | None,
        typer.Option(help="Begin with this dialogue, and play it however slow the machine is; repeatable."),
    ] = None,
    force_adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask for the adapter in this dialogue, whatever the gate decides; repeatable. "
            "Needs adaptation.allow_force_header."
        ),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Play this dialogue alone; repeatable.")] = None,
    limit_turns: Annotated[int | None, typer.Option(min=1, help="Play the first N turns only.")] = None,
    expect: Annotated[
        list[Expectation] | None,
        typer.Option(help="Exit with 1 unless a session shows this; repeatable."),
    ] = None,
) -> None:
    """Replay dialogues against a server and record who answered each turn, as a log, a table and a figure.

    Exits with 1 when a dialogue broke off, the server died or an --expect was not met; with 2 on wrong input.
    """
    screen, overrides, first = Screen(Console()), overrides or [], first or []
    settings, script = _prepare(
        config,
        dialogues,
        overrides,
        only=only or [],
        limit_turns=limit_turns,
        force_adapter=force_adapter or [],
        concurrency=concurrency,
        think_s=think_time,
        awaits_verdicts=await_verdicts,
        first=first,
        out=out,
    )
    budget_s = None if minutes is None else 60 * minutes
    settings, sessions, trouble = _replay(screen, script, settings, (config, overrides), url, budget_s, first)
    log = write_log(out / "soma_log.json", settings, sessions)
    look = f"look at {out / 'soma_log.json'}"
    if any(session.turns for session in sessions):
        timeline.draw(log, out / "timeline.png")
        look = f"look at {out / 'timeline.png'} and {out / 'soma_log.json'}"
    _report(screen, sessions, trouble, expect or [], look)


def _replay(
    screen: Screen,
    script: Script,
    settings: Config,
    source: tuple[Path, list[str]],
    url: str | None,
    budget_s: float | None,
    first: Sequence[str],
) -> tuple[Config, list[SessionRecord], str | None]:
    """Plan for this machine if there is a budget and no server yet, then play.

    Args:
        source: the configuration's file and its overrides, for a server started here.

    Returns:
        The settings in force, every dialogue's record, and why the replay ended early, if it did.
    """
    for name in sorted(script.forced):
        screen.say(f"{name}: forced to its adapter, whatever the gate decides", style="yellow")
    began, plan = time.monotonic(), None
    path, overrides = source
    if budget_s is not None and url is None:
        plan = fit_to_machine(script, settings, first, budget_s, screen.say)
    if plan is not None:
        overrides = [*overrides, *plan.overrides]
        settings, script = load_config(path, overrides), plan.script
    limit_s = settings.adaptation.train_timeout_s
    timekeeper = Timekeeper(
        Rules(script.warm_window, script.think_s, script.concurrency, limit_s),
        None if plan is None else plan.expected,
        None if budget_s is None else began + budget_s,
        always={*first, *script.forced} or {next(iter(script.dialogues))},
    )
    base_url = url or f"{settings.server.url}/v1"
    server = None if url else serve_command(path, overrides)
    # Both engines start within this time, one after the other.
    start_timeout_s = 2 * settings.original.start_timeout_s
    return settings, *asyncio.run(run(script, screen, base_url, server, start_timeout_s, timekeeper))


def _prepare(
    config: Path, dialogues: Path, overrides: Sequence[str], out: Path, **choices: Any
) -> tuple[Config, Script]:
    """Read everything, or exit with 2 after printing all that is wrong."""
    problems = InputProblems()
    resolved = problems.attempt(lambda: load_config(config, overrides))
    parsed = problems.attempt(lambda: load_dialogues(dialogues))
    script = None
    if resolved is not None and parsed is not None:
        script = problems.attempt(lambda: make_script("soma replay", parsed, resolved, **choices))
    if not problems:
        problems.attempt(lambda: make_out(out))
    if problems or resolved is None or script is None:
        problems.exit()
    return resolved, script


def _report(
    screen: Screen,
    sessions: Sequence[SessionRecord],
    trouble: str | None,
    expect: Sequence[Expectation],
    look: str,
) -> None:
    """Print table, summary, what went wrong and where to look; exit with 1 if anything went wrong."""
    screen.console.print(view.table(sessions))
    for line in view.summary(sessions):
        screen.say(line)
    lines = unmet(expect, sessions)
    for line in ([f"the replay ended early: {trouble}"] if trouble else []) + lines:
        screen.say(line, style="bold red")
    screen.say(look, style="bold")
    if trouble or lines or any(session.error for session in sessions):
        raise typer.Exit(1)


async def run(
    script: Script,
    screen: Screen,
    base_url: str,
    server: Sequence[str] | None,
    start_timeout_s: float,
    timekeeper: Timekeeper,
) -> tuple[list[SessionRecord], str | None]:
    """Play a script, against a server started for it if a command is given.

    Returns:
        Every dialogue's record, and why the replay ended early, if it did.
    """
    from openai import AsyncOpenAI, Timeout

    root = base_url.rstrip("/").removesuffix("/v1")
    # A slow answer is no failure; a server that dies ends the replay by itself.
    patient = Timeout(None, connect=CONNECT_S)
    client = AsyncOpenAI(
        base_url=f"{root}/v1", api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=patient
    )
    player = Player(client, root, script, screen.show, timekeeper)
    screen.left_s = player.left_s

    def relay(line: str) -> None:
        screen.say(f"server | {line}", style="dim")

    trouble: str | None = None
    try:
        with sigterm_cancels(), screen.live(player.sessions):
            async with client, AsyncExitStack() as stack:
                if server is None:
                    await player.play()
                else:
                    started = run_server(server, root, start_timeout_s, relay)
                    await while_alive(await stack.enter_async_context(started), player.play())
    except EngineUnavailable as error:
        trouble = str(error)
    except asyncio.CancelledError:
        trouble = "interrupted"
    return list(player.sessions.values()), trouble


def write_log(path: Path, config: Config, sessions: Sequence[SessionRecord]) -> dict[str, Any]:
    """Write `soma_log.json` whole or not at all, and return what it holds."""
    log = {
        "config": config.model_dump(mode="json"),
        "sessions": {session.dialogue: session.to_json() for session in sessions},
    }
    write_json(path, log)
    return log
