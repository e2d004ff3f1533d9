"""The judge on its thread: what it raises is a failure of its pairs and ends nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from soma_vllm.adaptation.threaded_judge import ThreadedJudge
from soma_vllm.types import Gap


class Broken:
    def gaps(self, pairs: Sequence[tuple[str, str]]) -> list[Gap]:
        raise TypeError(f"cannot read {pairs[0][0]}")


async def test_what_a_judge_raises_is_a_failure_of_its_pairs_without_their_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    judge = ThreadedJudge(Broken())
    with caplog.at_level(logging.ERROR):
        found = await judge.gaps([("a secret", "b"), ("c", "d")])
    judge.close()
    assert found == [Gap(1.0, failure="TypeError")] * 2
    assert "2 pairs: TypeError" in caplog.text
    assert "secret" not in caplog.text
