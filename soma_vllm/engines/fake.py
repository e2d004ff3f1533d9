"""A fake engine for the timing of faults: what no real engine can be made to do at a given moment.

It answers from a script, holds before its first token, breaks after n events or refuses, and records the
calls it got. Asked for log-probabilities it makes some up, written as vLLM writes them. Everything that a real
engine can show is tested on a real one.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from soma_vllm.engines.engine import ChatCall, Reply
from soma_vllm.errors import EngineError, EngineUnavailable


class FakeEngine:
    """`Engine` that answers `answers` in turn (the last one for ever), a word per event."""

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
        if not call.body.get("stream"):
            return Reply(body=self._completion(answer, call.body))
        events = self._stream(answer, call.body, self.break_after)
        await anext(events)  # so that closing it before the first event is noticed too
        return Reply(events=events)

    def _completion(self, answer: str, body: Mapping[str, Any]) -> dict[str, Any]:
        tokens = [*answer.split(), _END]
        return {
            "id": "chatcmpl-fake",
            "object": "chat.completion",
            "created": 0,
            "model": self.name,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": answer},
                    "logprobs": _logprobs(tokens, body),
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": 1,
                "completion_tokens": len(tokens),
                "total_tokens": len(tokens) + 1,
            },
        }

    async def _stream(
        self, answer: str, body: Mapping[str, Any], break_after: int | None
    ) -> AsyncGenerator[str, None]:
        """Yields "" to begin, then the events."""
        finished = False
        try:
            yield ""
            pieces = [piece + " " for piece in answer.split(" ")]
            pieces[-1] = pieces[-1][:-1]
            deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
            deltas += [{"content": piece} for piece in pieces]
            for count, delta in enumerate(deltas):
                if count == break_after:
                    finished = True
                    raise EngineUnavailable(f"{self.name} broke after {count} events")
                last = count == len(deltas) - 1
                tokens = [delta["content"].strip(), _END][: 2 if last else 1]
                shown = _logprobs(tokens, body) if count else None
                yield self._event(delta, shown, "stop" if last else None)
            finished = True
            yield "data: [DONE]\n\n"
        finally:
            if not finished:
                self.closed_early.set()

    def _event(self, delta: dict[str, Any], shown: dict[str, Any] | None, finish_reason: str | None) -> str:
        chunk = {
            "id": "chatcmpl-fake",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": self.name,
            "choices": [{"index": 0, "delta": delta, "logprobs": shown, "finish_reason": finish_reason}],
        }
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


_END = "<end>"


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
