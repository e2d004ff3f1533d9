"""What the study plays, in which order: a pure function of dialogues, options and a seed.

Guarantees: within a repeat every arm meets the same dialogues, arrivals and think times; the order of the
arms is drawn anew for each repeat; every session has an id and an API key of its own, so that none meets
another's cache.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Dialogues = Mapping[str, Sequence[str]]

SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ra", "su", "ti", "vo", "we", "xi", "zu")


@dataclass(frozen=True)
class Load:
    """How users behave."""

    sessions: int
    """Sessions of a block."""
    arrival_s: float
    """Mean seconds between two arrivals of sessions; exponential, whatever the server does meanwhile."""
    think_s: float
    """Mean seconds between an answer and the next turn; exponential."""


@dataclass(frozen=True)
class Visit:
    """One session to be played."""

    session: str
    """Its `X-Session-ID`, and what its API key is made of."""
    dialogue: str
    turns: tuple[str, ...]
    arrives_s: float
    """Seconds after its block's begin."""
    thinks_s: tuple[float, ...]
    """Seconds before each turn but the first."""


@dataclass(frozen=True)
class Block:
    """One arm in one repeat: it has the server to itself."""

    repeat: int
    arm: str
    visits: tuple[Visit, ...]

    @property
    def planned(self) -> int:
        """Turns."""
        return sum(len(visit.turns) for visit in self.visits)


def order(arms: Sequence[str], repeats: int, seed: int) -> list[list[str]]:
    """The order of the arms in each repeat."""
    return [random.Random(f"{seed}/order/{repeat}").sample(arms, len(arms)) for repeat in range(repeats)]


def plan(
    dialogues: Dialogues, arms: Sequence[str], repeats: int, load: Load, seed: int, run: str
) -> list[Block]:
    """All blocks in the order of play; `run` keeps the sessions of one run apart from any other's."""
    names = list(dialogues)
    random.Random(f"{seed}/dialogues").shuffle(names)
    chosen = [names[number % len(names)] for number in range(load.sessions)]
    return [
        Block(repeat, arm, tuple(_visits(dialogues, chosen, load, seed, repeat, f"{run}-{arm}-{repeat}")))
        for repeat, arms_now in enumerate(order(arms, repeats, seed))
        for arm in arms_now
    ]


def _visits(
    dialogues: Dialogues, chosen: Sequence[str], load: Load, seed: int, repeat: int, prefix: str
) -> Iterator[Visit]:
    draw = random.Random(f"{seed}/times/{repeat}")
    at = 0.0
    for number, name in enumerate(chosen):
        turns = tuple(dialogues[name])
        thinks = tuple(_exponential(draw, load.think_s) for _ in turns[1:])
        yield Visit(f"{prefix}-{number}", name, turns, at, thinks)
        at += _exponential(draw, load.arrival_s)


def _exponential(draw: random.Random, mean: float) -> float:
    return draw.expovariate(1.0 / mean) if mean > 0 else 0.0


def synthetic(sessions: int, turns: int, words: int, seed: int) -> dict[str, tuple[str, ...]]:
    """Dialogues of made-up words where only lengths matter: `turns` queries of `words` words each."""
    draw = random.Random(f"{seed}/words")

    def query() -> str:
        return " ".join("".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(words))

    return {f"synthetic-{number}": tuple(query() for _ in range(turns)) for number in range(sessions)}
