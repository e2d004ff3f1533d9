"""`soma adapters ls | show | verify | pin | rm | gc`: the adapter store, from the command line.

Guarantees: listing, verifying and pinning work on the store itself, with or without a server; deletions go
through the running server, which takes an adapter out of its engine first; with `--offline` they work on the
store and are refused while a server of this machine serves from it. Nothing here loads an engine.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Column, Table

from soma_vllm.cli.sessions import ADMIN_KEY, HERE, KeyEnv, Server, Url, shown_time
from soma_vllm.config import Config, load_config
from soma_vllm.errors import AdapterError, BadRequest, ConfigError
from soma_vllm.tools.command_line import fill_paths, one_line_errors

if TYPE_CHECKING:
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
    """List the published adapters, oldest first."""
    with one_line_errors("soma adapters"):
        store = _open(config, root)
        listed, pins = store.list(tenant), store.pins()
        used = _on_record(config).used
    rows = [
        {**one.view(), "last_used": used.get(one.ref.name), "pinned": one.ref.name in pins} for one in listed
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    folding = (Column(name, overflow="fold") for name in ("adapter", "session"))
    table = Table(*folding, "version", "rank", "MiB", "published", "last used", "pinned")
    for row in rows:
        numbers = (
            str(row["version"]),
            str(row["rank"]),
            f"{row['bytes'] / MIB:.1f}",
            shown_time(row["created"]),
        )
        used_at = shown_time(row["last_used"]) if row["last_used"] else "-"
        table.add_row(row["name"], row["session"], *numbers, used_at, "yes" if row["pinned"] else "-")
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"{len(rows)} adapters, {sum(row['bytes'] for row in rows) / MIB:.1f} MiB")


@app.command("show")
def show(name: str, config: ConfigPath = None, root: Root = None) -> None:
    """Show one adapter's manifest."""
    with one_line_errors("soma adapters"):
        store = _open(config, root)
        typer.echo(json.dumps({**store.manifest(name), "pinned": name in store.pins()}, indent=1))


@app.command("verify")
def verify(
    name: Annotated[str | None, typer.Argument(help="One adapter; without it all.")] = None,
    config: ConfigPath = None,
    root: Root = None,
) -> None:
    """Verify adapters: complete, finite, of the right shapes, and with the digest they were published with."""
    damaged = 0
    with one_line_errors("soma adapters"):
        store = _open(config, root, judging=True)
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
    off: Annotated[bool, typer.Option("--off", help="Unpin it.")] = False,
) -> None:
    """Protect an adapter from eviction. `rm` and the removal of its session still remove it."""
    with one_line_errors("soma adapters"):
        _open(config, root).pin(name, not off)
    typer.echo(f"{'unpinned  ' if off else 'pinned    '} {name}")


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
    with one_line_errors("soma adapters"):
        if offline:
            _open_unserved(config, root).retire(name)
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
    """Evict adapters beyond the budgets, and delete what killed processes left behind; offline too, only those
    of the record that --config names."""
    with one_line_errors("soma adapters"):
        if not offline:
            found = Server(url, key_env).ask("POST", "/gc", below="/soma/adapters")
            typer.echo(f"evicted    {found['evicted']}")
            return
        store = _open_unserved(config, root)
        typer.echo(f"collected  {store.collect_garbage()}")
        for eviction in _to_evict(store, config):
            store.retire(eviction.name)
            typer.echo(f"evicted    {eviction.name} ({eviction.reason})")


def _to_evict(store: AdapterStore, config: Path | None) -> Any:
    """What the record of the configuration published and does not name, and what its budgets do not allow."""
    from soma_vllm.adapters.eviction_policy import Eviction, Reason, StoredAdapter, to_evict
    from soma_vllm.maintenance.adapter_eviction import ORPHAN_AFTER_S

    if config is None:
        return ()
    record, pins, now = _on_record(config), store.pins(), time.time()
    orphans, kept = [], []
    for one in store.list():
        name, last_use = one.ref.name, max(one.created, record.used.get(one.ref.name, 0.0))
        if name in record.adapters:
            kept.append(StoredAdapter(name, one.key.tenant, one.size_bytes, last_use, name in pins))
        elif one.owner == record.id and one.created < now - ORPHAN_AFTER_S:
            orphans.append(Eviction(name, Reason.ORPHANED))
    return (*orphans, *to_evict(kept, load_config(config).adapters, now))


def _open(config: Path | None, root: str | None, judging: bool = False) -> AdapterStore:
    """The store that the command line names; for judging, with what the configuration demands of adapters.

    Raises:
        ConfigError: it is not known.
    """
    from soma_vllm.adapters.store.opening import open_root
    from soma_vllm.adapters.store.verify import NOTHING

    if config is None and root is None:
        raise ConfigError("command line", ["found neither --config nor --root; expected one of them"])
    settings = Config() if config is None else load_config(config)
    where = root or fill_paths(settings.adapters.root, "adapters.root", "--root", settings)
    cache = fill_paths(settings.adapters.cache, "adapters.cache", "a folder there", settings)
    demands = _demands(settings) if judging and config is not None else NOTHING
    return open_root(where, cache, demands=demands)


def _open_unserved(config: Path | None, root: str | None) -> AdapterStore:
    """The store, for deletions. Raises BadRequest: a server of this machine serves from it."""
    store = _open(config, root)
    if store.serves():
        raise BadRequest("found a running server on this store; expected none with --offline")
    return store


def _demands(settings: Config) -> Any:
    """What the server would demand; of shapes only where its surrogate is on this machine."""
    from soma_vllm.adapters.store.verify import Demands
    from soma_vllm.models.hub import folder_here

    model = None if settings.surrogate_model is None else folder_here(settings.surrogate_model)
    rank = settings.lora.rank
    return Demands(max_rank=rank) if model is None else Demands.of_model(model, rank)


class _Record(NamedTuple):
    """What a session store says of adapters."""

    id: str | None = None
    used: Mapping[str, float] = {}
    """Last use by adapter."""
    adapters: frozenset[str] = frozenset()
    """All that it published."""


def _on_record(config: Path | None) -> _Record:
    """What the configured session store has; nothing where there is none."""
    from soma_vllm.sessions.sql.store import reading

    async def ask(url: str) -> _Record:
        async with reading(url) as store:
            adapters = frozenset(one.name for one in await store.adapters())
            return _Record(await store.record_id(), await store.adapters_used(), adapters)

    if config is None:
        return _Record()
    settings = load_config(config)
    try:
        url = fill_paths(settings.storage.location, "storage.url", "a database", settings)
        return asyncio.run(ask(url))
    except ConfigError:
        return _Record()
