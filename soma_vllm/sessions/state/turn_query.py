"""What a policy is asked about: one turn that is to be routed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from soma_vllm.sessions.state.transcript import TranscriptDigest
from soma_vllm.types import Message


@dataclass(frozen=True)
class TurnQuery:
    """The turn to be routed."""

    reading: TranscriptDigest
    """The client's messages, whole, and their digests."""
    body: Mapping[str, Any]
    """The client's whole request."""
    builds_on: int
    """Recorded turns that the client's history repeats."""
    added: tuple[Message, ...]
    """The messages that follow those turns."""
    distance: float | None
    """Cosine distance of the query to the warm start's centroid; None where the session has none."""
    prepared: Any = None
    """What the policy's own `prepare` returned; None where it has none."""
    unprepared: str | None = None
    """Why `prepare` failed: the original answers, and `route` is not asked."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The client's messages, whole."""
        return self.reading.messages
