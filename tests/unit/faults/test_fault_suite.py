"""The fault suite on servers that are wrong on purpose: it finds that, and nothing in one that is sound."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_suite
import pytest
from faults.house import CanarySurrogate, House, house
from faults.report import markdown, rows_of
from faults.row import Row, timed
from faults.soak import checked, come_and_go
from faults.suite import Fault, Scene

import soma_vllm
from soma_vllm.types import AdapterRef

ROOT = Path(soma_vllm.__file__).parent.parent
SESSIONS = 6

pytestmark = pytest.mark.slow


class Mixed(CanarySurrogate):
    """Serves another adapter than it was given."""

    async def load(self, ref: AdapterRef) -> None:
        await super().load(ref)
        self.says[ref.name] = "canary-9999"


def forgetful(opened: House) -> None:
    """A record that takes the turns of one session and keeps none of them."""
    append_all = opened.services.store.append_all

    async def some(appends: Any) -> None:
        await append_all([append for append in appends if append.key.session != "session 4"])

    opened.services.store.append_all = some  # type: ignore[method-assign]


def holding(opened: House) -> None:
    """Leases that are not given back."""

    async def never(ticket: object) -> None:
        pass

    opened.services.leases.release = never  # type: ignore[method-assign]


def failing(opened: House) -> None:
    """An original that fails each second time, and would not at once again."""
    chat, calls = opened.services.original.chat, [0]

    async def sometimes(call: Any) -> Any:
        calls[0] += 1
        if calls[0] % 2:
            raise RuntimeError("a defect")
        return await chat(call)

    opened.services.original.chat = sometimes  # type: ignore[method-assign]


def sound(opened: House) -> None:
    """As it is."""


def wrong(spoil: Callable[[House], None], **parts: Any) -> Fault:
    """A small soak of a spoilt server."""

    async def soaked(row: Row, folder: Path) -> None:
        async with house(folder, parts) as opened:
            spoil(opened)
            await checked(opened, row, await come_and_go(opened, row, SESSIONS))

    def play(scene: Scene) -> None:
        row = scene.row("soak", spoil.__name__)
        with timed(row):
            asyncio.run(soaked(row, scene.new_folder()))

    return Fault("soak", play)


def run(fault: Fault, monkeypatch: pytest.MonkeyPatch, kept: Path) -> tuple[int, Row]:
    """(exit code, row) of a run of this fault alone."""
    monkeypatch.setattr(fault_suite, "FAULTS", (fault,))
    code = fault_suite.main(["--json", str(kept)])
    (row,) = rows_of(json.loads(kept.read_text()))
    return code, row


@pytest.mark.parametrize(
    ("fault", "figure"),
    [
        (wrong(sound, surrogate=Mixed()), "wrong_adapter"),
        (wrong(forgetful), "lost_turns"),
        (wrong(holding), "leaks"),
        (wrong(failing), "needless_5xx"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_server_that_is_wrong_in_one_way_has_that_figure_and_ends_the_run_with_1(
    fault: Fault, figure: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, row = run(fault, monkeypatch, tmp_path / "kept.json")
    assert (code, row.broken) == (1, "")
    assert getattr(row, figure) > 0
    assert any(figure in words for words in row.found)


def test_a_sound_server_has_zeros_and_ends_the_run_with_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, row = run(wrong(sound), monkeypatch, tmp_path / "kept.json")
    assert (code, row.found, row.broken) == (0, [], "")
    assert row.requests == SESSIONS * 3 + 2  # session 4 is trained, and goes on


def test_a_part_that_breaks_off_fails_the_run_and_is_kept_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def breaks(scene: Scene) -> None:
        raise OSError("no room")

    def passes(scene: Scene) -> None:
        scene.row("quiet", "nothing")

    faults = (Fault("breaks", breaks), Fault("passes", passes))
    monkeypatch.setattr(fault_suite, "FAULTS", faults)
    kept = tmp_path / "kept.json"
    assert fault_suite.main(["--json", str(kept), "--only", "passes"]) == 0
    assert fault_suite.main(["--json", str(kept), "--resume"]) == 1
    document = json.loads(kept.read_text())
    assert list(document["parts"]) == ["passes", "breaks"]
    assert [row.broken for row in rows_of(document)] == ["", "OSError: no room"]
    assert "OSError: no room" in markdown(document)


def test_the_table_in_the_documents_is_that_of_the_committed_run() -> None:
    document = json.loads((ROOT / "docs" / "results" / "faults.json").read_text())
    assert markdown(document) in (ROOT / "docs" / "reliability.md").read_text()
    assert all(row.fine for row in rows_of(document))
