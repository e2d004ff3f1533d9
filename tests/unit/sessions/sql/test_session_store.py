"""What the session store takes and gives back, on real databases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.lookups import found

from soma_vllm.errors import ConfigError, StoreRefused
from soma_vllm.sessions.sql.records import AdapterRecord, LengthCount, SessionSnapshot, TurnLocation, TurnMark
from soma_vllm.sessions.sql.store import SessionStore, reading
from soma_vllm.sessions.sql.tables import RETIRED
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")
STANDING = SessionSnapshot(family="", phase="WARM_START", chain="c", turns=1, adapter=None)
ODD = ["höher", "日本\U0001f600", "\\", "\\0041", "a\\\x00b", "\ud800", "\udfff\ud800", "%_'\";--", "\u202e"]


def turn(number: int = 1, text: str | None = "hello") -> Event:
    said = None if text is None else {"messages": [{"role": "user", "content": text}], "answer": text}
    return Event("turn", float(number), {"number": number}, said)


async def put(store: SessionStore, name: str, chains: Sequence[str], **changes: str | None) -> SessionKey:
    """A session of one turn per chain, standing at the last."""
    key = SessionKey("t", name)
    standing = replace(STANDING, chain=chains[-1], turns=len(chains), **changes)
    marks = [TurnMark(seq, seq + 1, chain, f"{name}-{seq}") for seq, chain in enumerate(chains)]
    await store.append(key, 0, [turn(mark.number) for mark in marks], standing, marks)
    return key


async def test_events_come_back_in_order_with_their_text(store: SessionStore) -> None:
    events = [turn(1), turn(2, None), Event("switched", 2.5, {"gap": 0.1}), turn(3)]
    await store.append(KEY, 0, events[:2], STANDING)
    await store.append(KEY, 2, events[2:], STANDING)
    assert await store.events(KEY) == events
    assert await store.events(SessionKey("u", "s")) == []


@pytest.mark.parametrize("odd", ODD)
async def test_whatever_a_client_types_comes_back_exactly(store: SessionStore, odd: str) -> None:
    key = SessionKey("t", odd)
    event = Event("turn", 1.0, {"name": odd}, {"messages": [{"role": "user", "content": odd, odd: 1}]})
    adapter = AdapterRecord(key, odd, 1, f"/{odd}", "live")
    standing = replace(STANDING, family=odd, adapter=odd)
    await store.append(key, 0, [event], standing, [TurnMark(0, 1, "c", odd)], [adapter])
    assert await store.events(key) == [event]
    assert await store.keys() == [key]
    assert await found(store, "t", odd, ["c"]) == TurnLocation(odd, 0, 1)
    assert await store.of_response("t", odd) == TurnLocation(odd, 0, 1)
    assert await store.users_of(odd) == [key]
    assert await store.adapters("t") == [adapter]
    assert (await store.summaries("t", 1))[0].key == key
    await store.delete(key)
    assert await store.keys() == []


async def test_dialogues_are_counted_by_length_and_branches_of_one_only_once(store: SessionStore) -> None:
    await put(store, "short", ["a"])
    await put(store, "long", ["b", "c", "d"])
    await put(store, "root", ["e", "f"], family="root")
    await put(store, "root~1", ["e", "g", "h"], family="root")
    await store.append(SessionKey("u", "theirs"), 0, [turn()], STANDING)
    await store.append(SessionKey("t", "silent"), 0, [Event("closed", 0.0, {})], replace(STANDING, turns=0))
    over = await store.lengths(time.time() + 60.0)
    assert set(over) == {
        LengthCount("t", 1, True, 1),
        LengthCount("t", 3, True, 2),
        LengthCount("u", 1, True, 1),
    }


async def test_a_live_dialogue_counts_as_far_as_it_is_known_to_have_gone_on(store: SessionStore) -> None:
    await put(store, "one", ["a"])
    await put(store, "three", ["b", "c", "d"])  # turns at 1, 2 and 3 s
    await put(store, "root", ["e", "f"], family="root")
    await put(store, "root~1", ["e", "g", "h"], family="root")
    assert await store.lengths(0.5) == []  # nobody could have gone on since
    assert set(await store.lengths(1.5)) == {LengthCount("t", 1, False, 1), LengthCount("t", 2, False, 2)}
    assert set(await store.lengths(2.5)) == {LengthCount("t", 1, False, 1), LengthCount("t", 3, False, 2)}
    # Whether a further turn comes is not known of any.
    assert set(await store.lengths(3.5)) == {
        LengthCount("t", 1, False, 1),
        LengthCount("t", 3, False, 2),
    }


async def test_a_live_branch_keeps_its_whole_dialogue_live(store: SessionStore) -> None:
    await put(store, "root", ["a", "b", "c"], family="root")
    middle = time.time()
    await put(store, "root~1", ["a", "d"], family="root")
    assert await store.lengths(middle) == [LengthCount("t", 3, False, 1)]


async def test_numbers_that_json_has_no_word_for_come_back(store: SessionStore) -> None:
    await store.append(KEY, 0, [Event("judged", 0.0, {"gaps": [float("inf"), float("nan")]})], STANDING)
    (event,) = await store.events(KEY)
    infinite, missing = event.data["gaps"]
    assert infinite == float("inf")
    assert missing != missing


async def test_a_long_id_is_found_again(store: SessionStore) -> None:
    key = SessionKey("t", "\U0001f600" * 128 + "\x00" * 128)
    await store.append(key, 0, [turn()], replace(STANDING, family=key.session), [TurnMark(0, 1, "c", None)])
    assert await found(store, "t", key.session, ["c"]) == TurnLocation(key.session, 0, 1)


async def test_two_writers_cannot_append_the_same_event(store: SessionStore) -> None:
    await store.append(KEY, 0, [turn()], STANDING)
    late = Event("other", 0.0, {}, {"answer": "hush"})
    with pytest.raises(StoreRefused) as caught:
        await store.append(
            KEY, 0, [late], replace(STANDING, phase="CLOSED"), [TurnMark(0, 1, "d", None)], [adapter(1)]
        )
    assert caught.value.duplicate
    assert "hush" not in f"{caught.value} {caught.value.__cause__}"
    assert await store.events(KEY) == [turn()]
    assert (await store.summaries("t", 9))[0].phase == "WARM_START"
    assert await found(store, "t", "", ["d"]) is None
    assert await store.adapters() == []


async def test_of_many_writers_at_once_one_appends(store: SessionStore) -> None:
    attempts = [store.append(KEY, 0, [turn(n)], STANDING) for n in range(8)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert outcomes.count(None) == 1
    assert all(
        isinstance(outcome, StoreRefused) and outcome.duplicate for outcome in outcomes if outcome is not None
    )
    assert len(await store.events(KEY)) == 1


async def test_many_sessions_are_appended_to_at_once(store: SessionStore) -> None:
    keys = [SessionKey("t", f"{n:03}") for n in range(60)]
    await asyncio.gather(*(store.append(key, 0, [turn()], STANDING) for key in keys))
    assert await store.keys("t") == keys


async def test_where_a_session_stands_can_change_without_an_event(store: SessionStore) -> None:
    await store.append(KEY, 0, [turn()], STANDING)
    await store.append(KEY, 1, [], replace(STANDING, phase="SWITCHED", adapter="a"))
    assert await store.in_phase("SWITCHED") == [KEY]
    assert len(await store.events(KEY)) == 1


async def test_a_turn_is_found_inside_its_tenant_and_family_only(store: SessionStore) -> None:
    await put(store, "s", ["c1"], family="f")
    assert await found(store, "t", "f", ["c1"]) == TurnLocation("s", 0, 1)
    assert await found(store, "u", "f", ["c1"]) is None
    assert await found(store, "t", "", ["c1"]) is None
    assert await found(store, "t", "f", []) is None


async def test_the_longest_matching_transcript_wins(store: SessionStore) -> None:
    await put(store, "long", ["c1", "c2", "c3"])
    await put(store, "short", ["c1", "c2"])
    await put(store, "other", ["c1"])
    assert await found(store, "t", "", ["c4", "c3", "c2", "c1"]) == TurnLocation("long", 2, 3)
    assert await found(store, "t", "", ["x4", "x3", "x2", "c1"]) == TurnLocation("other", 0, 1)


async def test_of_equal_transcripts_those_that_stand_there_are_told_and_some_of_the_others(
    store: SessionStore,
) -> None:
    await put(store, "went on", ["c1", "c2", "c3"])
    await put(store, "went on later", ["c1", "c2", "d3"])
    await put(store, "stands", ["c1", "c2"])
    hits = await store.find("t", "", ["c2", "c1"], 2)
    assert [hit.found for hit in hits if hit.stands] == [TurnLocation("stands", 1, 2)]
    assert sum(not hit.stands for hit in hits) == 2
    assert {hit.chain for hit in hits} == {"c2"}


async def test_sessions_are_found_by_their_last_answer_inside_their_tenant_and_family(
    store: SessionStore,
) -> None:
    await put(store, "a", ["c1"], ending="x")
    await put(store, "b", ["c2"], ending="y")
    await put(store, "c", ["c3"], ending="y", family="f")
    await put(store, "d", ["c4"], ending="y", phase="CLOSED")
    assert sorted(await store.ending("t", "", ["x", "y", "z"], 9)) == ["a", "b"]
    assert len(await store.ending("t", "", ["x", "y"], 1)) == 1
    assert await store.ending("t", "f", ["y"], 9) == ["c"]
    assert await store.ending("u", "", ["y"], 9) == []


async def test_the_branches_of_a_dialogue_are_listed_with_it_and_not_counted(store: SessionStore) -> None:
    for name, family in (
        ("root", "root"),
        ("root~1", "root"),
        ("auto-1", ""),
        ("auto-1~1", ""),
        ("auto-2", ""),
    ):
        await put(store, name, [name], family=family)
    assert {key.session for key in await store.family("t", "root")} == {"root", "root~1"}
    assert {key.session for key in await store.family("t", "auto-1")} == {"auto-1~1"}
    assert await store.live("t") == 3


@pytest.mark.parametrize("what", ["find", "ending"])
async def test_no_lookup_reads_more_where_many_dialogues_are_alike(tmp_path: Path, what: str) -> None:
    async def steps(name: str, dialogues: int) -> int:
        store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/{name}.db")
        await store.open()
        for number in range(dialogues):
            await put(store, f"{number}", ["same", f"c{number}"], ending="same")
        counted = 0

        def count() -> int:
            nonlocal counted
            counted += 1
            return 0

        async with store._connection() as connection:
            raw = await connection.get_raw_connection()
            await raw.driver_connection.set_progress_handler(count, 1)
        await (
            store.find("t", "", ["none", "same"], 5) if what == "find" else store.ending("t", "", ["same"], 5)
        )
        await store.close()
        return counted

    assert await steps("many", 400) <= await steps("few", 20) + 20


async def test_a_transcript_given_twice_in_one_session_is_found_at_its_latest_turn(store: SessionStore) -> None:
    await put(store, "s", ["c1", "c2", "c1"])
    assert await found(store, "t", "", ["c1"]) == TurnLocation("s", 2, 3)


async def test_one_event_may_bring_several_turns(store: SessionStore) -> None:
    branched = Event("branched", 0.0, {"of": "s"})
    marks = [TurnMark(0, 1, "c1", "r1"), TurnMark(0, 2, "c2", "r2")]
    await store.append(SessionKey("t", "b"), 0, [branched], replace(STANDING, chain="c2"), marks)
    assert await found(store, "t", "", ["c2", "c1"]) == TurnLocation("b", 0, 2)
    assert await store.of_response("t", "r1") == TurnLocation("b", 0, 1)


async def test_a_transcript_of_a_thousand_turns_is_looked_up(store: SessionStore) -> None:
    await put(store, "s", ["c0"])
    assert await found(store, "t", "", [f"c{n}" for n in reversed(range(1000))]) == TurnLocation("s", 0, 1)


async def test_a_response_is_found_inside_its_tenant_the_latest_of_its_name(store: SessionStore) -> None:
    await store.append(KEY, 0, [turn(1)], STANDING, [TurnMark(0, 1, "c1", "r")])
    other = SessionKey("t", "b")
    await store.append(other, 0, [turn(2)], STANDING, [TurnMark(0, 2, "c2", "r")])
    assert await store.of_response("t", "r") == TurnLocation("b", 0, 2)
    assert await store.of_response("u", "r") is None
    assert await store.of_response("t", "none") is None


async def test_a_closed_session_is_not_found_and_uses_nothing(store: SessionStore) -> None:
    key = await put(store, "s", ["c1"], adapter="a")
    assert (await store.live("t"), await store.users_of("a")) == (1, [key])
    await store.append(key, 1, [Event("closed", 1.0)], replace(STANDING, phase="CLOSED", adapter="a"))
    assert await found(store, "t", "", ["c1"]) is None
    assert await store.of_response("t", "s-0") is None
    assert await store.users_of("a") == []
    assert await store.live("t") == 0
    assert await store.idle_since(1e12, 9) == []
    assert await store.in_phase("CLOSED") == [key]


async def test_a_transcript_that_only_a_closed_session_has_does_not_hide_a_shorter_one(
    store: SessionStore,
) -> None:
    await put(store, "closed", ["c1", "c2"], phase="CLOSED")
    await put(store, "open", ["c1"])
    assert await found(store, "t", "", ["c2", "c1"]) == TurnLocation("open", 0, 1)


def adapter(number: int, state: str = "live", key: SessionKey = KEY, **facts: Any) -> AdapterRecord:
    return AdapterRecord(key, f"a{number}", number, f"/store/a{number}", state, **facts)


async def test_the_last_word_on_an_adapter_counts(store: SessionStore) -> None:
    await store.append(KEY, 0, [turn()], STANDING, (), [adapter(2), adapter(1)])
    await store.append(KEY, 1, [turn()], STANDING, (), [adapter(2, "retired")])
    assert await store.adapters("t") == [adapter(1), adapter(2, "retired")]
    assert await store.adapters("u") == []
    assert await store.adapters() == await store.adapters("t")


async def test_an_adapter_whose_files_are_gone_is_retired_alone(store: SessionStore) -> None:
    await store.append(KEY, 0, [turn()], STANDING, (), [adapter(1), adapter(2)])
    await store.retired("a2")
    await store.retired("never was")
    assert await store.adapters("t") == [adapter(1), adapter(2, RETIRED)]
    assert await store.adapters("t", retired=False) == [adapter(1)]


async def test_the_last_use_of_an_adapter_is_the_last_append_to_a_session_that_it_serves(
    store: SessionStore,
) -> None:
    served = replace(STANDING, adapter="a1")
    await store.append(KEY, 0, [turn()], served, (), [adapter(1), adapter(2)])
    await store.append(SessionKey("t", "branch"), 0, [turn()], served)
    await store.append(SessionKey("t", "plain"), 0, [turn()], replace(STANDING, adapter=None))
    before = await store.adapters_used()
    assert before.keys() == {"a1"}
    await store.append(KEY, 1, [turn()], served)
    after = await store.adapters_used()
    assert after["a1"] > before["a1"]
    await store.retired("a1")
    assert await store.adapters(retired=False) == [adapter(1, RETIRED), adapter(2)], "sessions still name it"
    for key in (KEY, SessionKey("t", "branch")):
        await store.append(key, 2, [turn()], replace(served, phase="CLOSED"))
    assert await store.adapters_used() == {}


async def test_an_adapter_goes_over_to_the_session_that_appends_it(store: SessionStore) -> None:
    branch = SessionKey("t", "branch")
    await store.append(KEY, 0, [turn()], STANDING, (), [adapter(1)])
    await store.append(branch, 0, [turn()], STANDING, (), [adapter(1, RETIRED, branch)])
    await store.delete(KEY)
    assert await store.adapters("t") == [adapter(1, RETIRED, branch)]
    await store.delete(branch)
    assert await store.adapters("t") == []


async def test_an_adapter_outlives_its_session_on_record_until_its_files_are_gone(store: SessionStore) -> None:
    await store.append(KEY, 0, [turn()], STANDING, (), [adapter(1)])
    await store.delete(KEY)
    assert await store.adapters("t") == [adapter(1)]
    await store.retired("a1")
    assert await store.adapters("t") == []


async def test_what_an_adapter_is_stays_on_record_when_it_moves(store: SessionStore) -> None:
    facts = {"version": 2, "base_model": "small", "rank": 8, "size_bytes": 2**40, "created": 1.5}
    await store.append(KEY, 0, [turn()], STANDING, (), [adapter(1, **facts), adapter(2)])
    await store.append(KEY, 1, [turn()], STANDING, (), [adapter(1, "moved")])
    await store.index([adapter(2, **facts)])
    assert await store.adapters() == [adapter(1, "moved", **facts), adapter(2, **facts)]
    assert await store.adapter("a2") == adapter(2, **facts)
    assert await store.adapter("never was") is None


async def test_everything_of_a_deleted_session_is_gone_and_nothing_of_others(store: SessionStore) -> None:
    gone, stays = await put(store, "gone", ["c1"]), await put(store, "stays", ["c2"])
    same_name = SessionKey("u", "gone")
    await store.append(same_name, 0, [turn()], STANDING)
    await store.delete(gone)
    await store.delete(SessionKey("t", "never was"))
    assert await store.events(gone) == []
    assert await found(store, "t", "", ["c1"]) is None
    assert await store.keys() == [stays, same_name]
    assert await store.events(same_name) == [turn()]
    await put(store, "gone", ["c3"])
    assert await store.events(gone) == [turn()]


async def test_summaries_go_page_by_page_from_the_latest(store: SessionStore) -> None:
    keys = [await put(store, f"s{n}", ["c"]) for n in range(5)]
    await store.append(SessionKey("u", "x"), 0, [turn()], STANDING)
    await store.append(keys[1], 1, [turn(2)], SessionSnapshot("f", "SWITCHED", "c2", 2, "a"))
    first = await store.summaries("t", 2)
    second = await store.summaries("t", 9, first[-1].updated_at)
    assert [item.key.session for item in [*first, *second]] == ["s1", "s4", "s3", "s2", "s0"]
    assert (first[0].family, first[0].phase, first[0].turns, first[0].adapter) == ("f", "SWITCHED", 2, "a")
    assert len(await store.summaries(None, 9)) == 6


async def test_the_longest_idle_sessions_come_first(store: SessionStore) -> None:
    a, b, c = [await put(store, name, ["c"]) for name in "abc"]
    await store.append(a, 1, [turn(2)], STANDING)
    now = (await store.summaries(None, 1))[0].updated_at
    assert await store.idle_since(now, 9) == [b, c]
    assert await store.idle_since(now + 1, 2) == [b, c]
    assert await store.idle_since(now + 1, 9) == [b, c, a]


async def test_sessions_survive_reopening(url: str) -> None:
    first = SessionStore(url)
    await first.open()
    await first.append(KEY, 0, [turn()], STANDING)
    await first.close()
    second = SessionStore(url)
    await second.open()
    assert await second.events(KEY) == [turn()]
    assert await second.count() == 1
    await second.close()


async def test_sessions_are_listed_by_key_of_one_tenant_or_of_all(store: SessionStore) -> None:
    keys = [SessionKey("t", "B"), SessionKey("t", "a"), SessionKey("t", "é"), SessionKey("u", "a")]
    for key in reversed(keys):
        await store.append(key, 0, [turn()], STANDING)
    assert await store.keys() == keys
    assert await store.keys("u") == keys[3:]


async def test_reading_creates_nothing(tmp_path: Path) -> None:
    file = tmp_path / "none.db"
    with pytest.raises(ConfigError, match=r"found no file .*none\.db; expected a session store"):
        async with reading(f"sqlite+aiosqlite:///{file}"):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "content", "told"),
    [
        ("no url", None, "expected an SQLAlchemy URL"),
        ("sqlite:///{folder}/x.db", b"", r"found sqlite; expected sqlite\+aiosqlite or postgresql\+asyncpg"),
        (
            "sqlite+aiosqlite:///{folder}/x.db",
            b"",
            "found no table adapters, api_keys, audit, events, items, objects, record, sessions, texts",
        ),
        ("sqlite+aiosqlite:///{folder}/x.db", b"not a database" * 100, "cannot be read"),
        ("nosuch+driver://user:secret@host/db", None, "nosuch"),
        ("postgresql+asyncpg://user:secret@/db?host={folder}", None, "cannot be read"),
    ],
)
async def test_a_database_that_is_no_session_store_is_told_as_such(
    tmp_path: Path, url: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "x.db").write_bytes(content)
    with pytest.raises(ConfigError, match=told) as caught:
        async with reading(url.format(folder=tmp_path)):
            pass
    assert "secret" not in str(caught.value)


async def test_a_store_in_use_can_be_read(store: SessionStore, url: str) -> None:
    await store.append(KEY, 0, [turn()], STANDING)
    async with reading(url) as other:
        assert await other.events(KEY) == [turn()]
    await store.append(KEY, 1, [turn(2)], STANDING)


async def test_what_adapters_serve_is_listed_without_what_is_being_removed(store: SessionStore) -> None:
    for name, adapter, phase in (("a", "A", "SWITCHED"), ("b", None, "SWITCHED"), ("c", "C", "CLOSED")):
        standing = replace(STANDING, adapter=adapter, phase=phase)
        await store.append(SessionKey("t", name), 0, [turn()], standing)
    assert await store.served() == [(SessionKey("t", "a"), "A")]
