"""The public compliance checks of the package llm-comply, run as its users do, against real engines.

Random tiny models say noise and do not stop: what fails for that reason is named here, one by one, and nothing
else may fail.
"""

from __future__ import annotations

import json
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.guard import GUARD_S
from support.server import Running

COMMAND = Path(sysconfig.get_path("scripts")) / "llm-comply"

CUT_OFF = {"finish_reason: expected 'stop', got 'length'", "expected status='completed', got 'incomplete'"}
"""The answer went on to the end of the model's context. It may or may not: it is drawn at random."""

TEXT_ONLY = {"chat-image-input", "image-input"}
"""A text model refuses images with a 400, as it should."""

CALLING = {"chat-tool-calling", "tool-calling"}

SKIPPED = {"chat-reasoning-summary", "reasoning-summary"}
"""llm-comply asks these of models of other names only."""

CHECKS = {
    "openai-chat": [
        ["chat-basic-response", "chat-image-input"],
        ["chat-system-prompt", "chat-error-handling"],
        ["chat-multi-turn", "chat-reasoning-summary"],
        ["chat-tool-calling"],
        ["chat-streaming-response"],
        ["chat-streaming-usage"],
    ],
    "open-responses": [
        ["basic-response", "image-input"],
        ["system-prompt", "compact-response"],
        ["multi-turn", "compact-missing-model"],
        ["tool-calling"],
        ["streaming-response", "error-handling"],
        ["streaming-usage", "reasoning-summary"],
        ["assistant-phase"],
        ["response-output-phase-schema"],
    ],
}
"""Every check, in groups that are run beside each other."""


def complied(server: Running, form: str, checks: list[str]) -> list[dict[str, Any]]:
    """What is found of these checks."""
    for _ in range(3):
        found = checked(server, form, checks)
        # Where a random model is at its context's end before a call is at its own, another try shows the call.
        if not any(result.get("errors") for result in found if result["id"] in CALLING):
            break
    return found


def checked(server: Running, form: str, checks: list[str]) -> list[dict[str, Any]]:
    command = [str(COMMAND), "--format", form, "-u", f"{server.root}/v1", "-k", "key", "-m", "soma"]
    done = subprocess.run(
        [*command, "--json", "--timeout", str(GUARD_S), "--filter", ",".join(checks)],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    assert [result["id"] for result in found] == checks, done.stderr
    return found


@pytest.fixture(scope="module")
def results(tiny_server: Running) -> dict[str, dict[str, Any]]:
    groups = [(form, group) for form, listed in CHECKS.items() for group in listed]
    with ThreadPoolExecutor(len(groups)) as pool:
        found = pool.map(lambda group: complied(tiny_server, *group), groups)
    return {result["id"]: result for part in found for result in part}


def of_the_protocol(result: dict[str, Any]) -> set[str]:
    return set(result.get("errors") or ()) - CUT_OFF


def test_every_check_is_run() -> None:
    for form, groups in CHECKS.items():
        listed = subprocess.run(
            [str(COMMAND), "--format", form, "--list"], capture_output=True, text=True, check=True
        ).stdout
        ids = {line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "}
        assert ids == {check for group in groups for check in group}


def test_nothing_fails_but_what_a_random_text_model_cannot_do(results: dict[str, dict[str, Any]]) -> None:
    skipped = {id for id, result in results.items() if result["status"] == "skipped"}
    failed = {id: errors for id, result in results.items() if (errors := of_the_protocol(result))}
    assert skipped == SKIPPED
    assert failed.keys() - SKIPPED == TEXT_ONLY, failed
    for id in TEXT_ONLY:
        assert "HTTP 400 (expected [200])" in failed[id]
