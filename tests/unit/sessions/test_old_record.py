"""A database and a configuration of version 0.1 load, and mean what they meant."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from soma_vllm.config import Config, load_config
from soma_vllm.sessions.lookup import SessionLookup
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.sql.records import AdapterRecord
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.fold import restore
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.transcript import read
from soma_vllm.types import AdapterRef, Candidate, Role, SessionKey

DATA = Path(__file__).parents[2] / "data"
"""`sessions_0_1.sql`: what version 0.1 recorded of sessions alpha (switched to an adapter), a branch of it,
beta (in its warm start) and gamma (rolled back). `config_0_1.yaml`: every key of version 0.1."""

TENANT = "8254c329a92850f6"
BRANCH = "alpha~6513270e269e"
ADAPTER = AdapterRef("adapter-alpha-1", 1, "/adapters/soma-train-1")
KEY = "sk-soma-0123456789ab-" + "s" * 32
CONFIG = Config()


@pytest.fixture
def url(tmp_path: Path) -> str:
    file = tmp_path / "sessions.db"
    with sqlite3.connect(file) as database:
        database.executescript((DATA / "sessions_0_1.sql").read_text(encoding="utf-8"))
    database.close()
    return f"sqlite+aiosqlite:///{file}"


@pytest.fixture
async def old(url: str) -> Any:
    store = SessionStore(url)
    await store.open()
    yield store
    await store.close()


async def test_every_session_of_an_old_database_is_restored_as_it_was(old: SessionStore) -> None:
    keys = await old.keys()
    assert [key.session for key in keys] == ["alpha", BRANCH, "beta", "gamma"]
    alpha, branch, beta, gamma = [restore(key, await old.events(key), CONFIG.gate) for key in keys]
    assert [s.phase for s in (alpha, branch, beta, gamma)] == [
        Phase.SWITCHED,
        Phase.SWITCHED,
        Phase.WARM_START,
        Phase.ROLLED_BACK,
    ]
    for session in (alpha, branch):
        assert (session.family, session.serving) == ("alpha", Candidate.ADAPTER)
        assert session.adapter == ADAPTER
        assert session.centroid == (1.0, 0.0, 0.0)
        assert (session.learned, session.switches) == (2, 1)
        assert [turn.engine for turn in session.turns] == [Role.ORIGINAL, Role.ORIGINAL, Role.SURROGATE]
        assert session.turns[-1].adapter == ADAPTER.name
        assert session.adapting is not None
    assert alpha.trainings == 1
    assert alpha.turns[-1].gap == 0.0
    assert alpha.turns[:2] == branch.turns[:2]
    assert branch.turns[-1].messages[-1]["content"] == "question 3, said otherwise"
    assert [turn.answer for turn in beta.turns] == ["same"]
    assert (gamma.rollbacks, gamma.cool_downs, gamma.warm_from, gamma.adapter) == (1, 1, 5, None)
    assert [turn.gap for turn in gamma.turns] == [None, None, 0.0, 1.0, 1.0]


async def test_the_turns_adapters_and_keys_of_an_old_database_are_found(old: SessionStore, url: str) -> None:
    alpha = SessionKey(TENANT, "alpha")
    assert set(await old.users_of(ADAPTER.name)) == {alpha, SessionKey(TENANT, BRANCH)}
    assert await old.adapters() == [
        AdapterRecord(SessionKey(TENANT, BRANCH), ADAPTER.name, 1, ADAPTER.path, "ACTIVE")
    ]
    session = restore(alpha, await old.events(alpha), CONFIG.gate)
    reading = read(TENANT, [*session.transcript(), {"role": "user", "content": "question 4"}])
    lookup = SessionLookup(SessionRegistry(CONFIG, old))
    assert await lookup.place(TENANT, "alpha", reading) == alpha
    keys = KeyStore.at(url)
    found = await keys.verify(KEY)
    assert found is not None
    assert (found.name, found.limits.requests_per_minute) == ("Ana", 60)
    await keys.close()


def test_an_old_configuration_loads_and_each_of_its_keys_means_the_same() -> None:
    file = DATA / "config_0_1.yaml"
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert not differences(written, load_config(file).model_dump(mode="json"))


def differences(written: Mapping[str, Any], loaded: Mapping[str, Any], within: str = "") -> list[str]:
    """Dotted names of keys that have another value once loaded."""
    found = []
    for name, value in written.items():
        now = loaded.get(name)
        if isinstance(value, Mapping) and isinstance(now, Mapping):
            found += differences(value, now, f"{within}{name}.")
        elif now != value:
            found.append(f"{within}{name}: {value!r} is {now!r}")
    return found
