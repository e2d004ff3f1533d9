"""A cache of valid API keys, so that few requests wait for the database.

Guarantees: only valid keys are cached, so that a wrong secret costs the same lookup as an unknown id; a key is
trusted for `trust_s` and then looked up again, once for all requests that wait for it; while the database does
not answer, a cached key stays valid. Memory grows with the keys issued, not with the keys tried.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.sql.api_keys import ApiKey

LOOKUP_S = 5.0
"""A lookup that takes longer counts as failed."""

REMEMBER_S = 5.0
"""For how long further lookups then fail at once, seconds."""


class Keys(Protocol):
    """Where keys are stored: `sessions.sql.api_keys.KeyStore`."""

    async def verify(self, key: str) -> ApiKey | None: ...


@dataclass(frozen=True)
class CachedKey:
    """A valid key."""

    key: ApiKey
    at: float
    """Seconds by the cache's clock: its last lookup, successful or failed."""


class KeyCache:
    """A cache in front of the key store."""

    def __init__(self, keys: Keys, trust_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._trust_s = trust_s
        self._clock = clock
        self._cached: dict[bytes, CachedKey] = {}
        self._lookups: dict[bytes, asyncio.Task[ApiKey | None]] = {}
        self._hung_until = -math.inf

    async def verify(self, key: str) -> ApiKey | None:
        """The key's record; None where it is unknown, wrong or revoked.

        Raises:
            StoreUnavailable: the key store did not answer within 5 s, and the key is not in the cache.
        """
        digest = sha256(key.encode("utf-8", "surrogatepass")).digest()
        cached = self._cached.get(digest)
        if cached is not None and self._clock() - cached.at < self._trust_s:
            return cached.key
        lookup = self._lookups.get(digest)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(key, digest), name="soma-key-lookup")
            self._lookups[digest] = lookup
        # A client that disconnects must not cancel the lookup that others wait for.
        return await asyncio.shield(lookup)

    async def _look_up(self, key: str, digest: bytes) -> ApiKey | None:
        try:
            found = await self._in_store(key)
        except StoreUnavailable:
            if digest not in self._cached:
                raise
            found = self._cached[digest].key
        finally:
            del self._lookups[digest]
        if found is None:
            self._cached.pop(digest, None)
        else:
            self._cached[digest] = CachedKey(found, self._clock())
        return found

    async def _in_store(self, key: str) -> ApiKey | None:
        if self._clock() < self._hung_until:
            raise StoreUnavailable(f"the key store did not answer within {LOOKUP_S:g} s, a moment ago")
        try:
            async with asyncio.timeout(LOOKUP_S):
                return await self._keys.verify(key)
        except TimeoutError as error:
            self._hung_until = self._clock() + REMEMBER_S
            raise StoreUnavailable(f"the key store did not answer within {LOOKUP_S:g} s") from error
