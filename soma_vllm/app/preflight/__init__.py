"""Checks before anything heavy starts: can this machine run the server as configured?

Guarantees: no engine, torch or Ray is loaded; every problem is found before the first is reported.
"""

from __future__ import annotations

from pathlib import Path

from soma_vllm.app.preflight import machine_checks as machine
from soma_vllm.app.preflight import model_checks as models
from soma_vllm.config import Config
from soma_vllm.errors import PreflightError


def preflight(
    config: Config, original_path: Path | None, surrogate_path: Path, encoder_path: Path
) -> list[str]:
    """Check the machine; a line for people about each thing that was checked.

    `original_path` is None when the original is an external endpoint.

    Raises:
        PreflightError: listing every problem.
    """
    report = machine.Report()
    machine.check_vllm(report, config)
    machine.check_port(report, config.server.host, config.server.port)
    models.check_endpoint(report, config)
    engines: machine.Engines = {"surrogate": (config.surrogate, surrogate_path)}
    if original_path is not None:
        engines["original"] = (config.original, original_path)
    for role, (engine, path) in engines.items():
        models.check_engine_model(report, role, engine, path)
    machine.check_cores(report, engines)
    if original_path is not None and config.original.draft_tokens:
        models.check_draft(report, original_path, surrogate_path)
    models.check_model(report, "encoder", encoder_path)
    models.check_adapters(report, config)
    machine.check_gpus(report, config, engines)
    machine.check_memory(report, config, engines)
    if report.problems:
        count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in report.problems)
        raise PreflightError(f"cannot start as configured: {count}\n{lines}")
    return report.lines
