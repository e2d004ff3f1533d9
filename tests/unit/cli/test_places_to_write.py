"""`--out` of each command, where nothing can be written: told with exit 2, before anything is played."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from soma_vllm.cli.main import app

CONFIG = "original_model: tiny-original\nsurrogate_model: tiny-surrogate\nwarm_window: 2\n"


def commands(folder: Path) -> dict[str, list[str]]:
    config, dialogues, log = folder / "c.yaml", folder / "d.json", folder / "log.json"
    config.write_text(CONFIG)
    dialogues.write_text('{"a": ["one", "two", "three"]}')
    log.write_text(
        '{"config": {"gate": {"drift_threshold": 0.3}}, "sessions": {"a": {"session": "a", "events": []}}}'
    )
    pair = ["--config", str(config), "--dialogues", str(dialogues)]
    return {
        "replay": ["replay", *pair, "--url", "http://127.0.0.1:9"],
        "evaluate": ["evaluate", *pair],
        "distill": ["distill", *pair],
        "calibrate": ["calibrate", str(log), "--target", "0.05", "--bad-gap", "0.5"],
    }


@pytest.mark.parametrize("command", ["replay", "evaluate", "distill", "calibrate"])
@pytest.mark.parametrize("place", ["taken", "taken/below", "/proc/none/below"])
def test_a_place_that_cannot_be_written_is_told_with_exit_2(command: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    out = tmp_path / place
    done = CliRunner().invoke(app, [*commands(tmp_path)[command], "--out", str(out)])
    assert done.exit_code == 2, done.output
    assert f"--out {out}: 1 mistake" in done.output
    assert (tmp_path / "taken").read_text() == "mine"


def test_distilling_into_a_folder_with_files_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    done = CliRunner().invoke(app, [*commands(tmp_path)["distill"], "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert "found files there; expected a new or an empty directory" in done.output
