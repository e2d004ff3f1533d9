"""What a machine that lacks something is told before set-up spends minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.guard import GUARD_S

REQUIREMENTS = Path(__file__).parents[3] / "requirements"
NO_INDEX = "http://127.0.0.1:9/simple"


def told(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a script says in an environment without pip's own settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        [sys.executable, str(REQUIREMENTS / script), *arguments],
        env={**inherited, "PIP_CONFIG_FILE": os.devnull, **environment},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )


def test_a_machine_is_told_what_it_is_and_how_long_set_up_takes() -> None:
    done = told("check_machine.py", "cpu")
    assert done.returncode == 0
    first, *_, last = done.stdout.splitlines()
    assert "cores of" in first
    assert "GB of memory" in first
    assert "minutes" in last


def test_a_machine_without_a_compiler_is_told_what_is_slower_and_goes_on() -> None:
    done = told("check_machine.py", "cpu", PATH=os.devnull)
    assert done.returncode == 0
    assert "no C++ compiler: the C++ products are not built" in done.stdout
    assert "apt install g++" in done.stdout


def test_a_proxy_is_named_by_its_variable_alone() -> None:
    done = told("check_machine.py", "cpu", HTTPS_PROXY="http://user:secret@proxy.invalid:3128")
    assert "through the proxy in HTTPS_PROXY" in done.stdout
    assert "secret" not in done.stdout + done.stderr


def test_an_index_that_does_not_answer_ends_set_up_at_once_with_what_to_do(tmp_path: Path) -> None:
    lock = tmp_path / "wanted.lock"
    lock.write_text("no-such-package-of-anybody==1.0\n")
    done = told("install.py", str(lock), PIP_INDEX_URL=NO_INDEX)
    assert done.returncode == 1
    assert "the package index does not answer, so nothing was installed" in done.stderr
    assert "PIP_INDEX_URL" in done.stderr
    assert "HTTPS_PROXY" in done.stderr


def test_what_is_installed_already_needs_no_index() -> None:
    done = told("install.py", str(REQUIREMENTS / "build.lock"), PIP_INDEX_URL=NO_INDEX)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failure_of_pip_is_printed_in_full(tmp_path: Path) -> None:
    lock = tmp_path / "wrong.lock"
    lock.write_text("no-such-package-of-anybody==1.0\n")
    done = told("install.py", str(lock), "--no-index")
    assert done.returncode == 1
    assert "no-such-package-of-anybody==1.0" in done.stderr
    assert done.stdout == ""
