"""What the repository holds: sources, and nothing that a build makes or that one machine alone has."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST = 1_000_000
BUILT = {
    ".so",
    ".o",
    ".a",
    ".pyc",
    ".pyd",
    ".dll",
    ".dylib",
    ".whl",
    ".gz",
    ".zip",
    ".db",
    ".safetensors",
    ".gguf",
}
"""Endings that only programs write."""
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


def is_text(content: bytes) -> bool:
    """UTF-8 without control characters but tab, line feed and carriage return."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text)


def sources() -> dict[str, bytes]:
    """What is tracked and meant to be read."""
    return {name: (ROOT / name).read_bytes() for name in tracked() if Path(name).suffix != ".png"}


def test_something_is_tracked() -> None:
    assert {"README.md", "setup.py", "soma_vllm/__init__.py"} <= set(tracked())


def test_nothing_that_is_tracked_is_binary_but_images() -> None:
    assert [name for name, content in sources().items() if not is_text(content)] == []


def test_every_tracked_image_is_a_png() -> None:
    images = [name for name in tracked() if Path(name).suffix == ".png"]
    assert images
    assert [name for name in images if not (ROOT / name).read_bytes().startswith(PNG)] == []


@pytest.mark.parametrize(
    "content", [b"\x7fELF\x02\x01", b"PK\x03\x04", b"caf\xe9", b"a\0b", PNG, b"\x1f\x8b\x08"], ids=repr
)
def test_binary_content_is_recognised(content: bytes) -> None:
    assert not is_text(content)


def test_nothing_that_is_tracked_bears_the_name_of_a_built_file() -> None:
    assert [name for name in tracked() if BUILT & set(Path(name).suffixes)] == []


def test_no_tracked_file_is_larger_than_a_megabyte() -> None:
    assert [name for name in tracked() if (ROOT / name).stat().st_size > LARGEST] == []


def test_nothing_that_is_tracked_is_a_link() -> None:
    assert [name for name in tracked() if (ROOT / name).is_symlink()] == []


def test_nothing_that_is_tracked_is_ignored_as_what_a_build_makes() -> None:
    assert tracked("--cached", "--ignored", "--exclude-standard") == []


def test_no_tracked_file_names_a_folder_of_one_machine() -> None:
    assert [name for name, content in sources().items() if OF_ONE_MACHINE.search(content)] == []
