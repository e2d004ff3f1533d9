"""Issued API keys on a real SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from soma_vllm.config import Limits
from soma_vllm.errors import BadRequest, NotFound, StoreUnavailable
from soma_vllm.sessions.sql import api_keys
from soma_vllm.sessions.sql.api_keys import KEY_SHAPE, KeyStore
from soma_vllm.sessions.state.identity import tenant_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
async def store(file: Path) -> AsyncIterator[KeyStore]:
    store = KeyStore.at(f"sqlite+aiosqlite:///{file}")
    await store.open()
    yield store
    await store.close()


async def test_an_issued_key_is_verified_and_has_the_tenant_of_its_bearer_token(store: KeyStore) -> None:
    key_id, key = await store.add("Ana", Limits(requests_per_minute=7))
    found = await store.verify(key)
    assert found is not None
    assert (found.id, found.name, found.revoked_at) == (key_id, "Ana", None)
    assert found.tenant == tenant_of(f"Bearer {key}")
    assert found.limits.requests_per_minute == 7


async def test_only_limits_that_were_given_are_kept(store: KeyStore) -> None:
    key_id, _ = await store.add("Ana", Limits(tokens_per_minute=None, adapters=0))
    found = await store.find(key_id)
    assert found is not None
    assert found.limits.model_dump(exclude_unset=True) == {"tokens_per_minute": None, "adapters": 0}


async def test_the_secret_is_nowhere_in_the_database(store: KeyStore, file: Path) -> None:
    _, key = await store.add("Ana", Limits())
    await store.close()
    secret = key.rsplit("sk-soma-", 1)[1][13:].encode()
    for path in file.parent.iterdir():
        assert secret not in path.read_bytes()


async def test_no_two_keys_are_the_same(store: KeyStore) -> None:
    issued = [await store.add("Ana", Limits()) for _ in range(20)]
    assert len({key_id for key_id, _ in issued}) == 20
    assert len({key for _, key in issued}) == 20
    assert all(KEY_SHAPE.fullmatch(key) for _, key in issued)


async def test_a_key_that_was_revoked_is_refused_and_still_listed(store: KeyStore) -> None:
    key_id, key = await store.add("Ana", Limits())
    await store.revoke(key_id)
    assert await store.verify(key) is None
    (listed,) = await store.ls()
    assert listed.revoked_at is not None


async def test_revoking_twice_keeps_the_first_time(store: KeyStore) -> None:
    key_id, _ = await store.add("Ana", Limits())
    await store.revoke(key_id)
    first = await store.find(key_id)
    await store.revoke(key_id)
    assert await store.find(key_id) == first


async def test_revoking_an_unknown_id_says_so(store: KeyStore) -> None:
    with pytest.raises(NotFound, match="'0123456789ab': no key has this id"):
        await store.revoke("0123456789ab")


async def test_the_keys_are_listed_in_the_order_they_were_issued(store: KeyStore) -> None:
    for name in ("b", "a", "c"):
        await store.add(name, Limits())
    assert [key.name for key in await store.ls()] == ["b", "a", "c"]


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key[:-1],
        lambda key: key[:-1] + ("A" if key[-1] != "A" else "B"),
        lambda key: key.replace("sk-soma-", "sk-soma-0", 1),
        lambda key: key + "\n",
        lambda key: key.upper(),
        lambda key: "",
        lambda key: "sk-soma-" + "f" * 12 + "-" + "x" * 43,
        lambda key: "\ud800",
    ],
)
async def test_anything_but_the_whole_key_is_refused(store: KeyStore, change: object) -> None:
    _, key = await store.add("Ana", Limits())
    assert await store.verify(change(key)) is None


async def test_an_unknown_id_is_compared_as_a_known_one_is(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    real = api_keys.hmac.compare_digest

    def watched(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return real(left, right)

    monkeypatch.setattr(api_keys.hmac, "compare_digest", watched)
    _, key = await store.add("Ana", Limits())
    await store.verify(key)
    await store.verify(key[:-4] + "AAAA")
    await store.verify("sk-soma-" + "f" * 12 + "-" + "x" * 43)
    assert compared == [(64, 64)] * 3


async def test_a_given_key_must_have_the_shape_of_one_and_is_not_quoted(store: KeyStore) -> None:
    with pytest.raises(BadRequest, match="expected sk-soma-") as caught:
        await store.add("Ana", Limits(), key="hunter2")
    assert "hunter2" not in str(caught.value)


async def test_a_given_key_is_issued_as_it_is_once(store: KeyStore) -> None:
    given = "sk-soma-0123456789ab-" + "s" * 32
    assert await store.add("Ana", Limits(), key=given) == ("0123456789ab", given)
    with pytest.raises(BadRequest, match="0123456789ab is taken"):
        await store.add("Bo", Limits(), key=given)
    assert [key.name for key in await store.ls()] == ["Ana"]


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x00b", "n" * 129])
async def test_a_name_must_be_readable(store: KeyStore, name: str) -> None:
    with pytest.raises(BadRequest, match="printable"):
        await store.add(name, Limits())


async def test_a_database_without_tables_is_unavailable_and_nobody_is_let_in(tmp_path: Path) -> None:
    store = KeyStore.at(f"sqlite+aiosqlite:///{tmp_path}/empty.db")
    try:
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await store.verify("sk-soma-0123456789ab-" + "s" * 32)
    finally:
        await store.close()


async def test_a_directory_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    store = KeyStore.at(f"sqlite+aiosqlite:///{tmp_path}/none/s.db")
    try:
        with pytest.raises(StoreUnavailable):
            await store.ls()
    finally:
        await store.close()


async def test_limits_that_someone_broke_in_the_database_let_nobody_in(store: KeyStore, file: Path) -> None:
    key_id, key = await store.add("Ana", Limits())
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE api_keys SET limits = '{\"requests\": 1}'")
    connection.close()
    with pytest.raises(StoreUnavailable, match=f"key {key_id}: its limits"):
        await store.verify(key)
