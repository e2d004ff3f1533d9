"""`soma sessions ls | show | rm | pin | rollback | readapt`: a server's sessions, over its admin routes.

Guarantees: the key comes from the environment and is never printed; no conversation text is shown.
"""

from __future__ import annotations

import json
import os
import time
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from rich.console import Console
from rich.table import Table

from soma_vllm.errors import NotFound, SomaError, Unauthorized
from soma_vllm.tools.command_line import one_line_errors

app = typer.Typer(no_args_is_help=True)

TIMEOUT_S = 700.0
"""A removal waits for the session's requests."""

Url = Annotated[str, typer.Option(help="Where soma-serve listens.")]
KeyEnv = Annotated[str, typer.Option(help="Environment variable with the admin key, or with the tenant's own.")]
Tenant = Annotated[str | None, typer.Option(help="Tenant, as `ls` shows it; for administrators.")]
HERE = "http://127.0.0.1:8000"
ADMIN_KEY = "SOMA_ADMIN_KEY"


class Pinned(StrEnum):
    """What a session can be pinned to."""

    ORIGINAL = "original"
    SURROGATE = "surrogate"
    NONE = "none"


class Server:
    """A running soma-serve."""

    def __init__(self, url: str, key_env: str) -> None:
        """Raises Unauthorized: the environment variable is not set."""
        key = os.environ.get(key_env)
        if not key:
            raise Unauthorized(f"found no {key_env} in the environment; expected the server's admin key")
        self._client = httpx.Client(
            base_url=url.rstrip("/"), headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT_S
        )

    def ask(self, method: str, path: str, below: str = "/soma/sessions", **request: Any) -> Any:
        """The JSON of the answer to a request below a route; None where it has none.

        Raises:
            NotFound: there is no such session.
            SomaError: the server refused, or does not answer.
        """
        try:
            answer = self._client.request(method, f"{below}{path}", **request)
        except httpx.HTTPError as error:
            raise SomaError(f"{self._client.base_url} does not answer ({type(error).__name__})") from error
        if answer.is_success:
            return answer.json() if answer.content else None
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, LookupError, TypeError):
            message = f"the server answered with status {answer.status_code}"
        raise (NotFound if answer.status_code == httpx.codes.NOT_FOUND else SomaError)(message)


@app.command("ls")
def list_sessions(
    url: Url = HERE,
    key_env: KeyEnv = ADMIN_KEY,
    tenant: Tenant = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="The server's own answer.")] = False,
) -> None:
    """List the latest sessions."""
    parameters = {"limit": limit} | ({} if tenant is None else {"tenant": tenant})
    answer = _ask(url, key_env, "GET", "", params=parameters)
    found = answer["data"]
    if key_env == ADMIN_KEY and answer.get("admin") is False:
        typer.echo(
            f"note: {ADMIN_KEY} is not this server's admin key; shown are that key's own sessions", err=True
        )
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table("session", "tenant", "phase", "turns", "adapter", "last used")
    for row in found:
        used = shown_time(row["updated_at"])
        table.add_row(
            row["session"], row["tenant"], row["phase"], str(row["turns"]), row["adapter"] or "-", used
        )
    Console().print(table)


@app.command("show")
def show(session: str, url: Url = HERE, key_env: KeyEnv = ADMIN_KEY, tenant: Tenant = None) -> None:
    """Show one session: phase, turns, gaps, decisions, costs."""
    typer.echo(json.dumps(_ask_session(url, key_env, "GET", session, "", tenant), indent=1))


@app.command("rm")
def remove(session: str, url: Url = HERE, key_env: KeyEnv = ADMIN_KEY, tenant: Tenant = None) -> None:
    """Remove a session with its text, its adapter and its record."""
    _ask_session(url, key_env, "DELETE", session, "", tenant)
    typer.echo(f"removed    {session}")


@app.command("pin")
def pin(
    session: str, engine: Pinned, url: Url = HERE, key_env: KeyEnv = ADMIN_KEY, tenant: Tenant = None
) -> None:
    """Pin a session to an engine; `none` unpins it."""
    body = {"engine": None if engine is Pinned.NONE else engine.value}
    found = _ask_session(url, key_env, "POST", session, "/pin", tenant, json=body)
    typer.echo(f"pinned     {session} to {found['pinned'] or 'nothing'}")


@app.command("rollback")
def roll_back(session: str, url: Url = HERE, key_env: KeyEnv = ADMIN_KEY, tenant: Tenant = None) -> None:
    """Roll a session back to the original."""
    found = _ask_session(url, key_env, "POST", session, "/rollback", tenant)
    typer.echo(f"{session} is in phase {found['phase']}")


@app.command("readapt")
def readapt(session: str, url: Url = HERE, key_env: KeyEnv = ADMIN_KEY, tenant: Tenant = None) -> None:
    """Start a new adaptation of a session."""
    found = _ask_session(url, key_env, "POST", session, "/readapt", tenant)
    typer.echo(f"{session} is in phase {found['phase']}")


def shown_time(at: float) -> str:
    """A Unix time, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _ask_session(
    url: str, key_env: str, method: str, session: str, verb: str, tenant: str | None, **request: Any
) -> Any:
    parameters = {} if tenant is None else {"tenant": tenant}
    return _ask(url, key_env, method, f"/{quote(session, safe='')}{verb}", params=parameters, **request)


def _ask(url: str, key_env: str, method: str, path: str, **request: Any) -> Any:
    with one_line_errors("soma sessions"):
        return Server(url, key_env).ask(method, path, **request)
