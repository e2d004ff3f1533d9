"""What other users and child processes of a machine see: private files, and no secret of the environment."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.adapter_files import write_adapter
from typer.testing import CliRunner

from soma_vllm import logs, private
from soma_vllm.adapters.store.bucket import Bucket
from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.app import serve
from soma_vllm.app.run_dir import make_run_dir
from soma_vllm.app.terminal import output_to
from soma_vllm.baselines.process import BaselineProcess, ProcessLimits
from soma_vllm.cli.main import app
from soma_vllm.config import Server, parse_config
from soma_vllm.engines.child_process import ChildProcess
from soma_vllm.errors import ConfigError, NotFound
from soma_vllm.sessions.sql.records import SessionSnapshot
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")
SECRET_URL = "postgresql+asyncpg://me:p4ssword@db.example.org/soma"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _careless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The umask that lets everybody in, and an environment that is restored."""
    before = os.umask(0)
    monkeypatch.setattr(private, "_withheld", {})
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    os.umask(before)


def seen_by_others(folder: Path) -> list[str]:
    """What another user can read or list below a folder."""

    def open_to_others(path: Path) -> bool:
        return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))

    found = []
    for path in folder.rglob("*"):
        within = [parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]
        if open_to_others(path) and all(map(open_to_others, within)):
            found.append(str(path.relative_to(folder)))
    return found


async def test_a_database_and_its_write_ahead_log_are_its_owners_alone(tmp_path: Path) -> None:
    store = SessionStore(f"sqlite+aiosqlite:///{tmp_path}/s.db")
    await store.open()
    await store.append(
        KEY, 0, [Event("turn", 1.0, {}, {"answer": "a"})], SessionSnapshot("", "X", "c", 1, None)
    )
    assert {path.name for path in tmp_path.iterdir()} == {"s.db", "s.db-wal", "s.db-shm"}
    assert seen_by_others(tmp_path) == []
    await store.close()


async def test_a_database_of_an_older_version_becomes_private_when_it_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "s.db"
    file.touch(0o644)
    store = SessionStore(f"sqlite+aiosqlite:///{file}")
    await store.open()
    await store.close()
    assert seen_by_others(tmp_path) == []


def test_adapters_run_folders_and_logs_are_their_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMA_HOME", str(tmp_path))
    (trained := tmp_path / "trained").mkdir(0o700)
    adapters = FilesystemAdapterStore(tmp_path / "adapters", owner="o")
    with adapters.in_service():
        adapters.publish(KEY, write_adapter(trained / "made"), base_model="b", manifest={})
    make_run_dir(None)
    run_dir = make_run_dir(str(tmp_path / "configured"))
    with pytest.raises(ZeroDivisionError), output_to(run_dir / "surrogate.log", Server()):
        raise ZeroDivisionError
    assert (run_dir / "surrogate.log").stat().st_mode & 0o777 == 0o600
    assert seen_by_others(tmp_path) == []


def test_weights_are_private_below_a_root_that_everybody_reads(tmp_path: Path) -> None:
    (trained := tmp_path / "trained").mkdir(0o700)
    (root := tmp_path / "adapters").mkdir(0o755)
    published = FilesystemAdapterStore(root).publish(
        KEY, write_adapter(trained / "made"), base_model="b", manifest={}
    )
    assert Path(published.ref.path).is_relative_to(root)
    assert not [name for name in seen_by_others(root) if name.endswith((".safetensors", ".json"))]


@pytest.mark.parametrize("command", ["soma-serve", "soma"])
def test_each_command_works_under_a_private_umask(tmp_path: Path, command: str) -> None:
    if command == "soma":
        CliRunner().invoke(app, ["keys", "ls", "--storage", f"sqlite+aiosqlite:///{tmp_path}/s.db"])
    else:
        CliRunner().invoke(serve.app, ["--config", str(ROOT / "configs/default.yaml"), "--check"])
    (tmp_path / "made").touch()
    assert seen_by_others(tmp_path) == []


def test_models_that_soma_fetches_may_serve_several_users(tmp_path: Path) -> None:
    CliRunner().invoke(app, ["models", "ls"])
    (tmp_path / "made").touch()
    assert seen_by_others(tmp_path) == ["made"]


def test_the_storage_url_is_the_one_given_else_the_environments_else_the_default() -> None:
    given = "sqlite+aiosqlite:///given.db"
    assert parse_config({}, "test").storage.location.endswith("/sessions.db")
    os.environ["SOMA_STORAGE_URL"], os.environ["OTHER"] = SECRET_URL, "sqlite+aiosqlite:///other.db"
    assert parse_config({}, "test").storage.location == SECRET_URL
    assert parse_config({"storage": {"url_env": "OTHER"}}, "test").storage.location.endswith("other.db")
    assert parse_config({"storage": {"url": given}}, "test").storage.location == given
    private.withhold(["SOMA_STORAGE_URL"])
    assert parse_config({}, "test").storage.location == SECRET_URL


def test_soma_keys_asks_the_database_of_the_environment(tmp_path: Path) -> None:
    os.environ["SOMA_STORAGE_URL"] = f"sqlite+aiosqlite:///{tmp_path}/environment.db"
    done = CliRunner().invoke(app, ["keys", "add", "Ana", "--config", str(ROOT / "configs/default.yaml")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "environment.db").is_file()


def test_soma_serve_takes_its_secrets_out_of_the_environment_and_keeps_them() -> None:
    secrets = {"SOMA_ADMIN_KEY": "a", "SOMA_STORAGE_URL": SECRET_URL, "HF_TOKEN": "h", "MY_KEY": "k"}
    os.environ.update(secrets)
    words = ["--config", str(ROOT / "configs/default.yaml"), "--check"]
    more = ["original.url=https://o.example.org/v1", "original.name=o", "original.api_key_env=MY_KEY"]
    more.append("surrogate_model=/none-such")
    CliRunner().invoke(serve.app, [*words, *(word for one in more for word in ("--set", one))])
    assert not secrets.keys() & os.environ.keys()
    assert {name: private.secret(name) for name in secrets} == secrets


async def test_no_child_inherits_a_withheld_secret(tmp_path: Path) -> None:
    os.environ["HF_TOKEN"] = "hidden-token"
    private.withhold(["HF_TOKEN"])
    out = tmp_path / "environment"
    child = ChildProcess([sys.executable, "-c", "import os; print(dict(os.environ))"])
    with out.open("wb") as file:
        child.start_with(file)
    while child.alive():
        await asyncio.sleep(0.01)
    await child.stop()
    assert "PATH" in out.read_text()
    assert "hidden-token" not in out.read_text()


@pytest.mark.parametrize(("package", "has_it"), [("routellm", True), ("llmlingua2", False)])
def test_the_package_that_embeds_at_openai_alone_is_given_the_key(
    tmp_path: Path, package: str, has_it: bool
) -> None:
    os.environ["OPENAI_API_KEY"] = "k"
    private.withhold(private.SECRETS)
    process = BaselineProcess(package, dict, tmp_path, ProcessLimits(1, 1.0, 1.0))
    assert (process._environment().get("OPENAI_API_KEY") == "k") is has_it


def test_no_log_line_holds_the_password_of_a_url() -> None:
    for formatter in (logs.TextFormatter(), logs.JsonFormatter()):
        try:
            raise ValueError(f"cannot open {SECRET_URL}")
        except ValueError:
            record = logging.LogRecord(
                "soma_vllm.x", logging.ERROR, "", 0, "lost %s", (SECRET_URL,), sys.exc_info()
            )
        line = formatter.format(record)
        assert "p4ssword" not in line
        assert line.count("me:***@db.example.org") >= 2
        if isinstance(formatter, logs.JsonFormatter):
            assert json.loads(line)["message"].endswith("me:***@db.example.org/soma")


@pytest.mark.parametrize("wrong", [{"url": [SECRET_URL]}, {"url": SECRET_URL, "url_env": [SECRET_URL]}])
def test_a_mistake_in_the_configuration_is_told_without_the_password(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"storage": wrong}, "test")
    assert "p4ssword" not in str(caught.value)
    assert "me:***@" in str(caught.value)


def test_a_command_that_fails_tells_no_password() -> None:
    done = CliRunner().invoke(
        app, ["keys", "ls", "--storage", SECRET_URL.replace("db.example.org", "127.0.0.1:1")]
    )
    assert done.exit_code != 0
    assert "p4ssword" not in done.output + done.stderr


@pytest.mark.parametrize(
    ("told", "masked"),
    [
        ("postgresql://u:p@ss@h/db", "postgresql://u:***@h/db"),
        ("s3://u:secret@h/root: gone", "s3://u:***@h/root: gone"),
        ("http://host:8000/a?to=bob@example.org", "http://host:8000/a?to=bob@example.org"),
    ],
)
def test_a_password_is_masked_whole_and_nothing_else_is(told: str, masked: str) -> None:
    assert private.masked(told) == masked


def test_an_error_of_an_object_store_tells_no_password() -> None:
    with pytest.raises(NotFound) as told:
        Bucket("memory://u:secret@h/root").read("missing")
    assert "secret" not in str(told.value)
