"""Preflight checks of the places beside the models: the session database, the adapter store, and the adapter
that sessions start from."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from pathlib import Path

from soma_vllm.adapters.store.verify import Demands, verify
from soma_vllm.app.preflight.machine_checks import Report
from soma_vllm.config import Config
from soma_vllm.documents import read_json
from soma_vllm.errors import ConfigError, SomaError
from soma_vllm.models.home import filled
from soma_vllm.private import PRIVATE_FOLDER, masked
from soma_vllm.sessions.sql import connections
from soma_vllm.training.pair import owner_of
from soma_vllm.types import CONFIG


def check_storage(report: Report, config: Config) -> None:
    """The session database is of a known kind, and is there or can be made."""
    url = _filled(config.storage.location, config)
    if url is None:
        return  # in the server's own folder, which is made with it
    try:
        parsed = connections.parse(url)
        engine = connections.connect(url)
        if parsed.get_backend_name() == "sqlite":
            problem = _sqlite_problem(parsed.database)
        else:
            problem = asyncio.run(connections.unreachable(engine))
    except ConfigError as error:
        problem = "; ".join(error.problems)
    except ImportError as error:
        problem = f"{error}; expected the driver's package to be installed"
    if problem:
        report.bad(f"storage.url: {problem}")
    else:
        report.good(f"sessions in {connections.told(parsed)}")


def check_adapter_store(report: Report, config: Config) -> None:
    """The adapter store can be opened."""
    root = config.adapters.root
    if "://" not in root:
        _check_folder(report, "adapters.root", _filled(root, config))
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(root.partition("://")[0])
    except (ImportError, ValueError) as error:
        report.bad(
            f"adapters.root: found {masked(root)}; expected a directory or a URL that fsspec opens ({error})"
        )
    _check_folder(report, "adapters.cache", _filled(config.adapters.cache, config))


def check_first_adapter(report: Report, config: Config, surrogate_path: Path | None) -> None:
    """The adapter that sessions start from is one, and fits the surrogate and `lora`."""
    directory = config.lora.init_from
    if directory is None:
        return
    lora = config.lora
    try:
        demands = Demands() if surrogate_path is None else Demands.of_model(surrogate_path)
        facts, _ = verify(Path(directory), demands)
        owner_of(directory)
        scaled = read_json(Path(directory) / CONFIG).get("use_rslora")
    except (SomaError, OSError) as error:
        told = str(error).removeprefix("lora.init_from: ")
        report.bad(f"lora.init_from: {told}")
        return
    found = {"rank": facts.rank, "alpha": facts.alpha, "target_modules": list(facts.modules)}
    targets = sorted({name.rpartition(".")[2] for name in lora.target_modules})
    wanted = {"rank": lora.rank, "alpha": lora.alpha, "target_modules": targets}
    problems = [f"{key} {found[key]}; expected {wanted[key]}" for key in found if found[key] != wanted[key]]
    problems += ["use_rslora; expected one alpha / rank for all weights"] if scaled else []
    for problem in problems:
        report.bad(f"lora.init_from: {directory}: found {problem}")
    if not problems:
        report.good(f"sessions start from {directory}")


def _sqlite_problem(database: str | None) -> str | None:
    """Why SQLite could not open a file for reading and writing."""
    if not database or database == ":memory:":
        return None
    file = Path(database)
    if not file.exists():
        return _unwritable(file.parent)
    try:
        with file.open("r+b"):
            pass
        with sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except OSError as error:
        return f"{file} cannot be opened: {error.strerror}"
    except sqlite3.OperationalError:
        return None  # another process holds it; opening waits
    except sqlite3.DatabaseError as error:
        return f"{file}: {error}; expected an SQLite database, or no such file"
    return None


def _check_folder(report: Report, key: str, folder: str | None) -> None:
    if folder is not None and (problem := _unwritable(Path(folder))) is not None:
        report.bad(f"{key}: {problem}")


def _unwritable(folder: Path) -> str | None:
    """Why files cannot be put into a folder, which is made if need be."""
    try:
        folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror}); expected a directory, or that one can be made"


def _filled(template: str, config: Config) -> str | None:
    """A place with its names filled in; None where it lies in a folder that each start makes anew."""
    run_dir = config.server.run_dir
    if "{run_dir}" in template and run_dir is None:
        return None
    return filled(template, run_dir)
