"""`soma models`: fetch embedded models, list what is on this machine, make the tiny models.

Every SomaError ends as one line on stderr and exit code 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from soma_vllm.models import fetch as fetching
from soma_vllm.models.catalog import CATALOG, DEMO_NAMES, MIB, TINY_NAMES, is_ready
from soma_vllm.models.home import models_dir
from soma_vllm.tools.command_line import one_line_errors

app = typer.Typer(help="Fetch, list and make models.", no_args_is_help=True)

_MIB_PER_MINUTE = 1200
"""Download and conversion together on two cores; only for the hint of how long a fetch takes."""


@app.command()
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"Embedded models; without any, those of the demo: {', '.join(DEMO_NAMES)}."),
    ] = None,
) -> None:
    """Download, verify and convert embedded models; those already here are left alone."""
    with one_line_errors("error"):
        for name in names or DEMO_NAMES:
            _fetch_one(name)


@app.command("ls")
def list_models() -> None:
    """List the known models: name, state, size, path."""
    width = max(map(len, (*CATALOG, *TINY_NAMES)))
    typer.echo(f"{'NAME':<{width}}  {'STATE':<11}  {'SIZE':>9}  PATH")
    for name in (*CATALOG, *TINY_NAMES):
        folder = models_dir() / name
        if is_ready(folder):
            state, size, path = "ready", _size(_bytes_in(folder)), str(folder)
        elif name in CATALOG:
            state, size, path = "not fetched", f"~{_size(CATALOG[name].folder_bytes)}", "-"
        else:
            state, size, path = "not made", "-", "-"
        typer.echo(f"{name:<{width}}  {state:<11}  {size:>9}  {path}")


@app.command("make-tiny")
def make_tiny(
    dialogues: Annotated[
        Path | None,
        typer.Option(help="Folder of JSON dialogues that the tokenizers learn from; default texts of its own."),
    ] = None,
    into: Annotated[Path | None, typer.Option(help="Target folder; default $SOMA_HOME/models.")] = None,
) -> None:
    """Make the tiny random models that tests and first steps run on (about 10 seconds)."""
    with one_line_errors("error"):
        from soma_vllm.models.tiny import make_tiny as make

        for folder in make(into or models_dir(), dialogues):
            typer.echo(f"{folder.name}: {folder}")


def _fetch_one(name: str) -> None:
    if is_ready(models_dir() / name):
        typer.echo(f"{name}: already at {models_dir() / name}")
        return
    if name in CATALOG:
        minutes = max(1, round(CATALOG[name].peak_bytes / MIB / _MIB_PER_MINUTE))
        download = _size(CATALOG[name].download_bytes)
        typer.echo(f"{name}: {download} to download, about {minutes} min with conversion")
    started = time.monotonic()
    with _show_progress() as report:
        folder = fetching.fetch(name, report=report)
    typer.echo(f"{name}: {folder} ({time.monotonic() - started:.0f} s)")


@contextmanager
def _show_progress() -> Iterator[fetching.Report]:
    """A live bar in a terminal; elsewhere one line a step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda progress: typer.echo(_describe(progress), err=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda progress: bar.update(
            task, description=_describe(progress), completed=progress.step - 1, total=progress.steps
        )


def _describe(progress: fetching.Progress) -> str:
    return f"{progress.model}: {progress.what} ({progress.step}/{progress.steps})"


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: int) -> str:
    return f"{count / MIB:,.0f} MiB" if count >= MIB else f"{count / 1024:,.0f} KiB"
