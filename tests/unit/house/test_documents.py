"""The documents: every link of one to another, and to a heading in it, leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"))
    if ".venv" not in path.parts
)
LINK = re.compile(r"\]\((?!https?://)([^)\s]+)\)")


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    """Headings of a document, as links name them."""
    return {anchor(found) for found in re.findall(r"(?m)^#+ (.*)$", document.read_text(encoding="utf-8"))}


def broken(document: Path) -> list[str]:
    """Links that lead nowhere."""
    lost = []
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        name, _, heading = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (heading and heading not in anchors(target)):
            lost.append(link)
    return lost


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(document: Path) -> None:
    assert broken(document) == []


def test_a_link_to_a_missing_file_or_heading_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "# One, two\n[a](#one-two) [b](a.md#one-two) [c](b.md) [d](#three) [e](https://x.invalid)\n"
    )
    assert broken(document) == ["b.md", "#three"]


def test_every_experiment_stands_in_the_index() -> None:
    folder = ROOT / "docs" / "experiments"
    index = (folder / "README.md").read_text(encoding="utf-8")
    linked = set(LINK.findall(index))
    for path in folder.glob("*.md"):
        if path.name != "README.md":
            entries = re.findall(r"(?m)^## (.*)$", path.read_text(encoding="utf-8"))
            assert entries
            assert {f"{path.name}#{anchor(entry)}" for entry in entries} <= linked
