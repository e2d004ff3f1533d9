"""soma-serve as a command: what it checks first, and how it ends."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.guard import GUARD_S
from support.server import TINY, Dialogue, Running, descendants, free_port, gone, serving, wait_until_said

from soma_vllm.models.home import models_dir


def soma_serve(*arguments: str, timeout: float = GUARD_S) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "soma_vllm.app.serve", *arguments]
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


@pytest.fixture(scope="module")
def drafting(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose surrogate drafts for its original, and that logs in JSON all it can."""
    settings = {
        "policy": "speculative",
        "limits": {"policies": ["soma"]},
        "original": {"draft_tokens": 2},
        "server": {"log_format": "json", "log_level": "debug"},
    }
    with serving(tmp_path_factory.mktemp("drafting"), TINY, settings) as running:
        yield running


def test_the_surrogate_drafts_for_the_original_and_the_original_answers_as_ever(
    drafting: Running, tiny_server: Running
) -> None:
    dialogue = Dialogue(drafting, "drafted")
    plain = Dialogue(tiny_server, "undrafted", model="soma:original")
    assert dialogue.say("a question") == plain.say("a question")
    assert dialogue.headers["X-SOMA-Engine"] == "original"
    assert dialogue.headers["X-SOMA-Reason"] == "policy speculative, 2 tokens drafted"
    transport = httpx.HTTPTransport(uds=str(drafting.run_dir / "original.sock"))
    with httpx.Client(transport=transport, base_url="http://original", timeout=GUARD_S) as child:
        metrics = child.get("/metrics").text
    drafts = re.search(r"^vllm:spec_decode_num_drafts_total\{.*\} ([0-9.e+]+)$", metrics, re.MULTILINE)
    assert drafts is not None
    assert float(drafts[1]) > 0


def test_an_original_that_drafts_still_teaches_by_its_log_probabilities(drafting: Running) -> None:
    dialogue = Dialogue(
        drafting, "taught", model="soma", **{"X-SOMA-Policy": "soma", "X-SOMA-Force": "adapter"}
    )
    for number in range(1, 4):
        dialogue.say(f"question {number} about walruses")
    found = drafting.until("taught", "SWITCHED")
    (submitted,) = (e["data"] for e in found["events"] if e["kind"] == "training_submitted")
    assert submitted["teacher"] == "logprobs"
    assert "text_turns" not in submitted
    logs = drafting.logged("switched") + drafting.said() + (drafting.run_dir / "original.log").read_text()
    assert "walruses" not in logs
    answers = [message["content"].strip() for message in dialogue.messages if message["role"] == "assistant"]
    assert not [answer for answer in answers if len(answer) > 12 and json.dumps(answer)[1:-1] in logs]


def test_a_switch_is_one_json_line_with_the_sessions_ids_on_stderr_and_in_the_file(drafting: Running) -> None:
    drafting.until("taught", "SWITCHED")
    written = [json.loads(line) for line in drafting.logged("switched candidate=adapter").splitlines()]
    wait_until_said(drafting, "switched candidate=adapter")
    printed = [json.loads(line) for line in drafting.said().splitlines() if line.startswith("{")]
    (switched,) = (line for line in written if line["message"].startswith("switched candidate=adapter"))
    assert switched["session"] == "taught"
    assert switched["tenant"] == hashlib.sha256(b"key").hexdigest()[:16]
    assert (switched["level"], switched["logger"]) == ("INFO", "soma_vllm.telemetry.event_log")
    logged = [line for line in written if line["logger"] != "output"]
    assert printed[: logged.index(switched) + 1] == logged[: logged.index(switched) + 1]


def test_sigterm_stops_every_part_and_leaves_no_process_behind(drafting: Running) -> None:
    family = descendants(drafting.process.pid)
    drafting.process.send_signal(signal.SIGTERM)
    assert drafting.process.wait(GUARD_S) == 0
    assert gone(family) == set()
    assert drafting.said().rstrip().endswith("stopped")


@pytest.mark.usefixtures("tiny_models")
def test_sigterm_during_the_start_leaves_no_process_behind_either(tmp_path: Path) -> None:
    with serving(tmp_path, TINY, until="surrogate  starting") as running:
        family = descendants(running.process.pid)
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(GUARD_S)
        assert gone(family | descendants(running.process.pid)) == set()
        assert "Traceback" not in running.said()


@pytest.mark.usefixtures("tiny_models")
def test_a_surrogate_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models_dir() / "tiny-surrogate", broken)
    shape = json.loads((broken / "config.json").read_text())
    shape["intermediate_size"] *= 2  # whole files, which do not fit together
    (broken / "config.json").write_text(json.dumps(shape))
    done = soma_serve(
        *("--config", str(TINY), "--set", f"surrogate_model={broken}"),
        *("--set", f"server.run_dir={tmp_path / 'run'}", "--set", f"server.port={free_port()}"),
    )
    assert done.returncode == 1
    assert "the surrogate failed" in done.stderr
    assert "surrogate.log" in done.stderr
