"""`soma keys` on a real session store."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from soma_vllm.cli.main import app
from soma_vllm.sessions.sql.api_keys import KEY_SHAPE, ApiKey, KeyStore

runner = CliRunner()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/sessions.db"


def soma(*arguments: str) -> Result:
    return runner.invoke(app, ["keys", *arguments])


def verified(url: str, key: str) -> ApiKey | None:
    async def ask() -> ApiKey | None:
        store = KeyStore.at(url)
        try:
            return await store.verify(key)
        finally:
            await store.close()

    return asyncio.run(ask())


def test_an_added_key_is_alone_on_stdout_and_good_at_once(url: str) -> None:
    added = soma("add", "Ana", "--storage", url, "--requests-per-minute", "9", "--adapters", "unlimited")
    assert added.exit_code == 0
    key = added.stdout.strip()
    assert KEY_SHAPE.fullmatch(key)
    assert "shown this once" in added.stderr
    found = verified(url, key)
    assert found is not None
    assert found.limits.model_dump(exclude_unset=True) == {"requests_per_minute": 9, "adapters": None}


def test_the_listing_shows_everything_but_the_keys(url: str) -> None:
    key = soma("add", "Ana", "--storage", url, "--live-sessions", "3").stdout.strip()
    soma("add", "Bo", "--storage", url)
    listed = soma("ls", "--storage", url).stdout
    found = verified(url, key)
    assert found is not None
    for part in (found.id, "Ana", "Bo", found.tenant, "live sessions 3", "in use"):
        assert part in listed
    assert key not in listed
    assert found.digest not in listed


def test_a_revoked_key_is_good_no_longer_and_says_so_in_the_listing(url: str) -> None:
    key = soma("add", "Ana", "--storage", url).stdout.strip()
    found = verified(url, key)
    assert found is not None
    assert soma("revoke", found.id, "--storage", url).exit_code == 0
    assert verified(url, key) is None
    assert "revoked" in soma("ls", "--storage", url).stdout


def test_revoking_an_unknown_id_fails_in_one_line(url: str) -> None:
    soma("add", "Ana", "--storage", url)
    refused = soma("revoke", "0123456789ab", "--storage", url)
    assert refused.exit_code == 1
    assert refused.stderr == "soma keys: key '0123456789ab': no key has this id\n"


@pytest.mark.parametrize("command", [("ls",), ("revoke", "0123456789ab")])
def test_only_add_creates_a_session_store(url: str, tmp_path: Path, command: tuple[str, ...]) -> None:
    refused = soma(*command, "--storage", url)
    assert refused.exit_code == 2
    assert "found no file" in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--requests-per-minute", "0"), "--requests-per-minute: found '0'; expected a number or unlimited"),
        (("--adapters", "-1"), "--adapters: found '-1'"),
        (("--tokens-per-minute", "many"), "--tokens-per-minute: found 'many'"),
        (("--live-sessions", "x", "--adapters", "y"), "--adapters: found 'y'"),
    ],
)
def test_a_wrong_limit_is_told_before_anything_is_created(
    url: str, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    refused = soma("add", "Ana", "--storage", url, *arguments)
    assert refused.exit_code == 2
    assert told in refused.stderr
    assert not list(tmp_path.iterdir())


def test_an_unreadable_name_is_told_and_nothing_is_printed_on_stdout(url: str) -> None:
    refused = soma("add", "A\nB", "--storage", url)
    assert (refused.exit_code, refused.stdout) == (2, "")


@pytest.mark.parametrize("arguments", [(), ("--config", "c.yaml", "--storage", "u")])
def test_one_of_config_and_storage_is_needed(arguments: tuple[str, ...]) -> None:
    refused = soma("ls", *arguments)
    assert refused.exit_code == 2
    assert "of --config and --storage; expected one of them" in refused.stderr


def test_a_url_that_is_none_is_one_line() -> None:
    for command in (("add", "Ana"), ("ls",)):
        refused = soma(*command, "--storage", "nonsense")
        assert refused.exit_code == 2
        assert "sqlite+aiosqlite:///" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_a_store_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    refused = soma("add", "Ana", "--storage", f"sqlite+aiosqlite:///{tmp_path}/none/s.db")
    assert refused.exit_code == 2
    assert "found no folder" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_the_configurations_store_is_found_under_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMA_HOME", str(tmp_path / "home"))
    plain, running = tmp_path / "plain.yaml", tmp_path / "running.yaml"
    plain.write_text("{}\n")
    (tmp_path / "run").mkdir()
    url = "sqlite+aiosqlite:///{run_dir}/r.db"
    running.write_text(f"storage: {{url: '{url}'}}\nserver: {{run_dir: {tmp_path}/run}}\n")
    assert soma("add", "Ana", "--config", str(plain)).exit_code == 0
    assert soma("add", "Bo", "--config", str(running)).exit_code == 0
    assert (tmp_path / "home" / "sessions.db").is_file()
    assert (tmp_path / "run" / "r.db").is_file()


def test_a_store_in_a_folder_that_only_a_running_server_knows_must_be_named(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("storage: {url: 'sqlite+aiosqlite:///{run_dir}/r.db'}\n")
    refused = soma("ls", "--config", str(config))
    assert refused.exit_code == 2
    assert "give --storage" in refused.stderr


def test_the_command_loads_nothing_heavy(url: str) -> None:
    code = (
        "import sys; from soma_vllm.cli.main import app;"
        f"app(['keys', 'add', 'Ana', '--storage', {url!r}], standalone_mode=False);"
        "print([m for m in ('torch', 'ray', 'vllm', 'fastapi', 'transformers') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"
