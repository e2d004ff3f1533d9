"""What the repository holds: sources, and nothing that a build makes or that one machine alone has."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMAGES = {".png"}
LARGEST = 1 << 20
OF_ONE_MACHINE = re.compile(rb"/(?:home|Users|root|work|mnt|media)/[A-Za-z]")


@cache
def tracked(*options: str) -> list[str]:
    """Paths that git tracks."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", *options], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no clone: git tracks nothing here")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def sources() -> dict[str, bytes]:
    """What is tracked and meant to be read."""
    return {name: (ROOT / name).read_bytes() for name in tracked() if Path(name).suffix not in IMAGES}


def test_nothing_that_is_tracked_is_binary_but_images() -> None:
    assert [name for name, content in sources().items() if b"\0" in content] == []


def test_no_tracked_file_is_larger_than_a_megabyte() -> None:
    assert [name for name in tracked() if (ROOT / name).stat().st_size > LARGEST] == []


def test_nothing_that_is_tracked_is_ignored_as_what_a_build_makes() -> None:
    assert tracked("--cached", "--ignored", "--exclude-standard") == []


def test_no_tracked_file_names_a_folder_of_one_machine() -> None:
    assert [name for name, content in sources().items() if OF_ONE_MACHINE.search(content)] == []
