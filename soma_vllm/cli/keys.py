"""`soma keys`: issue, list and revoke API keys, for servers with `access.mode: keys`.

Guarantees: a key is printed once, alone on stdout, and stored nowhere; only `add` creates a session store;
running servers take changes up by themselves. Loads no engine. Every SomaError ends as one line on stderr, with
exit code 2 when the input was wrong and 1 otherwise.
"""

from __future__ import annotations

import asyncio
import getpass
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from soma_vllm.config import Limits, load_config
from soma_vllm.errors import ConfigError
from soma_vllm.private import PRIVATE_FOLDER
from soma_vllm.tools.command_line import fill_paths, one_line_errors

if TYPE_CHECKING:
    from soma_vllm.sessions.sql.api_keys import ApiKey, KeyStore

app = typer.Typer(help="Issue, list and revoke API keys.", no_args_is_help=True)

UNLIMITED = "unlimited"

ConfigPath = Annotated[Path | None, typer.Option("--config", help="The server's configuration.")]
StorageUrl = Annotated[
    str | None, typer.Option("--storage", help="SQLAlchemy URL of the session store, instead of --config.")
]


def _limit(flag: str, what: str) -> Any:
    return typer.Option(flag, metavar=f"N|{UNLIMITED}", help=f"{what}; without it, as the configuration says.")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is, for people.")],
    config: ConfigPath = None,
    storage: StorageUrl = None,
    requests_per_minute: Annotated[str | None, _limit("--requests-per-minute", "Requests in a minute")] = None,
    tokens_per_minute: Annotated[str | None, _limit("--tokens-per-minute", "Tokens in a minute")] = None,
    live_sessions: Annotated[str | None, _limit("--live-sessions", "Sessions at a time")] = None,
    adapters: Annotated[str | None, _limit("--adapters", "Adapters at a time")] = None,
    policies: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Policies as in limits.policies; `*`: all.")
    ] = None,
) -> None:
    """Issue a key. It is printed once, on stdout; only its digest is kept."""
    with one_line_errors("soma keys"):
        limits = _limits(
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            live_sessions=live_sessions,
            adapters=adapters,
        )
        if policies is not None:
            names = tuple(filter(None, map(str.strip, policies.split(","))))
            limits = limits.model_copy(update={"policies": names})
        key_id, key = asyncio.run(_add(storage_url(config, storage), name, limits))
    typer.echo(f"key {key_id} for {name}; it is shown this once, keep it safe:", err=True)
    typer.echo(key)


@app.command("ls")
def list_keys(config: ConfigPath = None, storage: StorageUrl = None) -> None:
    """List the keys: id, name, tenant, limits, when issued, state."""
    with one_line_errors("soma keys"):
        found = asyncio.run(_list(storage_url(config, storage)))
    table = Table(box=None, pad_edge=False)
    for column in ("ID", "NAME", "TENANT", "LIMITS", "ISSUED", "STATE"):
        table.add_column(column, no_wrap=column in ("ID", "TENANT"), overflow="fold")
    for key in found:
        state = "in use" if key.revoked_at is None else f"revoked {_date(key.revoked_at)}"
        table.add_row(key.id, key.name, key.tenant, _describe(key.limits), _date(key.created_at), state)
    Console(highlight=False, markup=False).print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `soma keys ls` shows it.")],
    config: ConfigPath = None,
    storage: StorageUrl = None,
) -> None:
    """End a key's use. A running server refuses it after at most `access.cache_s`."""
    with one_line_errors("soma keys"):
        asyncio.run(_revoke(storage_url(config, storage), key_id))
    typer.echo(f"key {key_id} is revoked")


async def _add(url: str, name: str, limits: Limits) -> tuple[str, str]:
    async with _store(url, create=True) as store:
        return await store.add(name, limits, by=operator())


async def _list(url: str) -> list[ApiKey]:
    async with _store(url) as store:
        return await store.ls()


async def _revoke(url: str, key_id: str) -> None:
    async with _store(url) as store:
        await store.revoke(key_id, operator())


@asynccontextmanager
async def _store(url: str, create: bool = False) -> AsyncIterator[KeyStore]:
    """The keys of a session store; with `create`, of one that is made if need be.

    Raises:
        ConfigError: there is no store at this URL, or no folder to make it in.
    """
    from soma_vllm.models.home import soma_home
    from soma_vllm.sessions.sql.api_keys import KeyStore
    from soma_vllm.sessions.sql.connections import parse, told
    from soma_vllm.sessions.sql.store import reading

    parsed = parse(url)
    if create and parsed.get_backend_name() == "sqlite" and parsed.database:
        folder = Path(parsed.database).parent
        if folder == soma_home():
            folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        elif not folder.is_dir():
            raise ConfigError(told(parsed), [f"found no folder {folder}; expected one for the session store"])
    async with nullcontext() if create else reading(url):
        store = KeyStore.at(url)
        try:
            if create:
                await store.open()
            yield store
        finally:
            await store.close()


def _limits(**given: str | None) -> Limits:
    """The limits that were given; the others stay unset.

    Raises:
        ConfigError: with every mistake.
    """
    problems, values = [], dict[str, int | None]()
    for name, text in given.items():
        if text is None:
            continue
        try:
            values[name] = None if text == UNLIMITED else int(text)
            Limits.model_validate({name: values[name]})
        except ValueError:
            problems.append(f"--{name.replace('_', '-')}: found {text!r}; expected a number or {UNLIMITED}")
    if problems:
        raise ConfigError("command line", problems)
    return Limits.model_validate(values)


def storage_url(config: Path | None, storage: str | None) -> str:
    """The session store's URL, filled in.

    Raises:
        ConfigError: it is not known.
    """
    if (config is None) == (storage is None):
        found = "neither" if config is None else "both"
        raise ConfigError("command line", [f"found {found} of --config and --storage; expected one of them"])
    if config is None:
        assert storage is not None
        return storage
    settings = load_config(config)
    return fill_paths(settings.storage.location, "storage.url", "--storage", settings)


def operator() -> str:
    """Who gives a command's order, for the audit trail."""
    try:
        return f"operator {getpass.getuser()}"[:64]
    except (KeyError, OSError):  # a user that the system does not know
        return f"operator {os.getuid()}"


def _describe(limits: Limits) -> str:
    own = limits.model_dump(exclude_unset=True)
    shown = {name: ", ".join(most) if isinstance(most, tuple) else most for name, most in own.items()}
    lines = (f"{name.replace('_', ' ')} {UNLIMITED if most is None else most}" for name, most in shown.items())
    return "\n".join(lines) or "-"


def _date(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")
