"""Takes the log-probabilities that we asked for off a vLLM's reply, on its way to the client.

Guarantees:

* The client gets what it would have got: a stream's text is cut where the log-probabilities stand and is
  otherwise the same bytes; a whole reply has the same fields.
* Only requests of plain, known fields are added to. Any other, and one that asks for log-probabilities itself,
  is to go out as it came.
* A teacher is only made of a complete answer, and its tokens spell that answer.
* A reply of an unexpected form goes on as it came, and makes no teacher.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soma_vllm.engines.engine import Reply
from soma_vllm.engines.logprobs import teacher_from_logprobs
from soma_vllm.engines.reply_parser import ParsedReply
from soma_vllm.engines.stream_tap import StreamTap
from soma_vllm.errors import EngineError
from soma_vllm.types import Teacher

_PROMPT = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "cache_salt"}
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed"}
_PENALTIES = {"presence_penalty", "frequency_penalty", "repetition_penalty"}
_LABELS = {"user", "metadata", "store", "service_tier", "session_id", "priority"}

PLAIN_FIELDS = frozenset(_PROMPT | _SAMPLING | _PENALTIES | _LABELS)
"""Fields under which every generated token is a token of the answer, and log-probabilities are the model's own
(vLLM takes them before temperature and penalties)."""

ABSENT: Mapping[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "stop": [],
    "tools": [],
    "echo": False,
}
"""Values of other fields that say the same as leaving them out; null always does."""

Spelling = Callable[[Sequence[int], str], int | None]
"""How many of an answer's tokens, from the first, spell its text; None where they do not."""

_LOGPROBS = re.compile(r'"logprobs"\s*:\s*(?=\{)')
"""Where log-probabilities begin in an event. Inside a JSON string its quotes would be escaped."""

_OTHER_CONTENT = ("reasoning", "reasoning_content", "tool_calls")
"""Fields of a message whose tokens are not of the answer's text."""

_HAS_OTHER_CONTENT = re.compile(rf'"(?:{"|".join(_OTHER_CONTENT)})"\s*:\s*["\[]')
"""The same in an event."""

_DECODER = json.JSONDecoder()


def can_be_added_to(body: Mapping[str, Any]) -> bool:
    """Whether log-probabilities may be asked for in a request without the client's noticing."""
    return all(
        name in PLAIN_FIELDS or value is None or (name in ABSENT and value == ABSENT[name])
        for name, value in body.items()
    )


class LogprobCapture:
    """The log-probabilities of one reply."""

    def __init__(self) -> None:
        self._parts: list[Teacher] = []
        self._usable = True

    def take_off(self, reply: Reply) -> Reply:
        """The reply as the client would have got it; what is taken off is kept here as it passes."""
        if reply.events is not None:
            return replace(reply, events=StreamTap(reply.events, on_event=self._unbroken(self.strip_event)))
        assert reply.body is not None
        return replace(reply, body=self._unbroken(self.strip_body)(reply.body))

    def strip_body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole completion without its log-probabilities."""
        choices = []
        for choice in body.get("choices") or ():
            self._keep(choice.get("logprobs"))
            message = choice.get("message") or {}
            self._usable = self._usable and not any(message.get(name) for name in _OTHER_CONTENT)
            choices.append({**choice, "logprobs": None})
        return {**body, "choices": choices}

    def strip_event(self, event: str) -> str | None:
        """An event without its log-probabilities; None for one that carried nothing else."""
        found = _LOGPROBS.search(event)
        if found is None:
            return event
        try:
            logprobs, end = _DECODER.raw_decode(event, found.end())
        except ValueError:
            self._usable = False
            return event
        self._keep(logprobs)
        bare = f"{event[: found.end()]}null{event[end:]}"
        self._usable = self._usable and not _HAS_OTHER_CONTENT.search(bare)
        # vLLM sends such an event for the sake of its log-probabilities alone.
        return None if '"delta":{},' in bare and '"finish_reason":null' in bare else bare

    def teacher(self, reply: ParsedReply, spelling: Spelling) -> Teacher | None:
        """The teacher of a finished answer; None unless all of it was captured and the tokens spell it."""
        if not (self._usable and self._parts and reply.complete):
            return None
        tokens = tuple(token for part in self._parts for token in part.tokens)
        if reply.usage.completion_tokens not in (None, len(tokens)):
            return None
        count = spelling(tokens, reply.text)
        if not count:
            return None
        top = _stack([part.top for part in self._parts], -1)
        logprobs = _stack([part.logprobs for part in self._parts], -np.inf)
        return Teacher(tokens[:count], top[:count].copy(), logprobs[:count].copy())

    def _unbroken(self, strip: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The same, but for what it fails on: that it returns as it is."""

        def stripped(said: Any) -> Any:
            try:
                return strip(said)
            except Exception:  # whatever an endpoint writes
                self._usable = False
                return said

        return stripped

    def _keep(self, logprobs: Mapping[str, Any] | None) -> None:
        content = (logprobs or {}).get("content")
        if not content:
            return
        try:
            self._parts.append(teacher_from_logprobs(content))
        except (EngineError, LookupError, TypeError, ValueError):
            # An endpoint that writes them otherwise than vLLM does: its text still teaches.
            self._usable = False


def _stack(parts: Sequence[NDArray[Any]], padding: float) -> NDArray[Any]:
    """Arrays of shape (n_i, k_i) as one of shape (sum of n_i, largest k_i)."""
    width = max(part.shape[1] for part in parts)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=padding) for p in parts]
    return np.concatenate(padded)
