"""Where a server's output goes: everything to a rotated file, lines of logging to stderr too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from support.guard import GUARD_S

from soma_vllm.app import log_writer

LOGGED = "2026-11-27T20:00:00Z INFO scheduler: {}"

SERVER = """
import logging, os, sys
from pathlib import Path
from soma_vllm.app.terminal import log_as_configured, output_to
from soma_vllm.config import Server

folder, log_format, end = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
settings = Server(log_format=log_format)
with output_to(folder / "surrogate.log", settings) as terminal:
    log_as_configured(settings, folder)
    print("starting", file=terminal)
    print("printed", flush=True)
    os.system("echo printed by a child")
    logging.getLogger("soma_vllm.app").info("logged")
    if end == "raises":
        raise RuntimeError("the engine died")
    if end == "killed":
        os.kill(os.getpid(), 9)
"""


def run(folder: Path, log_format: str, end: str) -> subprocess.CompletedProcess[str]:
    """A process whose output goes where a server's does; returns once its file is complete."""
    command = [sys.executable, "-c", SERVER, str(folder), log_format, end]
    # The writer holds stderr: that it has ended is told by the end of the pipe.
    return subprocess.run(command, capture_output=True, text=True, timeout=GUARD_S, check=False)


def write(folder: Path, printed: str, log_format: str = "text", size: int = 0, backups: int = 1) -> str:
    """What the writer shows of what was printed."""
    command = [sys.executable, log_writer.__file__, str(folder / "log"), str(size), str(backups), log_format]
    done = subprocess.run(command, input=printed, capture_output=True, text=True, timeout=GUARD_S, check=True)
    assert done.stdout == ""
    return done.stderr


def test_the_file_has_everything_and_stderr_the_lines_of_logging_with_their_further_lines(
    tmp_path: Path,
) -> None:
    logged = LOGGED.format("failed") + "\n    Traceback\n      File\n"
    printed = f"  indented\nLoading: 1%\rLoading: 100%\n{logged}Traceback\n    of C++\nno newline"
    assert write(tmp_path, printed) == logged
    assert (tmp_path / "log").read_text() == printed.replace("Loading: 1%\r", "") + "\n"


def test_a_file_of_json_has_nothing_but_json(tmp_path: Path) -> None:
    record = json.dumps({"time": "2026-11-27T20:00:00Z", "level": "INFO", "logger": "x", "message": "m"})
    assert write(tmp_path, f"{{}}\n{record}\n    printed\n", "json") == f"{record}\n"
    first, second, third = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    assert (first["logger"], first["message"]) == ("output", "{}")
    assert second["logger"] == "x"
    assert (third["logger"], third["message"]) == ("output", "    printed")


def test_a_file_is_continued_in_a_new_one_before_it_is_too_large_and_few_are_kept(tmp_path: Path) -> None:
    lines = [LOGGED.format(number) for number in range(20)]
    assert write(tmp_path, "\n".join(lines), size=200, backups=2).splitlines() == lines
    files = [tmp_path / name for name in ("log.2", "log.1", "log")]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    kept = [line for file in files for line in file.read_text().splitlines()]
    assert kept == lines[-len(kept) :]
    assert all(file.stat().st_size <= 200 for file in files)


def test_a_file_from_an_earlier_start_is_continued(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path, LOGGED.format(number))
    assert (tmp_path / "log").read_text() == LOGGED.format(0) + "\n" + LOGGED.format(1) + "\n"


@contextmanager
def terminal(read: bool) -> Iterator[IO[str]]:
    """A stderr whose reader is gone, or is there and reads nothing."""
    reader, writer = os.pipe()
    if not read:
        os.close(reader)
    with os.fdopen(writer, "w") as screen:
        yield screen
    if read:
        os.close(reader)


def test_a_terminal_that_is_not_read_loses_lines_and_holds_nothing_up(tmp_path: Path) -> None:
    lines = [LOGGED.format("x" * 1000) + "\n" for _ in range(300)]
    file = log_writer.RotatedFile(str(tmp_path / "log"), 0, 1)
    with terminal(read=True) as stuck:
        log_writer.write_all(iter(lines), file, stuck, "text")
    file.close()
    assert (tmp_path / "log").read_text() == "".join(lines)


def test_a_terminal_that_is_gone_and_a_disk_that_is_full_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> IO[str]:
        raise OSError("no space left")

    lines = [LOGGED.format(number) + "\n" for number in range(3)]
    file = log_writer.RotatedFile(str(tmp_path / "log"), 0, 1)
    with terminal(read=False) as gone:
        log_writer.write_all(iter(lines), file, gone, "text")
        assert (tmp_path / "log").read_text() == "".join(lines)
        file.close()
        monkeypatch.setattr(file, "stream", None)
        monkeypatch.setattr(file, "_open", full)
        log_writer.write_all(iter(lines), file, gone, "text")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_server_s_start_up_lines_stay_on_stdout_and_its_log_is_on_stderr(
    tmp_path: Path, log_format: str
) -> None:
    done = run(tmp_path, log_format, "ends")
    assert done.stdout == "starting\n"
    (line,) = done.stderr.splitlines()
    assert "logged" in line
    printed, by_child, logged = (tmp_path / "surrogate.log").read_text().splitlines()
    assert "printed" in printed
    assert "printed by a child" in by_child
    assert logged == line


def test_a_server_that_fails_has_its_traceback_in_the_file_and_the_terminal_back(tmp_path: Path) -> None:
    done = run(tmp_path, "text", "raises")
    assert "RuntimeError: the engine died" in (tmp_path / "surrogate.log").read_text()
    assert done.stderr.splitlines()[-1] == "RuntimeError: the engine died"


def test_a_server_that_is_killed_has_its_last_words_in_the_file(tmp_path: Path) -> None:
    done = run(tmp_path, "text", "killed")
    assert done.returncode == -9
    deadline = time.monotonic() + GUARD_S
    while "logged" not in (tmp_path / "surrogate.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "printed by a child" in (tmp_path / "surrogate.log").read_text()
