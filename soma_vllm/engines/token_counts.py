"""Counting tokens: asking engines for their counts, and estimates for what they did not count.

Estimates take `CHARS_PER_TOKEN` characters of a prompt for one token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from soma_vllm.engines.dialect import tokens_in
from soma_vllm.engines.reply_parser import CHARS_PER_TOKEN, ParsedReply
from soma_vllm.types import Usage

UNSAID_ANSWER = 512
"""Tokens that are reserved for an answer whose length the client does not limit."""

MOST_CHOICES = 1024


def wants_counts(body: Mapping[str, Any]) -> bool:
    """Whether the client wants the counts in its stream."""
    options = body.get("stream_options")
    return isinstance(options, Mapping) and bool(options.get("include_usage"))


def counting_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """What to add to a request so that its stream tells its counts; empty where it does anyway."""
    if not body.get("stream") or wants_counts(body):
        return {}
    options = body.get("stream_options")
    return {"stream_options": {**(options if isinstance(options, Mapping) else {}), "include_usage": True}}


def estimate(body: Mapping[str, Any]) -> int:
    """Tokens that a request may take: its prompt, and the answers that it allows."""
    limits = (tokens_in(body.get(name)) for name in ("max_completion_tokens", "max_tokens"))
    most = next((limit for limit in limits if limit is not None), UNSAID_ANSWER)
    choices = min(max(tokens_in(body.get("n")) or 1, 1), MOST_CHOICES)
    return prompt_estimate(body) + choices * most


def prompt_estimate(body: Mapping[str, Any]) -> int:
    """Tokens of a request's prompt. What is attached to a message, an image for one, is not counted: its
    encoding is far longer than the tokens that it becomes."""
    prompt = body.get("messages", body.get("prompt"))
    shown = {"prompt": _without_attachments(prompt), "tools": body.get("tools")}
    return len(json.dumps(shown, ensure_ascii=False, default=str)) // CHARS_PER_TOKEN


def _without_attachments(messages: object) -> object:
    if not isinstance(messages, list | tuple):
        return messages
    return [
        {**one, "content": [part for part in one["content"] if not _is_attached(part)]}
        if isinstance(one, Mapping) and isinstance(one.get("content"), list | tuple)
        else one
        for one in messages
    ]


def _is_attached(part: object) -> bool:
    return (
        isinstance(part, Mapping) and "text" not in part and part.get("type") not in (None, "text", "refusal")
    )


def counted(reply: ParsedReply, body: Mapping[str, Any]) -> Usage:
    """The tokens of a reply: as the engine counted them, else at least those of which something was heard."""
    usage = reply.usage
    if usage.completion_tokens is not None or usage.prompt_tokens is not None or not reply.at_least:
        return usage
    return Usage(prompt_estimate(body), None, reply.at_least)
