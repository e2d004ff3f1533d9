"""The documents: links, configuration keys and files that they name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from soma_vllm.config import Config

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"))
    if ".venv" not in path.parts
)
NOT_OF_TODAY = ("docs/experiments", "docs/results/gpu.md")
"""Written once, and left as they are: they name keys and files of their day."""
CURRENT = [path for path in DOCUMENTS if not path.relative_to(ROOT).as_posix().startswith(NOT_OF_TODAY)]
SECTIONS = {
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
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


def is_key(dotted: str) -> bool:
    """Whether the configuration has a key, or a section, of this name."""
    found: object = Config
    for name in dotted.split("."):
        if not (isinstance(found, type) and issubclass(found, BaseModel) and name in found.model_fields):
            return False
        found = found.model_fields[name].annotation
    return True


def wrong_keys(text: str) -> list[str]:
    """Names in backticks that read as keys of the configuration and are none."""
    quoted = re.findall(r"`(?:--set )?([a-z_0-9]+(?:\.[a-z][A-Za-z_0-9]*)+)(?:[:=][^`]*)?`", text)
    keys = [name for name in quoted if name.split(".")[0] in SECTIONS and Path(name).suffix != ".py"]
    return [name for name in keys if not is_key(name)]


@pytest.mark.parametrize("document", CURRENT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_configuration_key_that_a_document_names_exists(document: Path) -> None:
    assert wrong_keys(document.read_text(encoding="utf-8")) == []


def test_a_key_that_does_not_exist_is_found() -> None:
    text = "`gate.audit` `gate.no` `--set lora.nothing=1` `baselines.routellm.router` `access.mode: keys`"
    assert wrong_keys(text) == ["gate.no", "lora.nothing"]


def lost_files(text: str) -> list[str]:
    """Source files and folders in backticks that are not there. One named alone may lie in any room."""
    lost = []
    for name in re.findall(r"`([\w./]+(?:\.(?:py|cpp|h|sh)|/))`", text):
        places = (ROOT, ROOT / "soma_vllm", ROOT / "tests", ROOT / "tests" / "unit")
        alone = "/" not in name.rstrip("/")
        anywhere = alone and [*(ROOT / "soma_vllm").rglob(name.rstrip("/")), *ROOT.glob(f"*/{name}")]
        if not anywhere and not any((place / name).exists() for place in places):
            lost.append(name)
    return lost


@pytest.mark.parametrize("document", CURRENT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_source_file_that_a_document_names_exists(document: Path) -> None:
    assert lost_files(document.read_text(encoding="utf-8")) == []


def test_a_source_file_that_does_not_exist_is_found() -> None:
    there = "`scheduler/dispatcher.py` `dispatcher.py` `policies/` `tests/unit/`"
    assert lost_files(f"{there} `scheduler/no.py` `no.py` `no/`") == ["scheduler/no.py", "no.py", "no/"]
