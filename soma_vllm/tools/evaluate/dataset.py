"""A played dialogue as the session it would have been: what to train on, what to judge on, what to measure on.

Guarantees: the split and every prompt are the session's own (`Session.examples`); turns after the warm
start are in neither of the first two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from soma_vllm.config import Config
from soma_vllm.errors import TrainingError
from soma_vllm.sessions.state.fold import fold
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn import Turn, turn_event
from soma_vllm.tools.evaluate.trajectory import Trajectory
from soma_vllm.types import Example, Role, SessionKey, Usage


@dataclass(frozen=True)
class Material:
    """One dialogue under one prefix."""

    examples: tuple[Example, ...]
    """Warm turns to train on."""
    held_out: tuple[Example, ...]
    """Warm turns the gate judges on."""
    later: tuple[Example, ...]
    """Turns after the warm start, in order."""
    cut: frozenset[int]
    """Numbers of turns whose answer ended at the limit."""


def least_turns(config: Config) -> int:
    """Turns a dialogue needs: the warm start, and one to measure on."""
    return config.warm_window + 1


def split_by_length(
    dialogues: Mapping[str, tuple[str, ...]], config: Config
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """(dialogues long enough to be measured, a line about each of the others)."""
    least = least_turns(config)
    enough = {name: turns for name, turns in dialogues.items() if len(turns) >= least}
    short = [
        f"{name}: found {len(turns)} turns; expected at least {least}, one more than warm_window"
        for name, turns in dialogues.items()
        if name not in enough
    ]
    return enough, short


def material(trajectory: Trajectory, config: Config) -> Material:
    """The session of a trajectory under the configuration's prefix.

    Raises:
        TrainingError: the original gave too few answers to train, judge and measure on.
    """
    session = _session(trajectory, config)
    found = material_of_session(session, config)
    if found is None or not found.later:
        why = trajectory.ended or "answers without words do not count"
        raise TrainingError(
            f"found {len(session.warm_turns())} answers; expected at least {least_turns(config)} ({why})"
        )
    return Material(
        _taught(found.examples, trajectory),
        _taught(found.held_out, trajectory),
        _taught(found.later, trajectory),
        frozenset(number for number, turn in enumerate(trajectory.turns, start=1) if turn.cut),
    )


def material_of_session(session: Session, config: Config) -> Material | None:
    """A session's turns under the configuration's prefix; None if it has too few, or its text was erased."""
    count = len(session.warm_turns())
    if count < config.warm_window or not session.kept():
        return None
    # A warm window over the whole session gives the prompt of every turn as the session itself makes it.
    whole = config.model_copy(update={"warm_window": count, "acceptance_min_turns": 1})
    first, last = session.examples(whole)
    every = (*first, *last)
    trained = config.warm_window - config.acceptance_min_turns
    return Material(
        every[:trained], every[trained : config.warm_window], every[config.warm_window :], frozenset()
    )


def _session(trajectory: Trajectory, config: Config) -> Session:
    session = Session(SessionKey("evaluation", "dialogue"))
    for number, played in enumerate(trajectory.turns, start=1):
        turn = Turn(
            number=number,
            messages=({"role": "user", "content": played.query},),
            answer=played.answer,
            engine=Role.ORIGINAL,
            adapter=None,
            phase=Phase.WARM_START,
            reason="evaluation",
            usage=Usage(),
            ttft_s=None,
            latency_s=0.0,
        )
        session = fold(session, turn_event(turn, number - 1, 0.0), config.gate)
    return session


def _taught(examples: Sequence[Example], trajectory: Trajectory) -> tuple[Example, ...]:
    return tuple(replace(e, teacher=trajectory.turns[e.turn - 1].teacher) for e in examples)


def drop_foreign_teachers(examples: Sequence[Example], tokenizer: Any) -> tuple[Example, ...]:
    """The examples without the teachers whose tokens do not spell their answer in this vocabulary."""
    return tuple(e if _spells(e, tokenizer) else replace(e, teacher=None) for e in examples)


def _spells(example: Example, tokenizer: Any) -> bool:
    if example.teacher is None:
        return False
    said = tokenizer.decode(list(example.teacher.tokens), skip_special_tokens=True)
    return bool(said.strip() == example.answer.strip())
