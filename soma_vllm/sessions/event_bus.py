"""Who hears of which events of sessions.

Guarantees: a callback hears the kinds that it subscribed to and no others, in the order of subscription; what
happens at a kind of event is one list, `subscribers(kind)`; one that fails is logged, and the others hear the
event all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from soma_vllm.sessions.ports import Observer
from soma_vllm.types import Event, SessionKey

logger = logging.getLogger(__name__)


class EventBus:
    """Callbacks by kind of event."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._callbacks: list[tuple[frozenset[str] | None, Observer]] = []
        for observer in observers:
            self.subscribe(observer)

    def subscribe(self, observer: Observer) -> None:
        """Have an observer hear the kinds that its attribute `kinds` names; one without it, every kind."""
        self._callbacks.append((getattr(observer, "kinds", None), observer))

    def subscribers(self, kind: str) -> list[Any]:
        """The callbacks that hear events of this kind, in the order in which they do."""
        return [callback for kinds, callback in self._callbacks if kinds is None or kind in kinds]

    def publish(self, key: SessionKey, event: Event) -> None:
        """Tell the subscribers of one event of a session."""
        for callback in self.subscribers(event.kind):
            try:
                callback(key, event)
            except Exception as error:  # a fault of one observer is not the others' affair, nor the turn's
                # Without its message, which may quote the event's text.
                logger.error("an observer of %s failed: %s", event.kind, type(error).__name__)
