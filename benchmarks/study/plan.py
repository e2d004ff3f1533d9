"""What the study plays, in which order: a pure function of dialogues, options and a seed.

Guarantees: within a repeat every arm meets the same dialogues, arrivals and think times; the order of the
arms is drawn anew for each repeat; every session has an id and an API key of its own, so that none meets
another's cache.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
    policies: tuple[str, ...] = ()
    """Who is asked for each turn; none: the block's arm by its name."""

    def policy(self, number: int, arm: str) -> str:
        """Who is asked for a turn, 1-based."""
        return self.policies[number - 1] if self.policies else arm


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
    dialogues: Dialogues,
    arms: Sequence[str],
    repeats: int,
    load: Load,
    seed: int,
    run: str,
    in_turn: bool = False,
) -> list[Block]:
    """All blocks in the order of play; `run` keeps the sessions of one run apart from any other's.

    `in_turn`: each repeat plays the next `load.sessions` dialogues, so that all have their turn; else all
    repeats play the same.
    """
    names = list(dialogues)
    random.Random(f"{seed}/dialogues").shuffle(names)
    blocks = []
    for repeat, arms_now in enumerate(order(arms, repeats, seed)):
        first = repeat * load.sessions if in_turn else 0
        chosen = [names[(first + number) % len(names)] for number in range(load.sessions)]
        for arm in arms_now:
            visits = _visits(dialogues, chosen, load, seed, repeat, f"{run}-{arm}-{repeat}")
            blocks.append(Block(repeat, arm, tuple(visits)))
    return blocks


def quicker(block: Block, factor: float, suffix: str) -> Block:
    """The same sessions arriving `factor` times as often."""
    visits = (
        replace(visit, session=f"{visit.session}-{suffix}", arrives_s=visit.arrives_s / factor)
        for visit in block.visits
    )
    return replace(block, visits=tuple(visits))


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
