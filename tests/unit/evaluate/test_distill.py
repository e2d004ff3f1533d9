"""Pooling sessions for one adapter: every turn in its place, and nothing half-made."""

from __future__ import annotations

from pathlib import Path

import pytest

from soma_vllm.errors import TrainingError
from soma_vllm.tools.distill import pool, train_pair
from soma_vllm.tools.evaluate.dataset import Material
from soma_vllm.types import Example


def example(turn: int, words: str) -> Example:
    return Example(turn, ({"role": "user", "content": words},), f"answer to {words}")


def session(name: str) -> Material:
    first, second, third, fourth = (example(turn, f"{name}{turn}") for turn in (1, 2, 3, 4))
    return Material((first, second), (third,), (fourth,), frozenset())


def test_turns_of_different_sessions_get_numbers_of_their_own_and_keep_their_part() -> None:
    pooled = pool([session("a"), session("b")])
    assert [e.answer for e in pooled.examples] == [
        f"answer to {name}" for name in ("a1", "a2", "a4", "b1", "b2", "b4")
    ]
    assert [e.answer for e in pooled.held_out] == ["answer to a3", "answer to b3"]
    numbers = [e.turn for e in (*pooled.examples, *pooled.held_out)]
    assert len(set(numbers)) == len(numbers) == 8
    assert pooled.sessions == 2


def test_pooling_nothing_is_refused() -> None:
    with pytest.raises(TrainingError, match="no sessions to pool"):
        pool([])


def test_a_directory_with_files_in_it_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(TrainingError, match="found files there"):
        train_pair(None, pool([session("a")]), None, "*", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
