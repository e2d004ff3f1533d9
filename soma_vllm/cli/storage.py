"""`soma storage migrate | adopt`: a session store's tables and identity, apart from a server's start.

Guarantees: a database that a server works on is neither downgraded nor given another id; each command is one
transaction. Loads no engine.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from soma_vllm.cli.keys import ConfigPath, StorageUrl, storage_url
from soma_vllm.tools.command_line import one_line_errors

app = typer.Typer(no_args_is_help=True)


@app.command("migrate")
def migrate(
    config: ConfigPath = None,
    storage: StorageUrl = None,
    downgrade: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Go back to this revision, for an older version.")
    ] = None,
) -> None:
    """Bring a session store's tables up to date, as a server's start does, or back to an older version's."""
    with one_line_errors("soma storage"):
        found, reached = asyncio.run(_migrate(storage_url(config, storage), downgrade))
    typer.echo(f"migrated   from revision {found} to {reached}")


@app.command("adopt")
def adopt(config: ConfigPath = None, storage: StorageUrl = None) -> None:
    """Make a copied database a record of its own. The adapters stay the other record's."""
    with one_line_errors("soma storage"):
        typer.echo(f"adopted    as record {asyncio.run(_adopt(storage_url(config, storage)))}")


async def _migrate(url: str, down_to: str | None) -> tuple[str, str]:
    from soma_vllm.app.record import leased
    from soma_vllm.sessions.sql import schema
    from soma_vllm.sessions.sql.connections import connect
    from soma_vllm.sessions.sql.outages import translated
    from soma_vllm.sessions.sql.store import refuse_missing_file

    engine = connect(url)
    try:
        with translated():
            if down_to is None:
                return await schema.migrate(engine)
            refuse_missing_file(url)
            async with leased(url):
                return await schema.migrate(engine, down_to)
    finally:
        await engine.dispose()


async def _adopt(url: str) -> str:
    from soma_vllm.app.record import leased
    from soma_vllm.sessions.sql.store import reading

    async with reading(url) as store, leased(url):
        return await store.adopt()
