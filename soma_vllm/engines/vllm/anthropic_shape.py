"""Anthropic's Messages API as chat completions: vLLM's own conversion, both ways, without its engine.

What this module relies on (vLLM 0.32): `AnthropicServingMessages.to_chat_completion_request` is a class method;
`messages_full_converter` and `message_stream_converter` read nothing of their object; the application's state
holds one, which knows whether the chat template takes system messages in the middle (`_merge_inline_system`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any

from pydantic import WrapValidator
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

from soma_vllm.engines.vllm.internals import REFUSALS, read_body
from soma_vllm.errors import BadRequest, EngineUnavailable

MessagesBody = Annotated[AnthropicMessagesRequest, WrapValidator(read_body)]
"""A request for a message, as vLLM reads it."""

CountBody = Annotated[AnthropicCountTokensRequest, WrapValidator(read_body)]
"""One for the length of its prompt."""


def chat_body(request: Any, state: Any) -> dict[str, Any]:
    """The chat completion that answers a request.

    Raises:
        BadRequest: vLLM cannot say it as a chat.
    """
    serving = getattr(state, "anthropic_serving_messages", None)
    merge = getattr(serving, "_merge_inline_system", True)
    try:
        chat = AnthropicServingMessages.to_chat_completion_request(request, merge_inline_system=merge)
    except (*REFUSALS, AttributeError, LookupError) as error:
        raise BadRequest(f"messages: found what is no dialogue ({type(error).__name__})", "messages") from error
    body: dict[str, Any] = chat.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    session = (getattr(request, "metadata", None) or {}).get("session_id")
    return body if session is None else {**body, "metadata": {"session_id": session}}


def message_of(completion: Mapping[str, Any]) -> dict[str, Any]:
    """The message that a whole chat completion becomes.

    Raises:
        EngineUnavailable: it is no chat completion.
    """
    try:
        chat = ChatCompletionResponse.model_validate(completion)
        for choice in chat.choices:
            for call in choice.message.tool_calls or ():
                if not _is_object(call.function.arguments):
                    call.function.arguments = "{}"  # cut off: Anthropic's clients take an object alone
        message = AnthropicServingMessages.messages_full_converter(None, chat)
    except (ValueError, LookupError, TypeError) as error:
        raise EngineUnavailable("the engine answered with what is no chat completion") from error
    found: dict[str, Any] = message.model_dump(mode="json", exclude_none=True)
    return {"stop_reason": None, "stop_sequence": None, **found}


def message_events(events: Any) -> AsyncGenerator[str, None]:
    """The events of a message, from those of a chat completion."""
    made: AsyncGenerator[str, None] = AnthropicServingMessages.message_stream_converter(None, events)
    return made


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False
