"""What a whole stream of events says, read as the dispatcher reads it."""

from __future__ import annotations

from collections.abc import Iterable

from soma_vllm.engines.reply_parser import Choice, StreamReader
from soma_vllm.types import Usage


def read_events(events: Iterable[str]) -> tuple[tuple[Choice, ...], Usage, bool]:
    """(choices, usage, whether the stream came to its own end) of whole server-sent events."""
    reader = StreamReader()
    for event in events:
        reader.add(event)
    reply = reader.reply(None, 0.0)
    return reply.choices, reply.usage, reply.complete
