"""The gap on labelled pairs that no weight was fitted to, with the embedded encoder."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest
from support.server import ROOT

from soma_vllm.method.encoder import SentenceEncoder
from soma_vllm.method.gap.facts_judge import FactsJudge
from soma_vllm.models.fetch import fetch
from soma_vllm.models.hub import local_path

pytestmark = pytest.mark.real

THRESHOLD = 0.12


def test_wrong_answers_are_refused_and_right_ones_pass_on_the_test_half() -> None:
    fetch("all-minilm-l6-v2")
    judge = FactsJudge(SentenceEncoder(local_path("all-minilm-l6-v2"), 256, 1))
    lines = (ROOT / "tests" / "data" / "gap_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [pair for pair in map(json.loads, lines) if sha256(pair["a"].encode()).digest()[0] % 2]
    found = judge.gaps([(pair["a"], pair["b"]) for pair in pairs])
    refused: dict[bool, list[bool]] = {True: [], False: []}
    for pair, gap in zip(pairs, found, strict=True):
        refused[pair["right"]].append(gap.value > THRESHOLD)
    assert len(pairs) >= 300
    assert sum(refused[False]) >= 0.95 * len(refused[False])
    assert sum(refused[True]) <= 0.10 * len(refused[True])
