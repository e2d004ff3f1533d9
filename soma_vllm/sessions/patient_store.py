"""A session store that remembers for some seconds that it did not answer.

Guarantees: while a database hangs, one lookup in `REMEMBER_S` seconds waits for it; the others fail at once, so
that the original answers without delay. Writes are not held back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.ports import LOOKUP_S, Store

REMEMBER_S = 5.0

LOOKUPS = frozenset(
    {"events", "find", "ending", "of_response", "live", "users_of", "family", "adapters", "summaries"}
)
"""Verbs that a user may wait for."""


class PatientStore:
    """A `Store` around another one."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._hung_until = 0.0

    def __getattr__(self, name: str) -> Any:
        """The store's own verb; a lookup with the memory of its last failure."""
        verb = getattr(self._store, name)
        if name not in LOOKUPS:
            return verb

        async def lookup(*args: Any, **more: Any) -> Any:
            return await self._remembering(verb, *args, **more)

        return lookup

    async def _remembering(self, verb: Callable[..., Awaitable[Any]], *args: Any, **more: Any) -> Any:
        began = self._clock()
        if began < self._hung_until:
            raise StoreUnavailable(f"the session store did not answer within {LOOKUP_S:g} s, a moment ago")
        try:
            found = await verb(*args, **more)
        except asyncio.CancelledError:
            # Given up by the one who waited (`in_time`): the next ones need not wait as well.
            if self._clock() - began >= 0.99 * LOOKUP_S:
                self._hung_until = self._clock() + REMEMBER_S
            raise
        self._hung_until = 0.0
        return found
