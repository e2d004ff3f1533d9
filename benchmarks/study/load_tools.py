"""The load generators of others: run by the commands of docs/load.md as they stand there, and read.

Guarantee: what is reported is what the tool itself says of its requests; where some had errors, or fewer were
answered than were to be asked, nothing is reported.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soma_vllm.models.home import soma_home

DOCUMENT = Path(__file__).parents[2] / "docs" / "load.md"
TOOLS = soma_home() / "tools"
LIMIT_S = 1800.0


class LoadFailed(Exception):
    """A load generator did not do what it was asked to."""


@dataclass(frozen=True)
class Seen:
    """What one load generator saw of its requests: medians, in seconds and tokens."""

    ttft_s: float
    token_s: float
    """From one token to the next, the mean of each answer."""
    latency_s: float
    prompt_tokens: float
    completion_tokens: float


@dataclass(frozen=True)
class Workload:
    """What is asked for, in the words of docs/load.md."""

    model: str
    turns: int
    requests: int
    think_s: int
    more: Mapping[str, str]
    """Further variables of the commands."""


def installed(tool: str) -> bool:
    """Whether `make load-tools` was run."""
    return (TOOLS / tool / "bin" / tool).exists()


def command(tool: str) -> str:
    """The block of docs/load.md that runs a tool."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if f"bin/{tool}" in block]
    return str(found)


def run_tool(
    tool: str, root: str, tokenizer: Path, out: Path, load: Workload, limit_s: float = LIMIT_S
) -> None:
    """Run a tool against a server; what it reports lies in `out`.

    Raises:
        LoadFailed: it ended with an error, or was not over within `limit_s`.
    """
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        **{"SOMA_URL": root, "TOOLS": str(TOOLS), "OUT": str(out)},
        **{"TOKENIZER": str(tokenizer), "HF_HUB_OFFLINE": "1"},
        **{"MODEL": load.model, "TURNS": str(load.turns), "REQUESTS": str(load.requests)},
        **{"THINK_S": str(load.think_s)},
        **load.more,
    }
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", command(tool)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # it starts workers, which must end with it
    ) as process:
        try:
            printed, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise LoadFailed(f"{tool}: not over after {limit_s:g} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise LoadFailed(f"{tool}: ended with {process.returncode}\n{printed[-4000:]}")


def seen(tool: str, out: Path, requests: int) -> Seen:
    """What a tool reports.

    Raises:
        LoadFailed: it was not answered as often as it was to ask.
    """
    answered, errors, found = READERS[tool](out)
    if answered != requests or errors:
        raise LoadFailed(f"{tool}: found {answered} answers and {errors} errors; expected {requests} and none")
    return found


def _guidellm(out: Path) -> tuple[int, int, Seen]:
    (benchmark,) = json.loads((out / "guidellm.json").read_text(encoding="utf-8"))["benchmarks"]
    metrics: dict[str, Any] = benchmark["metrics"]

    def median(name: str) -> float:
        return float(metrics[name]["successful"]["median"])

    found = Seen(
        median("time_to_first_token_ms") / 1000.0,
        median("inter_token_latency_ms") / 1000.0,
        median("request_latency"),
        median("prompt_token_count"),
        median("output_token_count"),
    )
    totals = metrics["request_totals"]
    return int(totals["successful"]), int(totals["errored"]), found


def _aiperf(out: Path) -> tuple[int, int, Seen]:
    report = json.loads((out / "aiperf" / "profile_export_aiperf.json").read_text(encoding="utf-8"))

    def median(name: str) -> float:
        return float(report[name]["p50"])

    found = Seen(
        median("time_to_first_token") / 1000.0,
        median("inter_token_latency") / 1000.0,
        median("request_latency") / 1000.0,
        median("input_sequence_length"),
        median("output_sequence_length"),
    )
    errors = report.get("error_request_count") or {"avg": 0}
    return int(report["request_count"]["avg"]), int(errors["avg"]), found


READERS: Mapping[str, Callable[[Path], tuple[int, int, Seen]]] = {"guidellm": _guidellm, "aiperf": _aiperf}
