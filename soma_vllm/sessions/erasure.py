"""When what was said is erased, from the session store and from every cache of this process.

Guarantees: `retention.text` decides alone, by a session's phase, what text is kept in memory and on record; a
cache that was named once hears of every erasure, of one session and of an age.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol, runtime_checkable

from soma_vllm.sessions.ports import Store
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import SessionKey

LEARNING = frozenset({Phase.WARM_START, Phase.ADAPTING, Phase.ROLLED_BACK})
"""Phases in which what was said may still be learned from."""


@runtime_checkable
class TextCache(Protocol):
    """Something that keeps what was said, or what was made of it, in memory."""

    def forget(self, key: SessionKey) -> None:
        """Drop all of a session; harmless where there is none of it."""
        ...

    def forget_before(self, at: float) -> None:
        """Drop what is from before a Unix time, in seconds."""
        ...


class TextErasure:
    """The rule, and those that it reaches."""

    def __init__(
        self, policy: Literal["session", "until_adapted", "never"], store: Store, caches: Iterable[TextCache]
    ) -> None:
        """`policy` is `retention.text`."""
        self.policy = policy
        self._store = store
        self._caches = list(caches)

    def watch(self, cache: TextCache) -> None:
        """Reach a further cache from now on."""
        self._caches.append(cache)

    def in_memory(self, phase: Phase) -> bool:
        """Whether text of a session in this phase is kept in memory."""
        return self.policy == "session" or phase in LEARNING

    def on_record(self, phase: Phase) -> bool:
        """Whether text of a session in this phase is stored."""
        return self.policy == "session" or (self.policy == "until_adapted" and phase in LEARNING)

    def is_due(self, before: Phase, now: Phase) -> bool:
        """Whether a session's text is to be erased because nothing is learned from it any more."""
        return self.in_memory(before) and not self.in_memory(now)

    def forget(self, key: SessionKey) -> None:
        """Drop a session's text from every cache."""
        for cache in self._caches:
            cache.forget(key)

    async def erase_before(self, at: float) -> None:
        """Erase what was said before a Unix time, in seconds, everywhere.

        Raises:
            StoreUnavailable: the session store did not answer; the caches are as they were.
        """
        await self._store.erase_texts_before(at)
        for cache in self._caches:
            cache.forget_before(at)
