"""The pace of a replay: which dialogue asks next, and how long the rest of it will take.

Guarantees: no two dialogues hold one lane, and a free lane goes to the waiter of the lowest rank,
so that a dialogue which comes back goes on before one that has not begun. A `Timekeeper` is pure but for its
clock: from what was expected of the machine and from what is measured during the run, which takes precedence,
it says how much time is left, whether a dialogue may still begin, and how long nothing may happen before a wait
is given up.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from statistics import median

from soma_vllm.tools.replay.replay_view import SessionRecord
from soma_vllm.types import Role

SURROGATES_SHARE = 0.6
"""Share of a session's turns after the warm start that the surrogate is expected to answer, before a verdict
is known; a little less than was seen (docs/experiments), because time that is left over does no harm."""

RECENT_TURNS = 12
"""Turns of an engine that its median is taken over: prompts grow, other dialogues come and go, and the first
turns of a server are slow in a way that says nothing about the others."""

PATIENCE = 6.0
"""A wait is given up once nothing has happened for this many times the longest thing there is."""

LEAST_PATIENCE_S = 60.0
"""Nothing is given up earlier: a process may have been swapped out, or a laptop asleep."""


@dataclass(frozen=True)
class Expected:
    """What is expected of a machine before anything was seen. Seconds, with other dialogues in progress."""

    original_s: float
    """A turn of the original's."""
    surrogate_s: float
    training_s: float
    """An adapter: training, judging, loading."""
    opening_s: float | None = None
    """A dialogue's first turn: its prompt is long and nowhere cached. None: as any other of the original's."""


@dataclass(frozen=True)
class Rules:
    """What the time of a dialogue depends on."""

    warm_window: int
    think_s: float = 0.0
    lanes: int = 1
    """Dialogues under way at once."""
    training_limit_s: float = 900.0
    """The server's own limit: where nothing else is known, no wait is given up earlier."""


def makespan(seconds: Iterable[float], lanes: int) -> float:
    """When the last of several dialogues is over, each going to the first free lane, in their order."""
    busy = [0.0] * lanes
    for one in seconds:
        heapq.heappush(busy, heapq.heappop(busy) + one)
    return max(busy)


class Lanes:
    """Places for dialogues that ask at the same time: a counted lock with ranks. Single event loop."""

    def __init__(self, lanes: int) -> None:
        self._free = lanes
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrival = count()

    @asynccontextmanager
    async def lane(self, rank: int) -> AsyncIterator[None]:
        """Hold a lane while the block runs; the waiter of the lowest `rank` is next."""
        await self.enter(rank)
        try:
            yield
        finally:
            self.leave()

    async def enter(self, rank: int) -> None:
        """Wait for a lane."""
        if self._free > 0:
            self._free -= 1
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._arrival), granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Release a lane."""
        while self._waiting:
            _, _, granted = heapq.heappop(self._waiting)
            if not granted.done():
                granted.set_result(None)
                return
        self._free += 1


class Timekeeper:
    """Watches one replay's time."""

    def __init__(
        self,
        rules: Rules,
        expected: Expected | None = None,
        deadline: float | None = None,
        always: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deadline` is a moment of `clock`, after which only the dialogues of `always` may begin."""
        self._rules = rules
        self._expected = expected
        self._deadline = deadline
        self._always = frozenset(always)
        self._clock = clock
        self._turns: dict[str, deque[float]] = {role: deque(maxlen=RECENT_TURNS) for role in Role}
        self._openings: deque[float] = deque(maxlen=RECENT_TURNS)
        self._slowest = 0.0
        self._trainings: dict[str, float] = {}
        self._last_news = clock()

    def turn(self, engine: str, seconds: float, opening: bool = False) -> None:
        """A turn was answered; `opening`: a dialogue's first."""
        (self._openings if opening else self._turns[engine]).append(seconds)
        self._slowest = max(self._slowest, seconds)
        self.news()

    def training(self, dialogue: str, seconds: float) -> None:
        """A dialogue's training, without its wait for a trainer, took so long."""
        self._trainings[dialogue] = seconds

    def news(self) -> None:
        """Something happened: every wait may go on."""
        self._last_news = self._clock()

    def turn_s(self, engine: Role) -> float | None:
        """Seconds that a turn of `engine` takes; None where nothing is known of either engine."""
        if seen := self._turns[engine]:
            return median(seen)
        other = Role.SURROGATE if engine is Role.ORIGINAL else Role.ORIGINAL
        if self._expected is None:
            seen = self._turns[other] or self._openings
            return median(seen) if seen else None
        mine, others = self._of(engine), self._of(other)
        return mine * median(self._turns[other]) / others if self._turns[other] else mine

    def opening_s(self) -> float | None:
        """Seconds that a dialogue's first turn takes; None where nothing is known."""
        if self._openings:
            return median(self._openings)
        original = self.turn_s(Role.ORIGINAL)
        if original is None or self._expected is None or self._expected.opening_s is None:
            return original
        return original * self._expected.opening_s / self._expected.original_s

    def training_s(self) -> float | None:
        """Seconds that an adapter takes; None where that is not known."""
        if self._trainings:
            return max(self._trainings.values())
        if self._expected is None:
            return None
        original = self.turn_s(Role.ORIGINAL)
        assert original is not None, "something is expected"
        return self._expected.training_s * max(1.0, original / self._expected.original_s)

    def dialogue_s(self, session: SessionRecord) -> float:
        """Seconds that the rest of a dialogue takes, on a lane of its own."""
        done = len(session.turns)
        if session.over or done >= session.planned:
            return 0.0
        original, surrogate, opening = self.turn_s(Role.ORIGINAL), self.turn_s(Role.SURROGATE), self.opening_s()
        if original is None or surrogate is None or opening is None:
            return 0.0
        warm = max(0, min(self._rules.warm_window, session.planned) - done)
        later = session.planned - done - warm
        share = _share(session)
        seconds = warm * original + later * (share * surrogate + (1 - share) * original)
        seconds += 0.0 if done else opening - original
        if session.forced and not session.adapters and session.phase in _BEFORE_THE_VERDICT:
            seconds += self.training_s() or 0.0
        return seconds + self._rules.think_s * (session.planned - done)

    def left_s(self, sessions: Sequence[SessionRecord]) -> float | None:
        """Seconds until the last of the dialogues is over; None where nothing is known yet."""
        if self.turn_s(Role.ORIGINAL) is None:
            return None
        begun = sorted(sessions, key=lambda session: not session.turns)
        return makespan(map(self.dialogue_s, begun), self._rules.lanes)

    def may_begin(self, name: str, sessions: Mapping[str, SessionRecord], begun: Collection[str]) -> bool:
        """Whether a dialogue would be over in time, given all that is under way or will be played anyway.

        A no may become a yes: the pace is known better with every turn.
        """
        if self._deadline is None or name in self._always:
            return True
        others = [
            session
            for session in sessions.values()
            if session.dialogue != name and (session.dialogue in begun or session.dialogue in self._always)
        ]
        left = self.left_s([*others, replace(sessions[name], left_out=False)])
        return left is None or self._clock() + left <= self._deadline

    def patience_s(self, waiting: int) -> float:
        """How long nothing may happen while so many sessions wait for their verdicts."""
        training = self.training_s()
        if training is None:
            return self._rules.training_limit_s * max(1, waiting)
        return max(LEAST_PATIENCE_S, PATIENCE * max(training, self._slowest) * max(1, waiting))

    def nothing_for_s(self) -> float:
        """Seconds since anything happened."""
        return self._clock() - self._last_news

    def _of(self, engine: Role) -> float:
        assert self._expected is not None, "asked where something is expected"
        return self._expected.original_s if engine is Role.ORIGINAL else self._expected.surrogate_s


_BEFORE_THE_VERDICT = ("", "WARM_START", "ADAPTING")


def _share(session: SessionRecord) -> float:
    """Share of a dialogue's later turns that the surrogate will answer."""
    if session.phase in _BEFORE_THE_VERDICT:
        return 1.0 if session.forced else SURROGATES_SHARE
    return 1.0 if session.phase == "SWITCHED" else 0.0
