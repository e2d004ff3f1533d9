"""The chat completion that a request of OpenAI's Responses API becomes, and what a response takes from it.

Guarantees: pure; every parameter of the request that an engine knows is part of the chat; a response repeats
the parameters of its request.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soma_vllm.api.responses.request import NamedFunction, ResponsesRequest
from soma_vllm.types import Message

CUT_OFF: Mapping[str, str] = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""How an answer ended before it was complete, as a chat completion and as a response say it."""


def chat_body(request: ResponsesRequest, messages: Sequence[Message]) -> dict[str, Any]:
    """The chat completion that answers a request. What was not asked for is not in it."""
    body = {**request.passed, "messages": list(messages)}
    body |= request.given(
        "model", "metadata", "user", "temperature", "top_p", "frequency_penalty", "presence_penalty"
    )
    if not request.store:
        body["store"] = False
    if request.max_output_tokens is not None:
        body["max_completion_tokens"] = request.max_output_tokens
    if (form := request.text.format) is not None and form.type != "text":
        schema = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        body["response_format"] = {"type": form.type} | ({"json_schema": schema} if schema else {})
    if request.text.verbosity not in (None, "medium"):
        body["verbosity"] = request.text.verbosity
    if request.tools:
        functions = (tool.model_dump(exclude={"type"}, exclude_none=True) for tool in request.tools)
        body["tools"] = [{"type": "function", "function": function} for function in functions]
        body |= request.given("tool_choice", "parallel_tool_calls")
        if isinstance(request.tool_choice, NamedFunction):
            body["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.name}}
    if request.reasoning.effort is not None:
        body["reasoning_effort"] = request.reasoning.effort
    if request.wants_logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.truncation == "auto":
        body["truncate_prompt_tokens"] = -1  # vLLM's: drops the oldest tokens
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def new_id(kind: str) -> str:
    """A random id: `kind` is resp, msg, rs, fc or call."""
    return f"{kind}_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Frame:
    """What every state of one response has in common."""

    request: ResponsesRequest
    id: str
    model: str
    stored: bool
    """Whether a later request can continue from it by its id."""
    created_at: int = field(default_factory=lambda: int(time.time()))

    def response(
        self,
        status: str,
        output: Sequence[Mapping[str, Any]] = (),
        usage: Mapping[str, Any] | None = None,
        **details: Any,
    ) -> dict[str, Any]:
        """The `response` object; `usage` is a chat completion's, `details` say why it is no whole answer."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "output": list(output),
            "usage": _usage(usage),
            "store": self.stored,
            **self.request.echoed(),
            **details,
        }

    def failed(self, why: str) -> dict[str, Any]:
        """The response of which nothing came."""
        return self.response("failed", error={"code": "server_error", "message": why})


def text_in(spoken: Mapping[str, Any]) -> str:
    """Text of a chat message or delta. A refusal is an answer, too."""
    return spoken.get("content") or spoken.get("refusal") or ""


def reasoning_in(spoken: Mapping[str, Any]) -> str:
    """Reasoning in a chat message or delta, under vLLM's name for it or the older one."""
    return spoken.get("reasoning") or spoken.get("reasoning_content") or ""


def logprobs_in(choice: Mapping[str, Any]) -> list[Any]:
    """The log-probabilities of a chat completion's choice as a response has them."""
    shown = (choice.get("logprobs") or {}).get("content") or ()
    return [
        {**_token(token), "top_logprobs": [_token(top) for top in token.get("top_logprobs") or ()]}
        for token in shown
    ]


def _token(token: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "token": token.get("token") or "",
        "logprob": token.get("logprob"),
        "bytes": token.get("bytes") or [],
    }


def _usage(usage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not usage:
        return None
    read, written = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage.get("total_tokens") or read + written,
    }
