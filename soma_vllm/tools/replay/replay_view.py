"""A replay as it is recorded and shown: records of turns and sessions, strips, the table, the summary.

Nothing here talks to a server or writes a file. No query or answer is shown; the log alone has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from soma_vllm.tools.command_line import frameless, say
from soma_vllm.types import Role


@dataclass(frozen=True)
class TurnRecord:
    """One turn as the client saw it, completed by what the server knows of it."""

    turn: int
    """1-based index in its session."""
    query: str
    answer: str
    engine: str
    """`X-SOMA-Engine`: original or surrogate."""
    adapter: str | None
    phase: str
    reason: str
    at: float
    """Unix time at which the request was sent, seconds."""
    ttft_s: float | None
    """Seconds to the first piece of the answer, measured by the client."""
    latency_s: float
    """Seconds to the last piece of the answer, measured by the client."""
    gap: float | None = None
    """Filled from the server's report when the turn was audited; in [0, 2]."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class SessionRecord:
    """One dialogue's replay so far."""

    dialogue: str
    session: str
    """Id sent in `X-Session-ID`."""
    planned: int
    """Turns the dialogue has."""
    forced: bool = False
    """True when the client asked for the adapter against the gate's verdict."""
    phase: str = ""
    turns: tuple[TurnRecord, ...] = ()
    events: tuple[Mapping[str, Any], ...] = ()
    training: Mapping[str, Any] | None = None
    error: str | None = None
    """Why the replay of this dialogue ended early."""
    given_up: str | None = None
    """What the client stopped waiting for, and after how long."""
    left_out: bool = False
    """True while there is no time to begin it, and in the end if there never was."""

    @property
    def over(self) -> bool:
        """True when no further turn of it will be played, as far as is known."""
        return self.left_out or self.error is not None or len(self.turns) >= self.planned

    def served_by(self, engine: Role) -> list[TurnRecord]:
        """The turns that `engine` answered."""
        return [turn for turn in self.turns if turn.engine == engine]

    @property
    def switched(self) -> bool:
        """True when the surrogate answered at least one turn."""
        return bool(self.served_by(Role.SURROGATE))

    @property
    def adapters(self) -> list[str]:
        """Adapters that served, in the order of first use."""
        return list(dict.fromkeys(turn.adapter for turn in self.turns if turn.adapter))

    @property
    def rolled_back(self) -> bool:
        """True when the server moved the session back to the original."""
        return any(event.get("kind") == "rolled_back" for event in self.events) or any(
            turn.phase == "ROLLED_BACK" for turn in self.turns
        )

    def to_json(self) -> dict[str, Any]:
        """This session's entry in the log."""
        fields = asdict(self)
        del fields["dialogue"], fields["planned"]
        return fields | {"forced": "adapter" if self.forced else None}


_STYLES = {"O": "blue", "s": "yellow", "A": "green", "l": "magenta", "x": "red"}

LEGEND = (
    "O original · s surrogate · A surrogate with adapter\n"
    "l original, query outside the locality · x original after a roll back"
)
"""What the letters of a strip mean, in lines that fit any terminal the table fits."""


def symbol(turn: TurnRecord) -> str:
    """The turn's letter in the strip; see `LEGEND`."""
    if turn.engine == Role.SURROGATE:
        return "A" if turn.adapter else "s"
    if turn.phase == "ROLLED_BACK":
        return "x"
    return "l" if turn.phase == "SWITCHED" else "O"


def strip(session: SessionRecord) -> str:
    """The session's turns as letters, `!` where it broke off, a dot for each turn to come."""
    done = "".join(symbol(turn) for turn in session.turns)
    broken = "!" if session.error else ""
    return (done + broken).ljust(session.planned, "·")


def table(sessions: Sequence[SessionRecord]) -> Group:
    """One row per dialogue, and what the letters mean; in 80 columns, long names and strips fold."""
    grid = frameless()
    for heading in ("dialogue", "turns"):
        grid.add_column(heading, overflow="fold")
    grid.add_column("phase", no_wrap=True)
    for heading in ("original\nmedian", "surrogate\nmedian", "gap\nmean"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for session in sessions:
        name = Text(session.dialogue)
        if session.forced:
            name.append(" (forced)", style="yellow")
        letters = Text()
        for letter in strip(session):
            letters.append(letter, style=_STYLES.get(letter, "dim"))
        grid.add_row(
            name,
            letters,
            "left out" if session.left_out else session.phase,
            _median_latency(session.served_by(Role.ORIGINAL)),
            _median_latency(session.served_by(Role.SURROGATE)),
            _mean_gap(session.turns),
        )
    return Group(grid, Text(LEGEND, style="dim"))


def summary(sessions: Sequence[SessionRecord]) -> list[str]:
    """What the replay showed, in lines for people."""
    turns = [turn for session in sessions for turn in session.turns]
    by_original = [turn for turn in turns if turn.engine == Role.ORIGINAL]
    by_surrogate = [turn for turn in turns if turn.engine == Role.SURROGATE]
    with_adapter = [turn for turn in by_surrogate if turn.adapter]
    played = [session for session in sessions if not session.left_out]
    lines = [
        f"{len(played)} sessions, {len(turns)} turns: {len(by_original)} by the original, "
        f"{len(by_surrogate)} by the surrogate, {len(with_adapter)} of these with an adapter",
        f"switched: {_names([s for s in sessions if s.switched])}",
        f"served with an adapter: {_names([s for s in sessions if s.adapters])}",
        f"rolled back: {_names([s for s in sessions if s.rolled_back])}",
        f"median latency: original {_median_latency(by_original)}, surrogate {_median_latency(by_surrogate)}",
        f"mean audited gap: {_mean_gap(turns)}",
    ]
    if forced := [session for session in sessions if session.forced]:
        lines.append(f"forced to their adapter, whatever the gate decided: {_names(forced)}")
    if left_out := [session for session in sessions if session.left_out]:
        lines.append(f"left out for want of time: {_names(left_out)}")
    lines += [f"{session.dialogue}: {session.given_up}" for session in sessions if session.given_up]
    lines += [f"{session.dialogue}: broke off: {session.error}" for session in sessions if session.error]
    return lines


def turn_line(session: SessionRecord) -> str:
    """The last turn in one line, for output that is not a terminal."""
    turn = session.turns[-1]
    who = f"{turn.engine} with {turn.adapter}" if turn.adapter else turn.engine
    return f"{session.dialogue} turn {turn.turn}/{session.planned}: {who}, {turn.latency_s:.2f} s, {turn.phase}"


def progress(sessions: Iterable[SessionRecord], left_s: float | None) -> str:
    """How far all dialogues are together, and how much time is left: "23 of 95 turns, about 4 min left"."""
    played = [session for session in sessions if not session.left_out]
    done, planned = sum(len(s.turns) for s in played), sum(s.planned for s in played)
    left = "" if left_s is None or done == planned else f", {duration(left_s)} left"
    return f"{done} of {planned} turns{left}"


def duration(seconds: float) -> str:
    """A duration as one says it: "40 s", "about 3 min"."""
    if seconds < 55:
        return f"{max(10, 10 * round(seconds / 10))} s"
    return f"about {max(1, round(seconds / 60))} min"


def _names(sessions: Sequence[SessionRecord]) -> str:
    return ", ".join(session.dialogue for session in sessions) or "none"


def _median_latency(turns: Sequence[TurnRecord]) -> str:
    return f"{median(turn.latency_s for turn in turns):.2f} s" if turns else "-"


def _mean_gap(turns: Sequence[TurnRecord]) -> str:
    gaps = [turn.gap for turn in turns if turn.gap is not None]
    return f"{fmean(gaps):.3f}" if gaps else "-"


class Screen:
    """The terminal: a live table where there is one, else a line per turn."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.left_s: Callable[[], float | None] = lambda: None
        """Seconds until the replay is over, as far as they are known."""
        self._live: Live | None = None
        self._shown: dict[str, SessionRecord] = {}

    def say(self, text: str, style: str = "") -> None:
        """Print one line above the table."""
        say(self.console, text, style)

    def show(self, session: SessionRecord) -> None:
        """Take over a session's new state."""
        before = self._shown.get(session.dialogue)
        self._shown[session.dialogue] = session
        if self._live is not None:
            self._live.update(self._table())
        elif session.turns and (before is None or len(before.turns) < len(session.turns)):
            self.say(f"{turn_line(session)}  ({progress(self._shown.values(), self.left_s())})")
        elif before is not None and before.phase == "ADAPTING" != session.phase:
            self.say(f"{session.dialogue}: has its verdict, {session.phase}")

    @contextmanager
    def live(self, sessions: Mapping[str, SessionRecord]) -> Iterator[None]:
        """Keep a table of `sessions` at the foot of a terminal while the block runs; print it at the end."""
        self._shown = dict(sessions)
        if self.console.is_terminal:
            with Live(self._table(), console=self.console, refresh_per_second=4, transient=True) as self._live:
                try:
                    yield
                finally:
                    self._live = None
        else:
            yield

    def _table(self) -> Group:
        shown = list(self._shown.values())
        return Group(table(shown), Text(progress(shown, self.left_s()), style="bold"))
