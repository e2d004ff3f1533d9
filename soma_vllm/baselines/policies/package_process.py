"""The process of a policy's package, with its model's folder and the limits of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soma_vllm.baselines.process import BaselineProcess, ProcessLimits
from soma_vllm.config import Config
from soma_vllm.models.home import filled
from soma_vllm.models.hub import local_path


def process_of(
    config: Config, name: str, settings: Mapping[str, Any], key: str, model: str | None
) -> BaselineProcess:
    """A process that will load the package `name` with `settings`, the folder of `model` among them under
    `key`.

    Nothing starts, and no model is looked for, before the process is asked for the first time.
    """
    baselines = config.baselines
    return BaselineProcess(
        name,
        lambda: {**settings, key: None if model is None else str(local_path(model))},
        packages=Path(filled(baselines.packages)),
        limits=ProcessLimits(baselines.threads, baselines.timeout_s, baselines.load_timeout_s),
    )
