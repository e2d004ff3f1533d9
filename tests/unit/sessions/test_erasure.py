"""When text is erased, and who hears of it."""

from __future__ import annotations

from typing import Any

import pytest
from support.services import Build

from soma_vllm.adaptation.shadow_traffic import ShadowTraffic
from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs
from soma_vllm.config import parse_config
from soma_vllm.sessions.erasure import TextCache
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")


class Cache:
    """Remembers what it was told to forget."""

    kinds: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.forgot: list[SessionKey | float] = []

    def __call__(self, key: SessionKey, event: Event) -> None:
        raise AssertionError("it subscribed to nothing")

    def forget(self, key: SessionKey) -> None:
        self.forgot.append(key)

    def forget_before(self, at: float) -> None:
        self.forgot.append(at)


async def registry_with(cache: Cache, build: Build, text: str) -> SessionRegistry:
    config = parse_config({"retention": {"text": text}}, "test")
    registry = SessionRegistry(config, build().store, [cache])
    await registry.open(KEY)
    return registry


@pytest.mark.parametrize("text", ["session", "until_adapted", "never"])
@pytest.mark.parametrize("end", ["refused", "training_failed", "closed"])
async def test_caches_forget_a_session_that_is_not_learned_from_any_more(
    build: Build, text: str, end: Any
) -> None:
    cache = Cache()
    registry = await registry_with(cache, build, text)
    registry.note(KEY, "adaptation_started", forced=None)
    assert cache.forgot == []
    registry.note(KEY, end)
    assert cache.forgot == ([] if text == "session" else [KEY])


async def test_caches_forget_a_session_that_is_removed(build: Build) -> None:
    cache = Cache()
    registry = await registry_with(cache, build, "session")
    registry.remove(KEY)
    assert cache.forgot == [KEY]


async def test_an_age_is_erased_from_the_store_and_every_cache(build: Build) -> None:
    cache = Cache()
    registry = await registry_with(cache, build, "session")
    await registry.erasure.erase_before(5.0)
    assert cache.forgot == [5.0]


def test_all_that_keeps_text_beside_the_registry_is_a_cache_of_text() -> None:
    for keeper in (SessionRegistry, ShadowTraffic, TeacherLogprobs):
        assert issubclass(keeper, TextCache)
