"""A fake engine for the timing of faults: what no real engine can be made to do at a given moment.

It answers from a script, holds before its first token, breaks after a number of events or refuses, and
records its calls. Of a request it honours `stream`, `n`, `stream_options.include_usage` and `logprobs`, with
made-up values in the form of vLLM's. It keeps the contract of real engines
(tests/support/engine_contract.py); all else that a real engine can show is tested on a real one.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from soma_vllm.engines.engine import ChatCall, Reply
from soma_vllm.errors import EngineError, EngineRefused, EngineUnavailable


class FakeEngine:
    """`Engine` that gives `answers` in turn (then the last one again and again), a word per event."""

    def __init__(self, name: str = "fake", answers: Sequence[str] = ("An answer.",)) -> None:
        self.name = name
        self.answers = list(answers)
        self.calls: list[ChatCall] = []
        self.called = asyncio.Event()
        """Set when a call has arrived."""
        self.go = asyncio.Event()
        """Clear it to hold every call before its first token."""
        self.go.set()
        self.refusal: EngineError | None = None
        """Raised instead of an answer."""
        self.break_after: int | None = None
        """Events after which a stream breaks."""
        self.closed_early = asyncio.Event()
        """Set when a stream was closed, or a call cancelled, before its end."""

    async def chat(self, call: ChatCall) -> Reply:
        """Answer from the script; see `Engine.chat`."""
        answer = self.answers[min(len(self.calls), len(self.answers) - 1)]
        self.calls.append(call)
        self.called.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.closed_early.set()
            raise
        if self.refusal is not None:
            raise self.refusal
        if (choices := call.body.get("n") or 1) > MAX_CHOICES:
            message = f"n: found {choices}; expected at most {MAX_CHOICES}"
            raise EngineRefused(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
        if not call.body.get("stream"):
            return Reply(body=self._completion(answer, call.body))
        events = self._stream(answer, call.body, self.break_after)
        await anext(events)  # so that closing it before the first event is noticed too
        return Reply(events=events)

    def _completion(self, answer: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answers = _choices(answer, body)
        return {
            "id": "chatcmpl-fake",
            "object": "chat.completion",
            "created": 0,
            "model": self.name,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": _logprobs([*text.split(), _END], body),
                    "finish_reason": "stop",
                }
                for index, text in enumerate(answers)
            ],
            "usage": _usage(answers),
        }

    async def _stream(
        self, answer: str, body: Mapping[str, Any], break_after: int | None
    ) -> AsyncGenerator[str, None]:
        """Yields "" to begin, then the events."""
        finished = False
        try:
            yield ""
            answers = _choices(answer, body)
            chunks = [chunk for index, text in enumerate(answers) for chunk in _chunks(index, text, body)]
            for count, chunk in enumerate(chunks):
                if count == break_after:
                    finished = True
                    raise EngineUnavailable(f"{self.name} broke after {count} events")
                yield self._event([chunk])
            if (body.get("stream_options") or {}).get("include_usage"):
                yield self._event([], usage=_usage(answers))
            finished = True
            yield "data: [DONE]\n\n"
        finally:
            if not finished:
                self.closed_early.set()

    def _event(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> str:
        chunk = {
            "id": "chatcmpl-fake",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": self.name,
            "choices": choices,
            **more,
        }
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


MAX_CHOICES = 128
"""Most choices of one reply, as OpenAI's API has it; vLLM has a limit too (VLLM_MAX_N_SEQUENCES)."""

_END = "<end>"


def _choices(answer: str, body: Mapping[str, Any]) -> list[str]:
    """One answer for each of the request's `n` choices."""
    return [answer, *(f"{answer}, or {index}" for index in range(1, body.get("n") or 1))]


def _chunks(index: int, answer: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A choice of each event of one streamed answer: its role, then a word each."""
    *words, last = answer.split(" ")
    found = [_chunk(index, {"role": "assistant", "content": ""}, None)]
    found += [_chunk(index, {"content": f"{word} "}, _logprobs([word], body)) for word in words]
    return [*found, _chunk(index, {"content": last}, _logprobs([last, _END], body), "stop")]


def _chunk(
    index: int, delta: Mapping[str, Any], shown: Mapping[str, Any] | None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish_reason}


def _usage(answers: Sequence[str]) -> dict[str, int]:
    """One prompt token, and one token a word and an end."""
    tokens = sum(len(answer.split()) + 1 for answer in answers)
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}


def token_of(word: str) -> int:
    """The id of a word in the fake's vocabulary."""
    return zlib.crc32(word.encode()) % 1000


def _logprobs(words: Sequence[str], body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Made-up log-probabilities of these words, each its own likeliest; None where none were asked for."""
    if not body.get("logprobs"):
        return None
    by_id = bool(body.get("return_tokens_as_token_ids"))
    content = []
    for word in words:
        tops = [
            {
                "token": f"token_id:{token_of(word) + rank}" if by_id else word,
                "logprob": -0.5 - rank,
                "bytes": None,
            }
            for rank in range(body.get("top_logprobs") or 0)
        ]
        token = f"token_id:{token_of(word)}" if by_id else word
        content.append({"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": tops})
    return {"content": content}
