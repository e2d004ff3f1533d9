"""API keys as they were last seen in the database, so that a request seldom waits for it.

Guarantees: only keys that were right are remembered, so that a wrong secret costs the same lookup as an unknown
id; a key is trusted for `trust_s` and then looked up again, once however many requests wait for it; while the
database is away, a key that was right stays so. Memory grows with the keys issued, not with the keys tried.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.sql.api_keys import ApiKey

LOOKUP_S = 5.0
"""A lookup that takes longer counts as failed."""


class Keys(Protocol):
    """Where keys are kept: `storage.keys.KeyStore`."""

    async def verify(self, key: str) -> ApiKey | None: ...


@dataclass(frozen=True)
class Seen:
    """A key that was right."""

    key: ApiKey
    at: float
    """When it was looked up, by the ring's clock; or when that last failed."""


class KeyCache:
    """A cache in front of the key store."""

    def __init__(self, keys: Keys, trust_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._trust_s = trust_s
        self._clock = clock
        self._seen: dict[bytes, Seen] = {}
        self._lookups: dict[bytes, asyncio.Task[ApiKey | None]] = {}

    async def verify(self, key: str) -> ApiKey | None:
        """The key's record; None for one that is unknown, wrong or revoked.

        Raises:
            StoreUnavailable: the database is away, and this key was not seen before.
        """
        digest = sha256(key.encode("utf-8", "surrogatepass")).digest()
        seen = self._seen.get(digest)
        if seen is not None and self._clock() - seen.at < self._trust_s:
            return seen.key
        lookup = self._lookups.get(digest)
        if lookup is None:
            lookup = asyncio.create_task(self._look_up(key, digest), name="soma-key-lookup")
            self._lookups[digest] = lookup
        # A client that leaves must not end the lookup that others wait for.
        return await asyncio.shield(lookup)

    async def _look_up(self, key: str, digest: bytes) -> ApiKey | None:
        try:
            found = await self._in_store(key)
        except StoreUnavailable:
            if digest not in self._seen:
                raise
            found = self._seen[digest].key
        finally:
            del self._lookups[digest]
        if found is None:
            self._seen.pop(digest, None)
        else:
            self._seen[digest] = Seen(found, self._clock())
        return found

    async def _in_store(self, key: str) -> ApiKey | None:
        try:
            async with asyncio.timeout(LOOKUP_S):
                return await self._keys.verify(key)
        except TimeoutError as error:
            raise StoreUnavailable(f"the key store did not answer within {LOOKUP_S:g} s") from error
