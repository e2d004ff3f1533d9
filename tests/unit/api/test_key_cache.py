"""Keys seen before, and the database behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from soma_vllm.api.auth.key_cache import KeyCache
from soma_vllm.config import Limits
from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.sql.api_keys import ApiKey

RIGHT = "sk-soma-0123456789ab-" + "s" * 32
RECORD = ApiKey("0123456789ab", "Ana", "d", "t", Limits(), 0.0, None)


class FakeKeys:
    """A key store that can be away, slow, and counts its lookups."""

    def __init__(self) -> None:
        self.known = {RIGHT: RECORD}
        self.away = False
        self.lookups = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def verify(self, key: str) -> ApiKey | None:
        self.lookups += 1
        await self.gate.wait()
        if self.away:
            raise StoreUnavailable("away")
        return self.known.get(key)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def keys() -> FakeKeys:
    return FakeKeys()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(keys: FakeKeys, clock: Callable[[], float]) -> KeyCache:
    return KeyCache(keys, trust_s=5.0, clock=clock)


async def test_a_key_is_looked_up_once_while_it_is_trusted(
    cache: KeyCache, keys: FakeKeys, clock: Clock
) -> None:
    for now in (1000.0, 1001.0, 1004.9):
        clock.now = now
        assert await cache.verify(RIGHT) is RECORD
    assert keys.lookups == 1


async def test_a_revoked_key_is_refused_once_it_is_no_longer_trusted(
    cache: KeyCache, keys: FakeKeys, clock: Clock
) -> None:
    await cache.verify(RIGHT)
    keys.known.clear()
    clock.now += 4.9
    assert await cache.verify(RIGHT) is RECORD
    clock.now += 0.1
    assert await cache.verify(RIGHT) is None


async def test_a_revoked_key_does_not_come_back_when_the_database_goes_away(
    cache: KeyCache, keys: FakeKeys, clock: Clock
) -> None:
    await cache.verify(RIGHT)
    keys.known.clear()
    clock.now += 5.0
    assert await cache.verify(RIGHT) is None
    keys.away = True
    with pytest.raises(StoreUnavailable):
        await cache.verify(RIGHT)


async def test_a_wrong_key_is_looked_up_every_time_and_never_cached(cache: KeyCache, keys: FakeKeys) -> None:
    for number in range(50):
        assert await cache.verify(f"sk-soma-0123456789ab-{number:032}") is None
    assert keys.lookups == 50
    assert not cache._cached
    assert not cache._lookups


async def test_a_key_just_issued_is_good_at_once(cache: KeyCache, keys: FakeKeys) -> None:
    keys.known.clear()
    assert await cache.verify(RIGHT) is None
    keys.known[RIGHT] = RECORD
    assert await cache.verify(RIGHT) is RECORD


async def test_while_the_database_is_away_a_key_seen_earlier_stays_good(
    cache: KeyCache, keys: FakeKeys, clock: Clock
) -> None:
    await cache.verify(RIGHT)
    keys.away = True
    for hour in range(3):
        clock.now += 3600.0 * hour
        assert await cache.verify(RIGHT) is RECORD


async def test_while_the_database_is_away_it_is_not_asked_at_every_request(
    cache: KeyCache, keys: FakeKeys, clock: Clock
) -> None:
    await cache.verify(RIGHT)
    keys.away = True
    clock.now += 60.0
    for _ in range(10):
        await cache.verify(RIGHT)
    assert keys.lookups == 2


async def test_while_the_database_is_away_nobody_can_tell_of_an_unknown_key(
    cache: KeyCache, keys: FakeKeys
) -> None:
    keys.away = True
    with pytest.raises(StoreUnavailable):
        await cache.verify(RIGHT)


async def test_a_database_that_hangs_counts_as_away_and_costs_one_request_its_wait(
    cache: KeyCache, keys: FakeKeys, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soma_vllm.api.auth.key_cache.LOOKUP_S", 0.01)
    keys.gate.clear()
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.01 s"):
            await cache.verify(RIGHT)
    assert keys.lookups == 1
    keys.gate.set()
    clock.now += 5.0
    assert await cache.verify(RIGHT) is RECORD


async def test_requests_at_once_share_one_lookup(cache: KeyCache, keys: FakeKeys) -> None:
    keys.gate.clear()
    waiting = [asyncio.create_task(cache.verify(RIGHT)) for _ in range(20)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    keys.gate.set()
    assert await asyncio.gather(*waiting) == [RECORD] * 20
    assert keys.lookups == 1


async def test_a_client_that_leaves_does_not_end_the_lookup_of_others(cache: KeyCache, keys: FakeKeys) -> None:
    keys.gate.clear()
    leaving, staying = (asyncio.create_task(cache.verify(RIGHT)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0)
    keys.gate.set()
    assert await staying is RECORD
    assert keys.lookups == 1


async def test_with_no_trust_every_request_is_looked_up(keys: FakeKeys, clock: Clock) -> None:
    cache = KeyCache(keys, trust_s=0.0, clock=clock)
    for _ in range(3):
        await cache.verify(RIGHT)
    assert keys.lookups == 3
