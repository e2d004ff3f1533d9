"""`soma replay`: plays dialogues against a server as an ordinary chat client, and records who answered.

Guarantees: every mistake in the command line, the configuration and the dialogues is reported at once, before
anything starts; a server started here is stopped here, whatever happens; the log is written whole or not at
all, also after an interruption; one dialogue's failure does not end the others.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from soma_vllm.cli import replay_view as view
from soma_vllm.cli.replay_view import Expectation, Screen, SessionRecord, TurnRecord
from soma_vllm.config import Config, load_config
from soma_vllm.errors import ConfigError, EngineError, EngineUnavailable, SomaError
from soma_vllm.types import Role

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam
    from openai.types.completion_usage import CompletionUsage

Dialogues = Mapping[str, tuple[str, ...]]

SETTLE_S = 30.0
"""Longest wait for a session's background audits after its last turn."""
HEALTH_POLL_S = 0.5
"""Seconds between two looks at a starting server."""
STOP_S = 60.0
"""Time a server gets to end after SIGTERM."""


def load_dialogues(path: str | Path) -> Dialogues:
    """Read `{"id": ["user turn 1", ...]}`.

    Raises:
        ConfigError: with everything that is wrong with the file.
    """
    source = str(path)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(source, [f"cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError(source, [f"is not JSON: {error}"]) from error
    if not isinstance(document, dict) or not document:
        found = "an empty object" if document == {} else f"a {type(document).__name__}"
        raise ConfigError(source, [f'found {found}; expected {{"id": ["user turn 1", ...]}}'])
    problems = [f"{name}: found twice; expected each id once" for name in repeated]
    for name, turns in document.items():
        problems += _dialogue_problems(name, turns)
    if problems:
        raise ConfigError(source, problems)
    return {name: tuple(turns) for name, turns in document.items()}


def _dialogue_problems(name: str, turns: object) -> list[str]:
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        problems.append(f"id {name!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else f"a {type(turns).__name__}"
        return [*problems, f"{name}: found {found}; expected a list of user turns"]
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, str):
            problems.append(f"{name}[{number}]: found a {type(turn).__name__}; expected a string")
        elif not turn.strip():
            problems.append(f"{name}[{number}]: found an empty turn; expected text")
    return problems


@dataclass(frozen=True)
class Script:
    """What to play, and how the simulated users behave."""

    dialogues: Dialogues
    forced: frozenset[str] = frozenset()
    """Dialogues whose requests carry `X-SOMA-Force: adapter`."""
    warm_window: int = 4
    max_tokens: int = 200
    concurrency: int = 1
    """Dialogues under way at once."""
    think_s: float = 0.0
    """Seconds a user waits before each turn but the first."""
    pause_s: float = 0.0
    """Longest time a user reads after the warm start, seconds."""
    poll_s: float = 1.0
    """Seconds between two looks at a session's report."""


def make_script(
    source: str,
    dialogues: Dialogues,
    config: Config,
    *,
    only: Sequence[str] = (),
    limit_turns: int | None = None,
    force_adapter: Sequence[str] = (),
    concurrency: int = 1,
    think_s: float = 0.0,
    pause_s: float = 0.0,
) -> Script:
    """Choose dialogues and turns.

    Raises:
        ConfigError: a chosen dialogue does not exist, or the configuration forbids forcing.
    """
    chosen = {name: turns[:limit_turns] for name, turns in dialogues.items() if not only or name in only}
    problems = [
        f"--only {name}: no such dialogue; expected one of {', '.join(dialogues)}"
        for name in only
        if name not in dialogues
    ]
    problems += [
        f"--force-adapter {name}: not among the dialogues to play; expected one of {', '.join(chosen)}"
        for name in force_adapter
        if name not in chosen
    ]
    if force_adapter and not config.adaptation.allow_force_header:
        problems.append("--force-adapter: found adaptation.allow_force_header: false; expected true")
    if problems:
        raise ConfigError(source, problems)
    return Script(
        chosen,
        frozenset(force_adapter),
        config.warm_window,
        config.max_new_tokens,
        concurrency,
        think_s,
        pause_s,
    )


class Player:
    """Plays a script; `sessions` holds every dialogue's record at any moment, in the script's order."""

    def __init__(
        self, client: AsyncOpenAI, root: str, script: Script, changed: Callable[[SessionRecord], None]
    ) -> None:
        """`root` is the server's address without `/v1`; `changed` is called after every change of a record."""
        self._client = client
        self._root = root
        self._script = script
        self._changed = changed
        run = secrets.token_hex(3)
        self.sessions = {
            name: SessionRecord(name, f"{name}-{run}", len(turns), forced=name in script.forced)
            for name, turns in script.dialogues.items()
        }

    async def play(self) -> None:
        """Play all dialogues; one that fails keeps its turns and says why it ended."""
        lanes = asyncio.Semaphore(self._script.concurrency)

        async def one(name: str) -> None:
            async with lanes:
                await self._play_one(name)

        async with asyncio.TaskGroup() as group:
            for name in self._script.dialogues:
                group.create_task(one(name))

    async def _play_one(self, name: str) -> None:
        from openai import OpenAIError

        try:
            await self._turns(name)
        except (OpenAIError, EngineError) as error:
            self._update(name, error=f"{type(error).__name__}: {error}")
        try:
            await self._settle(name)
        except (OpenAIError, EngineError) as error:
            reason = self.sessions[name].error or f"no report of the session: {type(error).__name__}: {error}"
            self._update(name, error=reason)

    async def _turns(self, name: str) -> None:
        script = self._script
        messages: list[ChatCompletionMessageParam] = []
        for number, query in enumerate(script.dialogues[name], start=1):
            if number > 1:
                await asyncio.sleep(script.think_s)
            messages.append({"role": "user", "content": query})
            turn = await self._ask(name, number, query, messages)
            messages.append({"role": "assistant", "content": turn.answer})
            record = self.sessions[name]
            self._update(name, turns=(*record.turns, turn), phase=turn.phase)
            if script.pause_s and number == script.warm_window < len(script.dialogues[name]):
                await self._read(name)

    async def _ask(
        self, name: str, number: int, query: str, messages: Sequence[ChatCompletionMessageParam]
    ) -> TurnRecord:
        """Send one turn and take its answer as it streams."""
        headers = {"X-Session-ID": self.sessions[name].session}
        if name in self._script.forced:
            headers["X-SOMA-Force"] = "adapter"
        at, start = time.time(), time.perf_counter()
        reply = await self._client.chat.completions.with_raw_response.create(
            model="soma",
            messages=list(messages),
            max_tokens=self._script.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers=headers,
        )
        engine = reply.headers.get("x-soma-engine", "")
        if engine not in set(Role):
            raise EngineError(
                f"found X-SOMA-Engine {engine!r}; expected original or surrogate, from soma-serve"
            )
        pieces: list[str] = []
        first: float | None = None
        usage: CompletionUsage | None = None
        finished = False
        async for chunk in reply.parse():
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content:
                    first = first or time.perf_counter() - start
                    pieces.append(choice.delta.content)
                finished = finished or choice.finish_reason is not None
        if not finished:
            raise EngineUnavailable(f"the stream of turn {number} ended before its finish_reason")
        details = usage.prompt_tokens_details if usage else None
        return TurnRecord(
            turn=number,
            query=query,
            answer="".join(pieces),
            engine=engine,
            adapter=reply.headers.get("x-soma-adapter") or None,
            phase=reply.headers.get("x-soma-phase", ""),
            reason=reply.headers.get("x-soma-reason", ""),
            at=at,
            ttft_s=first,
            latency_s=time.perf_counter() - start,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=details.cached_tokens if details else None,
            completion_tokens=usage.completion_tokens if usage else None,
        )

    async def _read(self, name: str) -> None:
        """Let the user read until the session is no longer adapting, or the pause is over."""

        def adapted(report: Mapping[str, Any]) -> bool:
            return report.get("phase") not in ("WARM_START", "ADAPTING")

        await self._poll(name, adapted, self._script.pause_s)

    async def _settle(self, name: str) -> None:
        """Wait for background audits, then take over what the server knows of the session."""
        report = await self._poll(name, lambda report: bool(report.get("idle")), SETTLE_S)
        if report is None:
            return
        told = {turn.get("turn"): turn for turn in report.get("turns") or ()}
        self._update(
            name,
            phase=report.get("phase") or self.sessions[name].phase,
            turns=tuple(_completed(turn, told.get(turn.turn, {})) for turn in self.sessions[name].turns),
            events=tuple(report.get("events") or ()),
            training=report.get("training"),
        )

    async def _poll(
        self, name: str, done: Callable[[Mapping[str, Any]], bool], limit_s: float
    ) -> Mapping[str, Any] | None:
        """The session's report, once `done` holds or `limit_s` seconds are over; None if there is none."""
        from openai import NotFoundError

        end = time.monotonic() + limit_s
        url = f"{self._root}/soma/sessions/{self.sessions[name].session}"
        while True:
            try:
                report = await self._client.get(url, cast_to=object)
            except NotFoundError:
                return None
            if not isinstance(report, dict):
                raise EngineError(
                    f"GET /soma/sessions: found a {type(report).__name__}; expected a JSON object"
                )
            self._update(name, phase=report.get("phase") or self.sessions[name].phase)
            remaining = end - time.monotonic()
            if done(report) or remaining <= 0:
                return report
            await asyncio.sleep(min(self._script.poll_s, remaining))

    def _update(self, name: str, **changes: Any) -> None:
        self.sessions[name] = replace(self.sessions[name], **changes)
        self._changed(self.sessions[name])


def _completed(turn: TurnRecord, told: Mapping[str, Any]) -> TurnRecord:
    """A turn with what only the server knows: its gap, phase and tokens. Times stay the client's."""
    keys = ("gap", "phase", "prompt_tokens", "cached_tokens", "completion_tokens")
    return replace(turn, **{key: told[key] for key in keys if told.get(key) is not None})


@asynccontextmanager
async def started_server(
    command: Sequence[str], root: str, start_timeout_s: float, say: Callable[[str], None]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a server in a process group of its own while the block runs; ready when `root`/health answers 200.

    Raises:
        EngineUnavailable: another server holds the address; or this one ended, or was not healthy, within
            `start_timeout_s`.
    """
    if await _answers(root):
        raise EngineUnavailable(
            f"found a server at {root} already; expected a free address, or --url {root}/v1"
        )
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        limit=1 << 20,
    )
    printing = asyncio.create_task(_print_lines(process, say))
    try:
        await _healthy(process, root, start_timeout_s)
        yield process
    finally:
        await _stop(process)
        # A grandchild may outlive the server and hold the pipe open.
        await asyncio.wait({printing}, timeout=5.0)
        printing.cancel()


async def _print_lines(process: asyncio.subprocess.Process, say: Callable[[str], None]) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        say(line.decode(errors="replace").rstrip())


async def _healthy(process: asyncio.subprocess.Process, root: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while process.returncode is None:
        if await _answers(root):
            return
        if time.monotonic() > end:
            raise EngineUnavailable(f"soma-serve: not healthy after {timeout_s:.0f} s at {root}/health")
        await asyncio.sleep(HEALTH_POLL_S)
    raise EngineUnavailable(f"soma-serve ended with status {process.returncode} before it was ready")


async def _answers(root: str) -> bool:
    """True when `root`/health answers 200."""
    import httpx

    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as http:
        try:
            return (await http.get(f"{root}/health")).status_code == 200
        except httpx.TransportError:
            return False


async def _stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM to the server alone, which stops its own children; SIGKILL to its group if that does not help."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
    finally:
        # Also when a second Ctrl-C cuts the wait short.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def play_while_alive(player: Player, process: asyncio.subprocess.Process) -> None:
    """Play until the end, or until the server dies.

    Raises:
        EngineUnavailable: the server ended first.
    """
    playing = asyncio.create_task(player.play())
    dying = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({playing, dying}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise EngineUnavailable(f"soma-serve ended with status {process.returncode} during the replay")
        await playing
    finally:
        for task in (playing, dying):
            task.cancel()
        await asyncio.gather(playing, dying, return_exceptions=True)


def write_log(path: Path, config: Config, sessions: Sequence[SessionRecord]) -> dict[str, Any]:
    """Write `soma_log.json` whole or not at all, and return what it holds."""
    log = {
        "config": config.model_dump(mode="json"),
        "sessions": {session.dialogue: session.to_json() for session in sessions},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(log, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
    return log


async def run(
    script: Script, screen: Screen, base_url: str, server: Sequence[str] | None, start_timeout_s: float
) -> tuple[list[SessionRecord], str | None]:
    """Play a script, against a server started for it if a command is given.

    Returns:
        Every dialogue's record, and why the replay ended early, if it did.
    """
    from openai import AsyncOpenAI

    root = base_url.rstrip("/").removesuffix("/v1")
    client = AsyncOpenAI(base_url=f"{root}/v1", api_key=os.environ.get("OPENAI_API_KEY") or "none")
    player = Player(client, root, script, screen.show)
    # Ended from outside, a server started here must still be stopped: SIGTERM unwinds as Ctrl-C does.
    current = asyncio.current_task()
    assert current is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current.cancel)
    trouble: str | None = None
    try:
        async with client:
            await _drive(player, screen, root, server, start_timeout_s)
    except EngineUnavailable as error:
        trouble = str(error)
    except asyncio.CancelledError:
        trouble = "interrupted"
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
    return list(player.sessions.values()), trouble


async def _drive(
    player: Player, screen: Screen, root: str, server: Sequence[str] | None, start_timeout_s: float
) -> None:
    with screen.live(player.sessions):
        if server is None:
            await player.play()
            return

        def relay(line: str) -> None:
            screen.say(f"server | {line}", style="dim")

        async with started_server(server, root, start_timeout_s, relay) as process:
            await play_while_alive(player, process)


def replay(
    config: Annotated[Path, typer.Option(help="Configuration of the server.")],
    dialogues: Annotated[Path, typer.Option(help='JSON file {"id": ["user turn 1", ...]}.')],
    out: Annotated[Path, typer.Option(help="Directory for soma_log.json and timeline.png.")],
    url: Annotated[
        str | None,
        typer.Option(help="A running server, such as http://127.0.0.1:8000/v1. Without it one is started."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the configuration; repeatable.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Dialogues under way at once.")] = 3,
    think_time: Annotated[float, typer.Option(min=0, help="Seconds a user waits between turns.")] = 0.0,
    pause_after_warm_start: Annotated[
        float,
        typer.Option(
            min=0,
            help="After the warm start the user reads, for at most this many seconds, until the session is no "
            "longer adapting. It stands for reading time on a slow machine, where training takes longer than "
            "a few turns; no user ever waits for training.",
        ),
    ] = 0.0,
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
    screen = Screen(Console())
    resolved, script = _prepare(
        config,
        dialogues,
        overrides or [],
        only=only or [],
        limit_turns=limit_turns,
        force_adapter=force_adapter or [],
        concurrency=concurrency,
        think_s=think_time,
        pause_s=pause_after_warm_start,
    )
    for name in sorted(script.forced):
        screen.say(f"{name}: forced to its adapter, whatever the gate decides", style="yellow")
    host = "127.0.0.1" if resolved.server.host == "0.0.0.0" else resolved.server.host
    base_url = url or f"http://{host}:{resolved.server.port}/v1"
    server = None if url else _serve_command(config, overrides or [])
    # Both engines start within this time, one after the other.
    start_timeout_s = 2 * resolved.original.start_timeout_s
    sessions, trouble = asyncio.run(run(script, screen, base_url, server, start_timeout_s))
    log = write_log(out / "soma_log.json", resolved, sessions)
    if any(session.turns for session in sessions):
        from soma_vllm.cli import timeline  # matplotlib takes a second to load

        timeline.draw(log, out / "timeline.png")
    _report(screen, sessions, trouble, expect or [])


def _prepare(config: Path, dialogues: Path, overrides: Sequence[str], **choices: Any) -> tuple[Config, Script]:
    """Read everything, or exit with 2 after printing all that is wrong."""
    problems: list[str] = []
    resolved: Config | None = None
    parsed: Dialogues | None = None
    try:
        resolved = load_config(config, overrides)
    except ConfigError as error:
        problems.append(str(error))
    try:
        parsed = load_dialogues(dialogues)
    except ConfigError as error:
        problems.append(str(error))
    if resolved is not None and parsed is not None:
        try:
            return resolved, make_script("soma replay", parsed, resolved, **choices)
        except SomaError as error:
            problems.append(str(error))
    typer.echo("\n".join(problems), err=True)
    raise typer.Exit(2)


def _serve_command(config: Path, overrides: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "soma_vllm.cli.serve", "--config", str(config)]
    for override in overrides:
        command += ["--set", override]
    return command


def _report(
    screen: Screen, sessions: Sequence[SessionRecord], trouble: str | None, expect: Sequence[Expectation]
) -> None:
    """Print table, summary and what went wrong; exit with 1 if anything did."""
    screen.console.print(view.table(sessions))
    for line in view.summary(sessions):
        screen.say(line)
    missing = view.unmet(expect, sessions)
    for line in ([f"the replay ended early: {trouble}"] if trouble else []) + missing:
        screen.say(line, style="bold red")
    if trouble or missing or any(session.error for session in sessions):
        raise typer.Exit(1)
