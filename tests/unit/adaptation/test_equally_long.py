"""Shadows stand beside answers of their own length: a difference in length is no disagreement."""

from __future__ import annotations

from typing import Any

import pytest
from support.fakes import HashEncoder
from support.services import Build, Services

from soma_vllm.adaptation.shadow_answers import comparable, most_tokens, shadow_tokens
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import Length


async def played(build: Build, turns: int, limit: int | None, **changes: Any) -> Services:
    services = build(**changes)
    await services.registry.start()
    history: list[dict[str, Any]] = []
    extra = {} if limit is None else {"max_tokens": limit}
    for number in range(1, turns + 1):
        await services.say(history, f"question {number}", **extra)
        await services.settled()
    return services


def shadows(services: Services) -> list[int]:
    """Tokens that each shadow on either engine was given, prefills aside."""
    calls = [*services.surrogate.calls, *services.original.calls]
    given = [call.body["max_tokens"] for call in calls if call.background]
    return [tokens for tokens in given if tokens != 1]


@pytest.mark.parametrize(("limit", "given"), [(5, 5), (5000, 200), (None, 200)])
async def test_held_out_answers_and_audits_get_what_the_client_allowed(
    build: Build, limit: int | None, given: int
) -> None:
    services = await played(build, 3, limit, gate={"audit_rate": 1.0}, max_new_tokens=200)
    assert services.session().phase is Phase.SWITCHED
    assert "audited" in services.kinds()
    assert len(shadows(services)) >= 2
    assert set(shadows(services)) == {given}


async def test_of_an_answer_longer_than_a_shadow_may_be_the_beginning_is_compared(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = build(max_new_tokens=4)
    await services.registry.start()
    services.original.answers = ["one two three four five six seven"]  # eight tokens with its end
    compared: list[str] = []
    encode = HashEncoder.encode

    async def heard(self: HashEncoder, texts: list[str]) -> Any:
        compared.extend(texts)
        return await encode(self, texts)

    monkeypatch.setattr(HashEncoder, "encode", heard)
    history: list[dict[str, Any]] = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    assert "one two three fou" in compared
    assert services.original.answers[0] not in compared


def test_an_answer_that_fits_is_compared_whole() -> None:
    assert comparable("a b c", Length(3, None), 3) == "a b c"
    assert comparable("a b c", Length(None, 2), 2) == "a b c"  # nobody said how long it is
    assert comparable("a b c d", Length(4, None), 2) == "a b "


def test_a_clients_limit_only_lowers_the_configured_one() -> None:
    assert [shadow_tokens(64, Length(None, most)) for most in (None, 8, 64, 1000)] == [64, 8, 64, 64]


def test_either_name_of_the_limit_is_read() -> None:
    assert most_tokens({"max_tokens": 3}) == 3
    assert most_tokens({"max_completion_tokens": 4, "max_tokens": 3}) == 4
    assert most_tokens({"max_completion_tokens": None, "max_tokens": 3}) == 3
    assert most_tokens({}) is None
