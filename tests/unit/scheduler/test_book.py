"""The book of sessions when its log fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from soma_vllm.config import Config
from soma_vllm.errors import EngineUnavailable
from soma_vllm.scheduler.book import SessionBook
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")


class FailingLog:
    """A log that is away while `away` is set, and keeps what it was given."""

    def __init__(self) -> None:
        self.away = False
        self.kept: list[tuple[int, str]] = []

    async def append(
        self, key: SessionKey, first_seq: int, events: Sequence[Event], phase: str, chain: str
    ) -> None:
        if self.away:
            raise ConnectionRefusedError("no database")
        self.kept += [(first_seq + offset, event.kind) for offset, event in enumerate(events)]

    async def events(self, key: SessionKey) -> list[Event]:
        if self.away:
            raise ConnectionRefusedError("no database")
        return []

    async def find(self, tenant: str, chain: str) -> str | None:
        return None


async def test_after_a_lost_write_nothing_of_that_session_is_written_and_stopping_does_not_hang() -> None:
    log = FailingLog()
    book = SessionBook(Config(), log)
    await book.start()
    await book.open(KEY)
    book.note(KEY, "one")
    await asyncio.wait_for(book._writes.join(), 5)
    log.away = True
    book.note(KEY, "two")
    await asyncio.wait_for(book._writes.join(), 30)
    log.away = False
    book.note(KEY, "three")
    await asyncio.wait_for(book.stop(), 5)
    assert log.kept == [(0, "one")]


async def test_without_its_record_a_session_is_refused_and_not_begun_anew() -> None:
    log = FailingLog()
    log.away = True
    with pytest.raises(EngineUnavailable, match="session store"):
        await SessionBook(Config(), log).open(KEY)


async def test_only_the_latest_sessions_stay_in_memory_and_those_in_use() -> None:
    book = SessionBook(Config(), FailingLog(), live_sessions=2)
    keys = [SessionKey("t", str(number)) for number in range(4)]
    await book.open(keys[0])
    book.hold(keys[0])
    for key in keys[1:]:
        await book.open(key)
    assert book.session(keys[0])
    assert book.session(keys[3])
    for key in keys[1:3]:
        with pytest.raises(KeyError):
            book.session(key)


async def test_a_session_that_is_not_on_record_yet_is_not_forgotten() -> None:
    book = SessionBook(Config(), FailingLog(), live_sessions=1)
    await book.open(KEY)
    book.note(KEY, "one")
    await book.open(SessionKey("t", "other"))
    assert book.session(KEY)
    await book.start()
    await asyncio.wait_for(book.stop(), 5)
    await book.open(SessionKey("t", "third"))
    with pytest.raises(KeyError):
        book.session(KEY)
