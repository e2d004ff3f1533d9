"""Preflight check of what vLLM alone can read, by its own parser in a process of its own: further arguments,
and names of parsers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from soma_vllm.app.preflight.machine_checks import Engines, Report
from soma_vllm.config import Config
from soma_vllm.engines.vllm.arguments import original_arguments, surrogate_arguments, vllm_environment

PARSE_S = 180.0
"""Longest wait for vLLM's parser, seconds; on an idle machine it takes ten."""


def check_extra_arguments(report: Report, config: Config, engines: Engines) -> None:
    """vLLM takes `extra_args` and the parsers that are named; nothing is started where there are none."""
    lines: dict[str, list[str]] = {}
    for role, (engine, path) in engines.items():
        if not (engine.extra_args or {engine.tool_parser, engine.reasoning_parser} - {"auto", "none"}):
            continue
        try:
            if role == "surrogate":
                lines[role] = surrogate_arguments(config, str(path), role)
            else:
                lines[role] = original_arguments(config, str(path), role, str(path))
        except ValueError:
            continue  # the rank, which is told by its own check
    if not lines:
        return
    environment = {**os.environ, **vllm_environment(config.surrogate, "", (), "ERROR")}
    command = [sys.executable, "-P", "-m", "soma_vllm.engines.vllm.argument_check"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(lines),
            env=environment,
            capture_output=True,
            text=True,
            timeout=PARSE_S,
            check=True,
        )
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        report.bad(f"vLLM's parser of arguments could not be asked ({type(error).__name__})")
        return
    for role, objection in found.items():
        if objection is None:
            report.good(f"vLLM takes the arguments of the {role}")
        else:
            report.bad(f"arguments of the {role} (extra_args, parsers): {objection}")
