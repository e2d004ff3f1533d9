"""`acceptance_min_turns`, from the configuration to the verdict."""

from __future__ import annotations

from typing import Any

import pytest
from support.services import SETTINGS, Build

from soma_vllm.sessions.state.phases import Phase


async def test_the_gate_judges_on_as_many_held_out_turns_as_configured(build: Build) -> None:
    services = build(warm_window=4, acceptance_min_turns=2)
    await services.registry.start()
    # Right on one held-out turn and wrong on the other: one turn alone would accept it.
    services.surrogate.answers = ["same", "same", "different", "same"]
    history: list[dict[str, Any]] = []
    for number in range(1, 5):
        await services.say(history, f"question {number}")
    await services.settled()
    (request,) = services.trainer.requests
    assert [example.turn for example in request.examples] == [1, 2]
    assert [example.turn for example in request.held_out] == [3, 4]
    (judged,) = [event.data for _, event in services.events if event.kind == "judged"]
    numbers = judged["numbers"]
    assert numbers["min_turns"] == 2
    assert {name: scored["turns"] for name, scored in numbers["candidates"].items()} == {
        "plain": [3, 4],
        "adapter": [3, 4],
    }
    assert "gap 0.500 above" in numbers["candidates"]["plain"]["failure"]
    assert services.session().phase is Phase.SWITCHED
    assert numbers["warm"]["turns"] == [1, 2, 3, 4]


@pytest.mark.parametrize("min_gain", [0.1, 0.0])
async def test_an_adapter_of_no_steps_is_published_only_where_it_might_serve(
    build: Build, min_gain: float
) -> None:
    services = build(gate={**SETTINGS["gate"], "min_gain": min_gain})
    await services.registry.start()
    services.trainer.adapted, services.trainer.steps = services.trainer.plain, 0
    services.surrogate.answers = ["different"]
    history: list[dict[str, Any]] = []
    for number in range(1, 3):
        await services.say(history, f"question {number}")
    await services.settled()
    (judged,) = [event.data for _, event in services.events if event.kind == "judged"]
    assert judged["candidate"] == "original"
    assert set(judged["numbers"]["candidates"]) == {"plain", "adapter"}
    published = [event for _, event in services.events if event.kind == "adapter_published"]
    assert bool(published) is (min_gain == 0.0)
