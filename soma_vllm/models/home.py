"""Where everything that outlives a process is kept: one folder, chosen by one environment variable."""

from __future__ import annotations

import os
from pathlib import Path


def soma_home() -> Path:
    """$SOMA_HOME, or ~/.cache/soma-vllm when it is unset or empty. Absolute; it need not exist yet."""
    chosen = os.environ.get("SOMA_HOME")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "soma-vllm"


def models_dir() -> Path:
    """Folder that holds one subfolder per model; it need not exist yet."""
    return soma_home() / "models"
