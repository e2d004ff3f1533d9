"""A chat completion for a request of OpenAI's Responses API, and the response that its reply becomes.

Guarantees: pure; what is asked of the Responses API is asked of the chat; a response shows what its request
asked for, and always holds an answer or the call of a tool, be it an empty one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soma_vllm.api.responses.request import (
    FunctionTool,
    JsonObject,
    JsonSchema,
    NamedFunction,
    ResponsesRequest,
    Text,
)
from soma_vllm.errors import EngineError
from soma_vllm.types import Message

CUT_OFF: Mapping[str, str] = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""How an answer ended before it was complete, as a chat completion and as a response say it."""


def chat_body(asked: ResponsesRequest, messages: Sequence[Message]) -> dict[str, Any]:
    """The chat completion that answers a request. What was not asked for is not in it."""
    body: dict[str, Any] = {**asked.passed, "messages": list(messages)}
    body |= _given(
        model=asked.model,
        metadata=asked.metadata,
        user=asked.user,
        temperature=asked.temperature,
        top_p=asked.top_p,
        max_completion_tokens=asked.max_output_tokens,
        response_format=_response_format(asked.text),
    )
    if asked.tools:
        body["tools"] = [_chat_tool(tool) for tool in asked.tools]
        body |= _given(
            tool_choice=_chat_choice(asked.tool_choice), parallel_tool_calls=asked.parallel_tool_calls
        )
    if asked.text is not None and asked.text.verbosity != "medium":
        body |= _given(verbosity=asked.text.verbosity)
    if asked.reasoning is not None:
        body |= _given(reasoning_effort=asked.reasoning.effort)
    if asked.wants_logprobs:
        body |= {"logprobs": True, "top_logprobs": asked.top_logprobs or 0}
    if asked.truncation == "auto":
        body["truncate_prompt_tokens"] = -1  # vLLM's: the oldest tokens give way
    if asked.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def new_id(kind: str) -> str:
    """An id that was never given before: `kind` is resp, msg, rs or fc."""
    return f"{kind}_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Frame:
    """What every state of one response has in common."""

    asked: ResponsesRequest
    id: str
    model: str
    stored: bool
    """Whether the dialogue can be gone on from it by its id."""
    created_at: int = field(default_factory=lambda: int(time.time()))

    def response(
        self,
        status: str,
        output: Sequence[Mapping[str, Any]] = (),
        usage: Mapping[str, Any] | None = None,
        *,
        cut_off: str | None = None,
        error: str | None = None,
    ) -> dict[str, Any]:
        """The `response` object; `usage` is a chat completion's, `cut_off` why it is incomplete."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None if error is None else {"code": "server_error", "message": error},
            "incomplete_details": None if cut_off is None else {"reason": cut_off},
            "model": self.model,
            "output": list(output),
            "usage": _usage(usage),
            "store": self.stored,
            **_asked_for(self.asked),
        }


def response_of(frame: Frame, completion: Mapping[str, Any]) -> dict[str, Any]:
    """The response that a whole chat completion becomes.

    Raises:
        EngineError: it holds no answer.
    """
    choices = completion.get("choices") or ()
    choice = next((choice for choice in choices if not choice.get("index")), None)
    if choice is None:
        raise EngineError("found no choice in the engine's reply; expected one")
    cut_off = CUT_OFF.get(choice.get("finish_reason") or "")
    message = choice.get("message") or {}
    calls = message.get("tool_calls") or ()
    output: list[dict[str, Any]] = []
    if thoughts := thoughts_in(message):
        output.append(reasoning_item(new_id("rs"), thoughts))
    if (text := text_in(message)) or not calls:
        shown = (choice.get("logprobs") or {}).get("content") if frame.asked.wants_logprobs else ()
        output.append(message_item(new_id("msg"), text, logprobs_of(shown)))
    for call in calls:
        function = call.get("function") or {}
        arguments = function.get("arguments") or ""
        output.append(call_item(new_id("fc"), call_id_of(call), function.get("name") or "", arguments))
    if cut_off is not None:
        output[-1]["status"] = "incomplete"
    status = "completed" if cut_off is None else "incomplete"
    return frame.response(status, output, completion.get("usage"), cut_off=cut_off)


# -- output ---------------------------------------------------------------------------------------------


def message_item(
    item: str, text: str, logprobs: Sequence[Mapping[str, Any]] = (), status: str = "completed"
) -> dict[str, Any]:
    """What was answered."""
    content = [text_part(text, logprobs)]
    return {"id": item, "type": "message", "role": "assistant", "status": status, "content": content}


def reasoning_item(item: str, text: str, status: str = "completed") -> dict[str, Any]:
    """What was thought."""
    content = [reasoning_part(text)]
    return {"id": item, "type": "reasoning", "summary": [], "status": status, "content": content}


def call_item(item: str, call: str, name: str, arguments: str, status: str = "completed") -> dict[str, Any]:
    """The call of a tool; `call` is the id that its result will name."""
    function = {"call_id": call, "name": name, "arguments": arguments}
    return {"id": item, "type": "function_call", "status": status, **function}


def text_part(text: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The part that a message has."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def reasoning_part(text: str) -> dict[str, Any]:
    """The part that a thought has."""
    return {"type": "reasoning_text", "text": text}


def text_in(spoken: Mapping[str, Any]) -> str:
    """Text of a chat message or delta. A refusal is what the model has to say, too."""
    return spoken.get("content") or spoken.get("refusal") or ""


def thoughts_in(spoken: Mapping[str, Any]) -> str:
    """Thoughts in a chat message or delta, under vLLM's name for them or the older one."""
    return spoken.get("reasoning") or spoken.get("reasoning_content") or ""


def call_id_of(call: Mapping[str, Any]) -> str:
    """The id of a call; a new one where its engine gave none."""
    return call.get("id") or new_id("call")


def logprobs_of(shown: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """A chat completion's log-probabilities as a response has them."""
    return [
        {**_token(token), "top_logprobs": [_token(top) for top in token.get("top_logprobs") or ()]}
        for token in shown or ()
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
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage.get("total_tokens") or read + written,
    }


# -- parameters -----------------------------------------------------------------------------------------


def _asked_for(asked: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request; what that left out, as OpenAI's API does by default."""
    more = asked.model_extra or {}
    text = {} if asked.text is None else asked.text.model_dump(by_alias=True, exclude_none=True)
    conversation = asked.conversation_id
    choice = asked.tool_choice
    return {
        "background": False,
        "conversation": None if conversation is None else {"id": conversation},
        "frequency_penalty": more.get("frequency_penalty", 0.0),
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "presence_penalty": more.get("presence_penalty", 0.0),
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": more.get("prompt_cache_key"),
        "reasoning": {"effort": None, "summary": None}
        if asked.reasoning is None
        else asked.reasoning.model_dump(include={"effort", "summary"}),
        "safety_identifier": more.get("safety_identifier"),
        "service_tier": "default",
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
        "tools": [tool.model_dump(exclude={"defer_loading"}) for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "truncation": asked.truncation or "disabled",
        "user": asked.user,
    }


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function = _given(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return {"type": "function", "function": function}


def _chat_choice(choice: str | NamedFunction | None) -> Any:
    return (
        {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedFunction) else choice
    )


def _response_format(text: Text | None) -> dict[str, Any] | None:
    wanted = None if text is None else text.format
    if isinstance(wanted, JsonObject):
        return {"type": "json_object"}
    if isinstance(wanted, JsonSchema):
        described = _given(name=wanted.name, description=wanted.description, strict=wanted.strict)
        return {"type": "json_schema", "json_schema": {**described, "schema": wanted.schema_}}
    return None
