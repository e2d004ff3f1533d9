"""Answers that are never returned to clients: what the surrogate would have said, for acceptance and audits.

Guarantee: what is compared is equally long. A shadow answer gets no more tokens than the client allowed for the
answer it is compared with; of an answer longer than `max_new_tokens` the beginning is compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from soma_vllm.adaptation.threaded_encoder import Encoder
from soma_vllm.adaptation.threaded_judge import Judge
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.engines.engine import AdapterEngine, ChatCall, Engine
from soma_vllm.engines.reply_parser import Choice, parse_body
from soma_vllm.errors import EngineError
from soma_vllm.sessions.state.gate import centroid
from soma_vllm.types import AdapterRef, Length


def most_tokens(body: Mapping[str, Any]) -> int | None:
    """The longest answer that a request allows, tokens; None where it does not say."""
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


async def shadow_reply(
    engine: Engine, tenant: str, asked: Mapping[str, Any], max_tokens: int, adapter: AdapterRef | None = None
) -> Choice:
    """The engine's greedy answer to a chat request, in words or calls of tools.

    Raises:
        EngineError: it did not answer.
    """
    body = {**asked, "max_tokens": max_tokens, "temperature": 0.0}
    reply = await engine.chat(ChatCall(body, adapter, tenant, background=True))
    assert reply.body is not None, "a request without stream=true is answered whole"
    parsed = parse_body(reply.body, time.monotonic())
    if not parsed.complete:
        raise EngineError("the shadow of an answer cannot be read")
    return parsed.choices[0]


async def shadow_answer(
    engine: Engine, tenant: str, asked: Mapping[str, Any], max_tokens: int, adapter: AdapterRef | None = None
) -> str:
    """The words of such an answer, to a request as `types.chat_body` makes it. Raises EngineError."""
    return (await shadow_reply(engine, tenant, asked, max_tokens, adapter)).text


class ShadowAnswers:
    """The surrogate's answers, plain or under an adapter, and their distance from the original's."""

    def __init__(
        self, surrogate: AdapterEngine, adapters: AdapterLifecycle, encoder: Encoder, judge: Judge
    ) -> None:
        self.surrogate = surrogate
        self._adapters = adapters
        self._encoder = encoder
        self._judge = judge

    async def answer(
        self, tenant: str, asked: Mapping[str, Any], max_tokens: int, adapter: AdapterRef | None
    ) -> str:
        """The words of the surrogate's `reply`."""
        return (await self.reply(tenant, asked, max_tokens, adapter)).text

    async def reply(
        self, tenant: str, asked: Mapping[str, Any], max_tokens: int, adapter: AdapterRef | None
    ) -> Choice:
        """The surrogate's greedy answer; an adapter is loaded where need be, and leased until the answer ends.

        Raises:
            EngineError: it did not answer, or the adapter is being retired or does not load.
            AdapterRejected: the adapter is not served as it was trained.
        """
        async with self._adapters.background(adapter):
            return await shadow_reply(self.surrogate, tenant, asked, max_tokens, adapter)

    async def gaps(self, these: Sequence[str], those: Sequence[str]) -> tuple[float, ...]:
        """The gap of each pair of texts, in any order of a pair.

        Raises:
            EngineError: the judge could not judge one of them.
        """
        found = await self._judge.gaps(list(zip(these, those, strict=True)))
        failure = next((gap.failure for gap in found if gap.failure is not None), None)
        if failure is not None:
            raise EngineError(f"the gate's judge failed: {failure}")
        return tuple(gap.value for gap in found)

    async def centroid(self, texts: Sequence[str]) -> list[float]:
        """The centroid of the texts' embeddings, as it is stored."""
        return [round(float(x), 6) for x in centroid(list(await self._encoder.encode(texts)))]
