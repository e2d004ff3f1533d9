"""Where a server keeps its logs and sockets while it runs, and for a while afterwards."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from soma_vllm.adapters.store.atomic_files import is_locked
from soma_vllm.errors import PreflightError
from soma_vllm.models.home import soma_home
from soma_vllm.private import PRIVATE_FOLDER

RUNS_KEPT = 20
"""Run folders kept under $SOMA_HOME/run, beside those of running servers; a folder holds logs and a socket."""


def make_run_dir(configured: str | None) -> Path:
    """The configured folder, or a fresh one under $SOMA_HOME/run: sockets need short paths.

    Raises:
        PreflightError: it cannot be made.
    """
    runs = soma_home() / "run"
    try:
        if configured is not None:
            folder = Path(configured).expanduser().absolute()
            folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            return folder
        runs.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{time.strftime('%Y%m%d-%H%M%S')}-", dir=runs))
    except OSError as error:
        raise PreflightError(
            f"server.run_dir: {configured or runs} cannot be made: {error.strerror}"
        ) from error
    for old in sorted(path for path in runs.iterdir() if path.is_dir())[:-RUNS_KEPT]:
        if not is_locked(old):
            shutil.rmtree(old, ignore_errors=True)
    return folder
