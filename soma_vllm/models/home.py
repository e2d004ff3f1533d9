"""Where everything that outlives a process is kept: one folder, chosen by one environment variable."""

from __future__ import annotations

import os
from pathlib import Path


def soma_home() -> Path:
    """$SOMA_HOME, or ~/.cache/soma-vllm when it is unset or empty. Absolute; it need not exist yet."""
    chosen = os.environ.get("SOMA_HOME")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "soma-vllm"


def filled(template: str, run_dir: Path | str | None = None) -> str:
    """A place of a configuration, with `{soma_home}` and, where there is one, `{run_dir}` filled in."""
    absolute = "" if run_dir is None else str(Path(run_dir).expanduser().absolute())
    return template.replace("{soma_home}", str(soma_home())).replace("{run_dir}", absolute)


def models_dir() -> Path:
    """Folder that holds one subfolder per model; it need not exist yet."""
    return soma_home() / "models"
