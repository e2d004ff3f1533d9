"""`--version` of every program: told at once, nothing heavy loaded."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.guard import GUARD_S

import soma_vllm
from soma_vllm import versions

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "vllm", "ray", "transformers", "peft")
LINE = rf"soma_vllm {re.escape(soma_vllm.__version__)} \(vLLM .+\)"
ASK = f"""
import sys
from importlib.metadata import entry_points
(entry,) = entry_points(group="console_scripts", name=sys.argv[1])
sys.argv = [sys.argv[1], "--version"]
try:
    entry.load()()
except SystemExit as end:
    print(end.code, [name for name in {HEAVY!r} if name in sys.modules])
"""

ASK_STUDY = f"""
import sys
sys.path.insert(0, sys.argv[1])
import throughput
try:
    throughput.parsed(["--version"])
except SystemExit as end:
    print(end.code, [name for name in {HEAVY!r} if name in sys.modules])
"""


def run(*arguments: str) -> list[str]:
    """Lines that Python prints."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=GUARD_S, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("program", ["soma", "soma-serve"])
def test_a_program_says_its_version_and_vllms_and_loads_neither_torch_nor_vllm(program: str) -> None:
    told, ended = run("-c", ASK, program)
    assert re.fullmatch(LINE, told)
    assert ended == "0 []"


def test_the_study_says_the_same_version() -> None:
    told, ended = run("-c", ASK_STUDY, str(ROOT / "benchmarks"))
    assert (told, ended) == (versions.versions(), "0 []")


def test_the_version_is_that_of_the_installed_package() -> None:
    assert soma_vllm.__version__ == version("soma-vllm")


def test_a_missing_vllm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: None)
    assert versions.versions() == f"soma_vllm {soma_vllm.__version__} (vLLM not installed)"
