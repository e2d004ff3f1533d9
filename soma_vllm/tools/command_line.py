"""What the commands share: input that is checked as a whole, filled-in paths, errors as one line, JSON files.

Guarantees: all mistakes in a command's input are reported together, before anything starts; a JSON file is
written whole or not at all.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from soma_vllm import documents
from soma_vllm.config import Config
from soma_vllm.errors import BadRequest, ConfigError, DocumentError, SomaError
from soma_vllm.models.home import filled
from soma_vllm.private import masked

T = TypeVar("T")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over the configuration; repeatable.")
]
PairConfig = Annotated[Path, typer.Option(help="Configuration: the pair, the prefix, the training.")]
DialogueFile = Annotated[Path, typer.Option(help='JSON file {"id": ["user turn 1", ...]}.')]


def say(console: Console, text: str, style: str = "") -> None:
    """Print text as it is."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def frameless() -> Table:
    """A table without a frame, for numbers."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")


class InputProblems(list[str]):
    """Everything that is wrong with a command's input."""

    def attempt(self, read: Callable[[], T]) -> T | None:
        """What `read` returns; None if it fails, and its message is one of the problems."""
        try:
            return read()
        except SomaError as error:
            self.append(str(error))
            return None

    def exit(self) -> NoReturn:
        """Print the problems on stderr and exit with 2."""
        typer.echo("\n".join(self), err=True)
        raise typer.Exit(2)


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Report a SomaError as one line on stderr; exit with 2 where the input was wrong, else with 1."""
    try:
        yield
    except SomaError as error:
        typer.echo(masked(f"{command}: {' '.join(str(error).split())}"), err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError | BadRequest) else 1) from None


@contextmanager
def sigterm_cancels() -> Iterator[None]:
    """While the block runs, SIGTERM cancels the current task, as Ctrl-C does: what it started is stopped."""
    loop, current = asyncio.get_running_loop(), asyncio.current_task()
    assert current is not None
    loop.add_signal_handler(signal.SIGTERM, current.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def fill_paths(template: str, key: str, instead: str, config: Config | None = None) -> str:
    """A URL or path of a configuration, with `{soma_home}` and `{run_dir}` replaced.

    Args:
        key: where the template stands, for the message.
        instead: what to give if it cannot be filled in, for the message.
        config: names the run directory, unless every start makes a new one.

    Raises:
        ConfigError: it needs a run directory that only a running server knows.
    """
    run_dir = None if config is None else config.server.run_dir
    if "{run_dir}" in template and run_dir is None:
        found = f"found {template!r}, which names a running server's folder; give {instead}"
        raise ConfigError(key, [found])
    return filled(template, run_dir)


def read_json(path: Path, unique: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A file's document; `unique` may look at the keys of each object, as json's `object_pairs_hook`.

    Raises:
        ConfigError: it cannot be read, or is not JSON.
    """
    try:
        return documents.read_json(path, unique)
    except DocumentError as error:
        raise ConfigError(str(path), [str(error)]) from error


def make_out(out: Path) -> None:
    """Make a command's output directory, and see that files can be put there.

    Raises:
        ConfigError: they cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        found = f"found a place that cannot be written ({error.strerror})"
        raise ConfigError(
            f"--out {out}", [f"{found}; expected a directory, or a path where one can be made"]
        ) from error


def write_json(path: Path, document: Mapping[str, Any], allow_nan: bool = True) -> None:
    """Replace a file in one step; its directory is made if need be.

    Raises:
        ValueError: the document holds a NaN, and `allow_nan` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(document, ensure_ascii=False, indent=2, allow_nan=allow_nan)
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)
