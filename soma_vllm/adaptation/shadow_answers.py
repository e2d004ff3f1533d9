"""Answers that no user sees: what an engine would have said, for acceptance and audits.

Guarantee: what is compared is equally long. A shadow is given no more tokens than the client allowed for the
answer it stands beside; of an answer longer than a shadow may be (`max_new_tokens`) the beginning is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from soma_vllm.adaptation.threaded_encoder import Encoder
from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.engines.engine import AdapterEngine, ChatCall, Engine
from soma_vllm.sessions.state.gate import gap
from soma_vllm.types import AdapterRef, Length, Message


def most_tokens(body: Mapping[str, Any]) -> int | None:
    """The longest answer that a request allows; None where it does not say."""
    given = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    return next((found for found in given if isinstance(found, int)), None)


def shadow_tokens(most: int, length: Length) -> int:
    """Tokens for the shadow of an answer, where a shadow may have `most`."""
    return most if length.most is None else min(most, length.most)


def comparable(answer: str, length: Length, tokens: int) -> str:
    """As much of an answer as a shadow of so many tokens has."""
    if length.tokens is None or length.tokens <= tokens:
        return answer
    return answer[: math.ceil(len(answer) * tokens / length.tokens)]


async def shadow_answer(
    engine: Engine, tenant: str, messages: Sequence[Message], max_tokens: int, adapter: AdapterRef | None = None
) -> str:
    """The engine's greedy answer to a prompt.

    Raises:
        EngineError: it did not answer.
    """
    body: dict[str, Any] = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0.0}
    reply = await engine.chat(ChatCall(body, adapter, tenant, background=True))
    assert reply.body is not None, "a request without stream=true is answered whole"
    return str(reply.body["choices"][0]["message"].get("content") or "")


async def adapted_answer(
    engine: AdapterEngine,
    leases: AdapterLeases,
    tenant: str,
    messages: Sequence[Message],
    max_tokens: int,
    adapter: AdapterRef | None,
) -> str:
    """The same under an adapter, which is loaded where need be and stays in the engine meanwhile.

    Raises:
        EngineError: it did not answer, or the adapter is leaving or does not load.
        AdapterRejected: the adapter is not served as it was trained.
    """
    async with leases.shadowing(None if adapter is None else adapter.name):
        if adapter is not None:
            await engine.load(adapter)
        return await shadow_answer(engine, tenant, messages, max_tokens, adapter)


async def gaps_between(encoder: Encoder, these: Sequence[str], those: Sequence[str]) -> tuple[float, ...]:
    """The gap of each pair of texts."""
    vectors = await encoder.encode([*these, *those])
    return tuple(gap(a, b) for a, b in zip(vectors[: len(these)], vectors[len(these) :], strict=True))
