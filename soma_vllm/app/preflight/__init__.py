"""Checks before anything heavy starts: can this machine run the server as configured?

Guarantees: no engine, torch or Ray is loaded here; every problem is found before the first is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from soma_vllm.app.preflight import argument_checks as arguments
from soma_vllm.app.preflight import machine_checks as machine
from soma_vllm.app.preflight import model_checks as models
from soma_vllm.app.preflight import place_checks as places
from soma_vllm.config import Config
from soma_vllm.errors import PreflightError


def preflight(
    config: Config,
    original_path: Path | None,
    surrogate_path: Path | None,
    encoder_path: Path | None,
    problems: Sequence[str] = (),
    taking_over: bool = False,
) -> list[str]:
    """Check the machine; a line for people about each thing that was checked.

    `original_path` is None when the original is an external endpoint. A model that is not on this machine is
    None too, and told in `problems`, which are reported together with what is found here. `taking_over`:
    another server still has the port and the memory.

    Raises:
        PreflightError: listing every problem.
    """
    report = machine.Report()
    report.problems += problems
    machine.check_vllm(report, config)
    machine.check_listening(report, config, taking_over)
    models.check_endpoint(report, config)
    models.check_judge(report, config)
    models.check_names(report, config)
    places.check_storage(report, config)
    places.check_adapter_store(report, config)
    places.check_first_adapter(report, config, surrogate_path)
    folders = {"surrogate": (config.surrogate, surrogate_path), "original": (config.original, original_path)}
    engines: machine.Engines = {
        role: (engine, path) for role, (engine, path) in folders.items() if path is not None
    }
    for role, (engine, path) in engines.items():
        models.check_engine_model(report, role, engine, path)
    machine.check_cores(report, engines)
    if original_path is not None and surrogate_path is not None and config.original.draft_tokens:
        models.check_draft(report, original_path, surrogate_path)
    if encoder_path is not None:
        models.check_model(report, "encoder", encoder_path)
    models.check_adapters(report, config)
    if not taking_over:
        machine.check_gpus(report, config, engines)
    if not (problems or taking_over):
        machine.check_memory(report, config, engines)
    arguments.check_extra_arguments(report, config, engines)
    if report.problems:
        count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in report.problems)
        raise PreflightError(f"cannot start as configured: {count}\n{lines}")
    return report.lines
