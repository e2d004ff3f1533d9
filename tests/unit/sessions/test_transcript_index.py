"""Finding a live session takes as many steps however many dialogues begin alike."""

from __future__ import annotations

import sys
from typing import Any

from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn import Turn, turn_event
from soma_vllm.sessions.transcript_index import TranscriptIndex
from soma_vllm.types import Role, SessionKey, Usage

LIMIT = 5


def alike(index: TranscriptIndex, number: int) -> SessionKey:
    """A session that begins, and stands, where all others do."""
    turn = Turn(
        number=1,
        messages=(),
        answer="hi",
        engine=Role.ORIGINAL,
        adapter=None,
        phase=Phase.WARM_START,
        reason="",
        usage=Usage(),
        ttft_s=None,
        latency_s=0.0,
        chain="popular",
        asked="popular",
        said="2:words:",
    )
    key = SessionKey("t", f"s{number}")
    index.observe(Session(key, turns=(turn,)), 0, [turn_event(turn, 0, 1.0)])
    return key


def steps(index: TranscriptIndex) -> int:
    """Calls of a lookup, and of a drop."""
    counted = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    key = alike(index, 10**6)
    sys.setprofile(count)
    try:
        found, _ = index.find("t", "", ["longer", "popular"], LIMIT)
        index.ending("t", "", ["words"], LIMIT)
        index.drop(key)
    finally:
        sys.setprofile(None)
    assert 0 < len(found) <= 2 * LIMIT
    return counted


def test_a_lookup_and_a_drop_take_no_more_steps_among_thousands_that_begin_alike() -> None:
    index = TranscriptIndex()
    for number in range(20 * LIMIT):  # more than a lookup looks at
        alike(index, number)
    among_few = steps(index)
    for number in range(20 * LIMIT, 3000):
        alike(index, number)
    assert steps(index) == among_few


def test_nothing_is_left_of_sessions_that_were_dropped() -> None:
    index = TranscriptIndex()
    for key in [alike(index, number) for number in range(50)]:
        index.drop(key)
    assert index.find("t", "", ["popular"], LIMIT)[0] == []
    assert index.asked_by("t", "", "popular") is None
    left = {name: held for name, held in vars(index).items() if held}
    assert left == {}
