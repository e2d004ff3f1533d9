"""`soma adapters` on a real store, without a server and beside one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.adapter_files import write_adapter
from typer.testing import CliRunner, Result

from soma_vllm.adapters.store.manifest import PublishedAdapter
from soma_vllm.adapters.store.opening import open_root
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.cli import adapters as command
from soma_vllm.cli.main import app
from soma_vllm.sessions.sql.records import AdapterRecord
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.types import SessionKey

runner = CliRunner()


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "local" else f"file://{tmp_path}/root"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/sessions.db"


@pytest.fixture
def config(tmp_path: Path, root: str, url: str) -> Path:
    path = tmp_path / "config.yaml"
    document = {
        "adapters": {"root": root, "cache": str(tmp_path / "cache"), "max_count": 1},
        "storage": {"url": url},
    }
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def store(root: str, tmp_path: Path, url: str) -> AdapterStore:
    async def record() -> str:
        sessions = SessionStore(url)
        await sessions.open()
        found = await sessions.record_id()
        await sessions.close()
        return found

    return open_root(root, tmp_path / "cache", owner=asyncio.run(record()))


def publish(store: AdapterStore, tmp_path: Path, tenant: str) -> PublishedAdapter:
    trained = write_adapter(tmp_path / "trained")
    return store.publish(SessionKey(tenant, "s"), trained, base_model="small", manifest={"losses": [1.0]})


@pytest.fixture
def names(store: AdapterStore, tmp_path: Path, url: str) -> list[str]:
    """Two adapters, on record."""
    made = [publish(store, tmp_path, tenant) for tenant in ("alice", "bob")]

    async def index() -> None:
        sessions = SessionStore(url)
        await sessions.index([AdapterRecord.moved(one.key, one.ref, "ACTIVE", one.facts()) for one in made])
        await sessions.close()

    asyncio.run(index())
    return [one.ref.name for one in made]


def soma(*arguments: str | Path) -> Result:
    return runner.invoke(app, ["adapters", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_listing_shows_what_is_published(config: Path, names: list[str]) -> None:
    listed = soma("ls", "--config", config)
    assert listed.exit_code == 0, listed.stderr
    for part in (*names, "2 adapters"):
        assert part in listed.stdout
    rows = json.loads(soma("ls", "--config", config, "--tenant", "bob", "--json").stdout)
    assert [(row["name"], row["tenant"], row["pinned"]) for row in rows] == [(names[1], "bob", False)]


def test_one_adapter_is_shown_whole(config: Path, names: list[str]) -> None:
    shown = json.loads(soma("show", names[0], "--config", config).stdout)
    assert (shown["name"], shown["training"], shown["pinned"]) == (names[0], {"losses": [1.0]}, False)
    nobody = soma("show", "soma-x", "--config", config)
    assert (nobody.exit_code, nobody.stdout) == (1, "")
    assert "no such name was ever given out" in nobody.stderr


def test_damage_is_found_and_told(config: Path, names: list[str], tmp_path: Path) -> None:
    assert soma("verify", "--config", config).stdout.count("sound") == 2
    for path in (tmp_path / "root" / "alice").rglob("adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    found = soma("verify", "--config", config)
    assert found.exit_code == 1
    assert f"sound      {names[1]}" in found.stdout
    assert f"damaged    adapter {names[0]} rejected" in found.stdout
    assert soma("verify", names[1], "--config", config).exit_code == 0


def test_offline_the_budgets_are_kept_and_pins_are_respected(
    config: Path, names: list[str], store: AdapterStore
) -> None:
    assert soma("pin", names[0], "--config", config).exit_code == 0
    swept = soma("gc", "--offline", "--config", config)
    assert swept.exit_code == 0, swept.stderr
    assert f"evicted    {names[1]} (count)" in swept.stdout
    assert [one.ref.name for one in store.list()] == [names[0]]
    assert soma("pin", names[0], "--off", "--config", config).exit_code == 0
    assert store.pins() == frozenset()


def test_offline_only_what_the_record_published_goes(
    config: Path,
    names: list[str],
    store: AdapterStore,
    root: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foreign = publish(open_root(root, tmp_path / "cache", owner="another record"), tmp_path, "carol")
    orphan = publish(store, tmp_path, "dave")
    assert "orphaned" not in soma("gc", "--offline", "--config", config).stdout, "it may be in the making"
    monkeypatch.setattr("soma_vllm.maintenance.adapter_eviction.ORPHAN_AFTER_S", 0.0)
    assert f"evicted    {orphan.ref.name} (orphaned)" in soma("gc", "--offline", "--config", config).stdout
    assert [one.ref.name for one in store.list()] == [names[1], foreign.ref.name]


def test_nothing_is_deleted_offline_under_a_running_server(
    config: Path, names: list[str], store: AdapterStore
) -> None:
    with store.in_service():
        for arguments in (("rm", names[0]), ("gc",)):
            refused = soma(*arguments, "--offline", "--config", config)
            assert refused.exit_code == 2
            assert "found a running server on this store" in refused.stderr
    assert len(store.list()) == 2
    assert soma("rm", names[0], "--offline", "--config", config).stdout == f"removed    {names[0]}\n"
    assert [one.ref.name for one in store.list()] == [names[1]]


def test_online_deletions_go_through_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    class Listening:
        def __init__(self, url: str, key_env: str) -> None:
            self.url = url

        def ask(self, method: str, path: str, below: str) -> Any:
            asked.append((self.url, method, below + path))
            return {"evicted": 3}

    monkeypatch.setattr(command, "Server", Listening)
    assert soma("rm", "soma-a/b", "--url", "http://there").exit_code == 0
    assert soma("gc", "--url", "http://there").stdout == "evicted    3\n"
    assert asked == [
        ("http://there", "DELETE", "/soma/adapters/soma-a%2Fb"),
        ("http://there", "POST", "/soma/adapters/gc"),
    ]


def test_a_store_that_nobody_names_and_a_folder_that_only_a_server_knows_are_told(tmp_path: Path) -> None:
    assert "found neither --config nor --root" in soma("ls").stderr
    path = tmp_path / "config.yaml"
    path.write_text("adapters: {root: '{run_dir}/adapters'}\n")
    refused = soma("ls", "--config", path)
    assert refused.exit_code == 2
    assert "names a running server's folder; give --root" in refused.stderr


def test_without_the_admin_key_a_server_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOMA_ADMIN_KEY", raising=False)
    refused = soma("rm", "soma-x")
    assert refused.exit_code == 1
    assert "found no SOMA_ADMIN_KEY" in refused.stderr
