"""soma-serve as a command: what it checks first, and how it ends."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running import TINY, descendants, free_port, gone, serving  # type: ignore[import-not-found]

from soma_vllm.models.home import models_dir


def soma_serve(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "soma_vllm.cli.serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_several_mistakes_in_a_config_are_one_message() -> None:
    done = soma_serve("--config", str(TINY), "--set", "gate.accept=1", "--set", "lora.rank=many")
    assert done.returncode == 1
    assert "2 mistakes" in done.stderr
    assert "gate.accept: unknown key" in done.stderr
    assert "lora.rank: found 'many'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("tiny_models")
def test_a_port_in_use_is_told_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = soma_serve("--config", str(TINY), "--set", f"server.port={port}")
    assert done.returncode == 1
    assert str(port) in done.stderr
    assert "starting" not in done.stdout


def test_a_missing_model_is_told_with_the_command_that_gets_it() -> None:
    done = soma_serve("--config", str(TINY), "--set", "surrogate_model=no-such-model")
    assert done.returncode == 1
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("tiny_models")
def test_the_check_option_starts_nothing() -> None:
    done = soma_serve("--config", str(TINY), "--check", "--set", "server.port=18999")
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout


@pytest.mark.usefixtures("tiny_models")
def test_sigterm_stops_every_part_and_leaves_no_process_behind(tmp_path: Path) -> None:
    with serving(tmp_path, TINY) as running:
        family = descendants(running.process.pid)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
        assert gone(family) == set()
        assert running.said().rstrip().endswith("stopped")


@pytest.mark.usefixtures("tiny_models")
def test_sigterm_during_the_start_leaves_no_process_behind_either(tmp_path: Path) -> None:
    with serving(tmp_path, TINY, until="surrogate  starting") as running:
        family = descendants(running.process.pid)
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(90)
        assert gone(family | descendants(running.process.pid)) == set()
        assert "Traceback" not in running.said()


@pytest.mark.usefixtures("tiny_models")
def test_a_surrogate_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models_dir() / "tiny-surrogate", broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    done = soma_serve(
        *("--config", str(TINY), "--set", f"surrogate_model={broken}"),
        *("--set", f"server.run_dir={tmp_path / 'run'}", "--set", f"server.port={free_port()}"),
        timeout=120,
    )
    assert done.returncode == 1
    assert "the surrogate failed" in done.stderr
    assert "surrogate.log" in done.stderr
