"""examples/policy.py: a policy of another package, registered as its first lines say, through the contract."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.server import ROOT
from support.services import Build

EXAMPLE = ROOT / "examples" / "policy.py"
WARM = 2
TURNS = [("original", 1), ("original", 2), ("original", 3), ("surrogate", 4), ("original", 5), ("surrogate", 6)]


def entry_point() -> str:
    """The line that registers it, as an installed package has it."""
    form = r'\[project\.entry-points\."soma_vllm\.policies"\]\n\s+(\w+) = "([\w:]+)"'
    shown = re.search(form, EXAMPLE.read_text())
    assert shown is not None
    return f"{shown[1]} = {shown[2]}"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in a package, as an installer would leave it."""
    (tmp_path / "policy.py").write_text(EXAMPLE.read_text())
    info = tmp_path / "example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[soma_vllm.policies]\n{entry_point()}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "policy", raising=False)


@pytest.mark.usefixtures("installed")
async def test_it_routes_every_other_turn_after_the_warm_start_to_the_surrogate(build: Build) -> None:
    services = build(policy="every_other")
    await services.registry.start()
    history: list[dict[str, Any]] = []
    for engine, turn in TURNS:
        answer = await services.say(history, f"question {turn}")
        assert answer.headers["X-SOMA-Engine"] == engine
        assert answer.headers["X-SOMA-Adapter"] == ""
        assert answer.headers["X-SOMA-Reason"] == f"turn {turn}, warm start {WARM}"
    await services.settled()
    assert "adaptation_started" not in services.kinds()


@pytest.mark.usefixtures("installed")
async def test_a_request_may_choose_it(build: Build) -> None:
    services = build()
    await services.registry.start()
    answer = await services.say([], "Hi", model="soma:every_other")
    assert answer.headers["X-SOMA-Reason"] == f"turn 1, warm start {WARM}"


def test_it_is_short() -> None:
    code = EXAMPLE.read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
