"""A policy of somebody else's: one class and one entry point, as docs/policies.md shows them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.server import ROOT
from support.services import Build

DOCUMENT = ROOT / "docs" / "policies.md"


def block(language: str, number: int = 0) -> str:
    """One code block of the document."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[number]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document's package, as an installer would leave it."""
    (tmp_path / "my_policies.py").write_text(block("python"))
    (tmp_path / "my_preparing_policies.py").write_text(block("python", 1))
    info = tmp_path / "my_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-policies\nVersion: 1.0\n")
    entries = ["short = my_policies:ShortQueries", "counted = my_preparing_policies:Counted"]
    (info / "entry_points.txt").write_text("\n".join(["[soma_vllm.policies]", *entries]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_policies", "my_preparing_policies"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("installed")
async def test_a_policy_of_another_package_is_chosen_by_the_configuration(build: Build) -> None:
    services = build(policy="short")
    await services.registry.start()
    short = await services.say([], "Hi")
    long = await services.say([], "Please explain at length " + "why " * 50, "t")
    assert short.headers["X-SOMA-Engine"] == "surrogate"
    assert long.headers["X-SOMA-Engine"] == "original"
    assert short.headers["X-SOMA-Reason"] == "2 characters"


@pytest.mark.usefixtures("installed")
async def test_a_policy_of_another_package_is_chosen_by_a_request(build: Build) -> None:
    services = build()
    await services.registry.start()
    answer = await services.say([], "Hi", model="soma:short")
    assert answer.headers["X-SOMA-Engine"] == "surrogate"


@pytest.mark.usefixtures("installed")
async def test_a_policy_may_prepare_its_decision(build: Build) -> None:
    services = build()
    await services.registry.start()
    answer = await services.say([], "one two three", model="soma:counted")
    assert answer.headers["X-SOMA-Reason"] == "3 words"
    await services.policies.close()


def test_the_document_shows_the_entry_points_that_the_tests_install() -> None:
    assert 'short = "my_policies:ShortQueries"' in block("toml")
