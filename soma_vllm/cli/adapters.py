"""`soma adapters ls | show | verify | pin | rm | gc`: the adapter store, from the command line.

Guarantees: looking, verifying and pinning work on the store itself, with or without a server; what deletes
goes through the running server, which takes an adapter out of its engine first; with `--offline` it works on
the store and is refused while a server of this machine serves from it. Nothing here loads an engine.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Column, Table

from soma_vllm.cli.sessions import ADMIN_KEY, HERE, KeyEnv, Server, Url
from soma_vllm.config import Config, load_config
from soma_vllm.errors import AdapterError, BadRequest, ConfigError, NotFound, SomaError

if TYPE_CHECKING:
    from soma_vllm.adapters.store.manifest import PublishedAdapter
    from soma_vllm.adapters.store.protocol import AdapterStore

app = typer.Typer(no_args_is_help=True)

ConfigPath = Annotated[Path | None, typer.Option("--config", help="The server's configuration.")]
Root = Annotated[str | None, typer.Option("--root", help="The store's directory or URL, before --config's.")]
Tenant = Annotated[str | None, typer.Option(help="Only this tenant's.")]
Offline = Annotated[bool, typer.Option("--offline", help="On the store itself; no server may be running.")]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]

MIB = 1024 * 1024


@app.command("ls")
def list_adapters(
    config: ConfigPath = None, root: Root = None, tenant: Tenant = None, as_json: Json = False
) -> None:
    """What is published, oldest first."""
    with _one_line_errors():
        store = _opened(config, root)
        listed, pins = store.list(tenant), store.pins()
        used = _last_uses(config)
    rows = [_row(adapter, used, adapter.ref.name in pins) for adapter in listed]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(
        Column("adapter", overflow="fold"),
        Column("session", overflow="fold"),
        "version",
        "rank",
        "MiB",
        "published",
        "last used",
        "pinned",
    )
    for row in rows:
        table.add_row(
            row["name"],
            row["session"],
            str(row["version"]),
            str(row["rank"]),
            f"{row['bytes'] / MIB:.1f}",
            _time(row["created"]),
            _time(row["last_used"]) if row["last_used"] else "-",
            "yes" if row["pinned"] else "-",
        )
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"{len(rows)} adapters, {sum(row['bytes'] for row in rows) / MIB:.1f} MiB")


@app.command("show")
def show(name: str, config: ConfigPath = None, root: Root = None) -> None:
    """All that is known of one adapter."""
    with _one_line_errors():
        store = _opened(config, root)
        typer.echo(json.dumps({**store.manifest(name), "pinned": name in store.pins()}, indent=1))


@app.command("verify")
def verify(
    name: Annotated[str | None, typer.Argument(help="One adapter; without it all.")] = None,
    config: ConfigPath = None,
    root: Root = None,
) -> None:
    """Read every byte again: whole, finite, of the right shapes, and what was published."""
    damaged = 0
    with _one_line_errors():
        store = _opened(config, root, judging=True)
        names = [adapter.ref.name for adapter in store.list()] if name is None else [name]
        for one in names:
            try:
                store.verify(one)
                typer.echo(f"sound      {one}")
            except AdapterError as error:
                damaged += 1
                typer.echo(f"damaged    {error}")
    if damaged:
        raise typer.Exit(1)


@app.command("pin")
def pin(
    name: str,
    config: ConfigPath = None,
    root: Root = None,
    off: Annotated[bool, typer.Option("--off", help="Let it go again.")] = False,
) -> None:
    """Have an adapter never evicted. `rm` and the removal of its session still remove it."""
    with _one_line_errors():
        _opened(config, root).pin(name, not off)
    typer.echo(f"{'let go    ' if off else 'pinned    '} {name}")


@app.command("rm")
def remove(
    name: str,
    url: Url = HERE,
    key_env: KeyEnv = ADMIN_KEY,
    offline: Offline = False,
    config: ConfigPath = None,
    root: Root = None,
) -> None:
    """Remove one adapter; its sessions go back to the original."""
    with _one_line_errors():
        if offline:
            _opened_alone(config, root).retire(name)
        else:
            Server(url, key_env).ask("DELETE", f"/{quote(name, safe='')}", below="/soma/adapters")
    typer.echo(f"removed    {name}")


@app.command("gc")
def collect(
    url: Url = HERE,
    key_env: KeyEnv = ADMIN_KEY,
    offline: Offline = False,
    config: ConfigPath = None,
    root: Root = None,
) -> None:
    """Evict what the budgets do not allow; offline also delete what kills left behind."""
    with _one_line_errors():
        if not offline:
            found = Server(url, key_env).ask("POST", "/gc", below="/soma/adapters")
            typer.echo(f"evicted    {found['evicted']}")
            return
        store = _opened_alone(config, root)
        typer.echo(f"collected  {store.collect_garbage()}")
        for eviction in _beyond_budgets(store, config):
            store.retire(eviction.name)
            typer.echo(f"evicted    {eviction.name} ({eviction.reason})")


def _beyond_budgets(store: AdapterStore, config: Path | None) -> Any:
    """What the configuration's budgets do not allow."""
    from soma_vllm.adapters.eviction_policy import StoredAdapter, to_evict

    if config is None:
        return ()
    used, pins = _last_uses(config), store.pins()
    kept = [
        StoredAdapter(
            name := one.ref.name,
            one.key.tenant,
            one.size_bytes,
            max(one.created, used.get(name, 0.0)),
            name in pins,
        )
        for one in store.list()
    ]
    return to_evict(kept, load_config(config).adapters, time.time())


def _row(adapter: PublishedAdapter, used: dict[str, float], pinned: bool) -> dict[str, Any]:
    return {
        **adapter.view(),
        "last_used": used.get(adapter.ref.name),
        "pinned": pinned,
    }


def _opened(config: Path | None, root: str | None, judging: bool = False) -> AdapterStore:
    """The store that the command line names; for judging, with what the configuration demands of adapters.

    Raises:
        ConfigError: it is not known.
    """
    from soma_vllm.adapters.store.opening import open_root
    from soma_vllm.adapters.store.verify import NOTHING

    if config is None and root is None:
        raise ConfigError("command line", ["found neither --config nor --root; expected one of them"])
    settings = Config() if config is None else load_config(config)
    where = root or _filled(settings.adapters.root, "adapters.root", "--root", settings, config)
    cache = _filled(settings.adapters.cache, "adapters.cache", "a folder there", settings, config)
    demands = _demands(settings) if judging and config is not None else NOTHING
    return open_root(where, cache, demands=demands)


def _opened_alone(config: Path | None, root: str | None) -> AdapterStore:
    """The same, while no server of this machine serves from it. Raises BadRequest."""
    store = _opened(config, root)
    if store.serves():
        raise BadRequest("found a running server on this store; expected none with --offline")
    return store


def _demands(settings: Config) -> Any:
    """What the server would demand, where its surrogate is on this machine."""
    from soma_vllm.adapters.store.verify import Demands
    from soma_vllm.models.hub import folder_here

    model = None if settings.surrogate_model is None else folder_here(settings.surrogate_model)
    rank = settings.lora.rank
    return Demands(max_rank=rank) if model is None else Demands.of_model(model, rank)


def _last_uses(config: Path | None) -> dict[str, float]:
    """Last use by adapter, as the session store has it; nothing where there is none."""
    from soma_vllm.sessions.sql.store import reading

    async def ask(url: str) -> dict[str, float]:
        async with reading(url) as store:
            return await store.adapters_used()

    if config is None:
        return {}
    settings = load_config(config)
    try:
        url = _filled(settings.storage.url, "storage.url", "a database", settings, config)
        return asyncio.run(ask(url))
    except ConfigError:
        return {}


def _filled(template: str, key: str, instead: str, settings: Config, config: Path | None) -> str:
    from soma_vllm.models.home import soma_home

    run_dir = settings.server.run_dir
    if "{run_dir}" in template and run_dir is None:
        found = f"{key}: found {template!r}, which names a running server's folder; give {instead}"
        raise ConfigError(str(config), [found])
    filled = None if run_dir is None else Path(run_dir).expanduser().absolute()
    return template.format(soma_home=soma_home(), run_dir=filled)


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except SomaError as error:
        typer.echo(f"soma adapters: {' '.join(str(error).split())}", err=True)
        wrong = isinstance(error, ConfigError | BadRequest) and not isinstance(error, NotFound)
        raise typer.Exit(2 if wrong else 1) from None
