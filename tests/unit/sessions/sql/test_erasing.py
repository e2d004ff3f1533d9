"""What was said can be erased, down to the bytes of an SQLite database."""

from __future__ import annotations

import logging
import random
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.lookups import found

from soma_vllm.sessions.sql.records import SessionSnapshot, TurnLocation, TurnMark
from soma_vllm.sessions.sql.store import ERASED_AT_ONCE, SessionStore
from soma_vllm.types import Event, SessionKey

STANDING = SessionSnapshot("", "WARM_START", "c", 1, None)


def turn(at: float, answer: str) -> Event:
    return Event("turn", at, {"number": 1}, {"answer": answer})


async def test_an_erased_session_keeps_its_events_and_is_still_found(store: SessionStore) -> None:
    key, other = SessionKey("t", "s"), SessionKey("t", "other")
    events = [turn(1.0, "hello"), Event("switched", 2.0, {"gap": 0.1}), turn(3.0, "bye")]
    marks = [TurnMark(0, 1, "c1", "r1"), TurnMark(2, 2, "c2", "r2")]
    await store.append(key, 0, events, STANDING, marks)
    await store.append(other, 0, events[:1], STANDING)
    assert await store.erase_text(key) == 2
    assert await store.erase_text(key) == 0
    assert await store.events(key) == [Event(event.kind, event.at, event.data) for event in events]
    assert await found(store, "t", "", ["c2", "c1"]) == TurnLocation("s", 2, 2)
    assert await store.of_response("t", "r1") == TurnLocation("s", 0, 1)
    assert await store.events(other) == events[:1]


async def test_a_session_goes_on_after_its_text_was_erased(store: SessionStore) -> None:
    key = SessionKey("t", "s")
    await store.append(key, 0, [turn(1.0, "hello")], STANDING)
    await store.erase_text(key)
    await store.append(key, 1, [turn(2.0, "bye")], STANDING)
    assert [event.text for event in await store.events(key)] == [None, {"answer": "bye"}]


async def test_text_is_erased_up_to_a_time_in_all_sessions(store: SessionStore) -> None:
    keys = [SessionKey("t", "a"), SessionKey("u", "b")]
    for key in keys:
        await store.append(key, 0, [turn(float(at), "hello") for at in range(4)], STANDING)
    assert await store.erase_texts_before(0.0) == 0
    assert await store.erase_texts_before(2.0) == 4
    for key in keys:
        assert [event.text is None for event in await store.events(key)] == [True, True, False, False]


async def test_more_texts_than_one_transaction_erases_are_erased(store: SessionStore) -> None:
    many = [turn(1.0, "hello")] * (ERASED_AT_ONCE + 1)
    await store.append(SessionKey("t", "s"), 0, many, STANDING)
    await store.append(SessionKey("t", "b"), 0, many[:ERASED_AT_ONCE], STANDING)
    assert await store.erase_texts_before(2.0) == 2 * ERASED_AT_ONCE + 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
async def lite(folder: Path) -> AsyncIterator[SessionStore]:
    store = SessionStore(f"sqlite+aiosqlite:///{folder}/sessions.db")
    await store.open()
    yield store
    await store.close()


def found_in(folder: Path, word: str) -> bool:
    return any(word.encode() in path.read_bytes() for path in folder.iterdir())


@pytest.mark.parametrize("size", [1, 300, 5_000, 200_000])
@pytest.mark.parametrize("how", ["erase_text", "erase_texts_before", "delete"])
async def test_erased_words_are_in_no_file_of_the_database(
    lite: SessionStore, folder: Path, how: str, size: int
) -> None:
    key = SessionKey("t", "s")
    await lite.append(
        key, 0, [turn(float(n), f"begin{n}-" + "x" * size + f"-end{n}") for n in range(9)], STANDING
    )
    assert found_in(folder, "begin4-")
    assert found_in(folder, "-end4")
    await (lite.erase_texts_before(9.0) if how == "erase_texts_before" else getattr(lite, how)(key))
    assert [n for n in range(9) if found_in(folder, f"begin{n}-") or found_in(folder, f"-end{n}")] == []


@pytest.mark.slow
async def test_words_erased_in_between_are_gone_and_all_others_stay(lite: SessionStore, folder: Path) -> None:
    """Pages are split, merged and reused: nothing may be left in their unused parts."""
    chance = random.Random(7)
    words: dict[int, str] = {}
    for n in range(300):
        words[n] = f"w{n:03}{chance.getrandbits(64):016x}"
        answer = words[n] + "x" * int(10 ** chance.uniform(0, 4)) + words[n]
        await lite.append(SessionKey("t", f"s{n}"), 0, [turn(1.0, answer)], STANDING)
        if n % 2:
            await lite.erase_text(SessionKey("t", f"s{chance.randrange(n)}"))
    kept = {n for n in words if (await lite.events(SessionKey("t", f"s{n}")))[0].text is not None}
    assert 100 < len(kept) < 250
    assert {n for n, word in words.items() if found_in(folder, word)} == kept


async def test_a_reader_in_the_way_is_told_and_the_next_erasure_makes_good(
    lite: SessionStore, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soma_vllm.sessions.sql.store.SCRUB_BUSY_MS", 10)
    key = SessionKey("t", "s")
    await lite.append(key, 0, [turn(1.0, "unforgettable")], STANDING)
    reader = sqlite3.connect(folder / "sessions.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM texts").fetchall()
    with caplog.at_level(logging.WARNING):
        assert await lite.erase_text(key) == 1
    assert "erased text stays in that file until the next erasure" in caplog.text
    assert found_in(folder, "unforgettable")
    await lite.append(key, 1, [turn(2.0, "still works")], STANDING)
    reader.close()
    assert await lite.erase_texts_before(0.0) == 0
    assert not found_in(folder, "unforgettable")


async def test_many_sessions_are_removed_in_one_transaction_that_empties_the_log_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/s.db")
    await store.open()
    keys = [SessionKey("t", f"s{number}\x00") for number in range(70)]
    for key in keys:
        event = Event("turn", 1.0, {}, {"answer": f"the words of {key.session}"})
        await store.append(key, 0, [event], SessionSnapshot("", "CLOSED", "c", 1, None))
    emptied = []
    scrub = store._scrub

    async def counted() -> None:
        emptied.append(1)
        await scrub()

    monkeypatch.setattr(store, "_scrub", counted)
    await store.delete(*keys[:-1])
    assert len(emptied) == 1
    assert await store.keys() == keys[-1:]
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"the words of s1" not in held
    assert b"the words of s69" in held
    await store.close()
