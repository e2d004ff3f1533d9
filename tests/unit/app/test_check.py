"""`soma-serve --check` on what keeps it from looking further: everything else is told all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from soma_vllm.app.serve import app

ROOT = Path(__file__).parents[3]


def test_models_and_policy_that_are_not_here_are_told_together_with_what_else_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMA_HOME", str(tmp_path))
    mistakes = {
        "original_model": "none-such",
        "surrogate_model": "none-other",
        "policy": "no-policy",
        "storage.url": "mysql://x",
        "adapters.root": str(tmp_path / "adapters"),
    }
    words = [word for key, value in mistakes.items() for word in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, ["--config", str(ROOT / "configs/tiny.yaml"), "--check", *words])
    assert done.exit_code == 1
    for told in ("'none-such'", "'none-other'", "'no-policy'", "tiny-encoder", "found mysql"):
        assert told in done.output


def test_a_configuration_that_names_no_pair_says_where_one_is_named() -> None:
    done = CliRunner().invoke(app, ["--config", str(ROOT / "configs/default.yaml"), "--check"])
    assert done.exit_code == 1
    assert "take configs/cpu_demo.yaml, which names a pair" in done.output
