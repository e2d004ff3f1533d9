"""Comparing a history with a record takes time in proportion to both: steps are counted, not seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from soma_vllm.config import Config
from soma_vllm.sessions.state.answer_print import HeardAnswer
from soma_vllm.sessions.state.fold import fold
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session, fresh
from soma_vllm.sessions.state.transcript import read
from soma_vllm.sessions.state.turn import Turn, turn_event
from soma_vllm.types import Role, SessionKey, Usage

KEY = SessionKey("t", "s")
Messages = list[dict[str, Any]]


def steps(work: Callable[[], object]) -> int:
    """Lines of this package that run."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if "soma_vllm" not in frame.f_code.co_filename:
            return None
        count += 1
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def session(turns: int, answer: Callable[[int], str] = lambda n: f"a{n}") -> tuple[Session, Messages]:
    """A session of so many turns, and its history."""
    found, history = fresh(KEY), []
    for number in range(1, turns + 1):
        asked = {"role": "user", "content": f"q{number}"}
        said = {"role": "assistant", "content": answer(number)}
        history += [asked, said]
        heard = HeardAnswer("t", said)
        link = read("t", history[-2:]).marks[-1].link
        turn = Turn(
            number, (asked,), answer(number), Role.ORIGINAL, None, Phase.WARM_START, "", Usage(), None, 0.0
        )
        event = turn_event(turn, number - 1, 0.0)
        data = {**event.data, "chain": f"{number}", "links": [link], "said": str(heard.print)}
        found = fold(found, type(event)(event.kind, 0.0, data, event.text), Config().gate)
    return found, history


def exchanges(count: int, answer: str = "b") -> Messages:
    return [
        message
        for number in range(count)
        for message in ({"role": "user", "content": str(number)}, {"role": "assistant", "content": answer})
    ]


def one_turn(size: int) -> tuple[Session, Messages]:
    return session(1)[0], exchanges(size)


def equal_answers(size: int) -> tuple[Session, Messages]:
    return session(size, lambda n: "same")[0], exchanges(size, "same")


def reversed_history(size: int) -> tuple[Session, Messages]:
    found, history = session(size)
    return found, history[::-1]


def trimmed_history(size: int) -> tuple[Session, Messages]:
    found, history = session(size)
    return found, [*history[: size // 2 * 2 // 2], *history[size:]]


def reworded_history(size: int) -> tuple[Session, Messages]:
    found, history = session(size)
    return found, [{**m, "content": f"{m['content']}\n\n[1] source"} for m in history]


WAYS = [one_turn, equal_answers, reversed_history, trimmed_history, reworded_history]


@pytest.mark.parametrize("way", WAYS)
def test_twice_the_history_takes_twice_the_steps(way: Callable[[int], tuple[Session, Messages]]) -> None:
    def counted(size: int) -> int:
        found, history = way(size)
        request = [*history, {"role": "user", "content": "next"}]
        return steps(lambda: found.continued_by(read("t", request)))

    small, large = counted(200), counted(800)
    assert large < 4.4 * small
