"""Fit the weights of the gap that sees facts, and say how well gaps tell right answers from wrong ones.

    python benchmarks/gap_weights.py fit        # tuning half of tests/data/gap_pairs.jsonl -> weights.json
    python benchmarks/gap_weights.py figures    # both judges, both halves, per kind, and the time of a pair

Guarantees: the test half takes no part in a fit; a pair belongs to a half by the digest of its first text, so
that the right and the wrong answers to one text are in the same half.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import soma_vllm
from soma_vllm.method.encoder import SentenceEncoder
from soma_vllm.method.gap import facts_judge
from soma_vllm.method.gap.facts_judge import FactsJudge, alike
from soma_vllm.method.gap.gap_judge import EncoderJudge
from soma_vllm.models.hub import local_path

ROOT = Path(soma_vllm.__file__).parent.parent
PAIRS = ROOT / "tests" / "data" / "gap_pairs.jsonl"
WEIGHTS = Path(facts_judge.__file__).with_name("weights.json")
THRESHOLD = 0.12
REFUSED = 0.085
"""Share of right pairs that the cross-validated score may refuse, which places the threshold."""
RIDGE = 0.3
FOLDS = 8
FREE = frozenset(
    [
        "contained",
        "contained_short",
        "same_words",
        "opposite_even",
        "answer_alone",
        "extra",
        "extra_one",
        "bert_less",
        "bert_more",
        "encoder",
        "clauses",
        "name_replaced",
        "cut_head",
    ]
)
"""Features that may speak for a pair; all others only against it."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Labelled:
    """Two answers, and whether they say the same."""

    a: str
    b: str
    right: bool
    kind: str
    lang: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.a.encode()).digest()

    @property
    def tuning(self) -> bool:
        return self.digest[0] % 2 == 0


def load(path: Path = PAIRS) -> list[Labelled]:
    """The labelled pairs of a file."""
    return [Labelled(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def fitted(X: Array, y: Array, free: Sequence[bool]) -> Array:
    """Logistic regression with a ridge and signs, by projected Newton steps: weights and, last, the bias."""
    X = np.c_[X, np.ones(len(X))]
    at_will = np.array([*free, True])
    ridge = np.full(X.shape[1], 2 * RIDGE)
    ridge[-1] = 0.0

    def loss(w: Array) -> float:
        z = X @ w
        return float(np.logaddexp(0.0, z).sum() - y @ z + 0.5 * (ridge * w * w).sum())

    w = np.zeros(X.shape[1])
    for _ in range(200):
        p = 1.0 / (1.0 + np.exp(-(X @ w)))
        slope = X.T @ (p - y) + ridge * w
        moving = at_will | (w > 0) | (slope < 0)
        bend = (X.T * (p * (1 - p))) @ X + np.diag(ridge + 1e-6)
        step = np.zeros_like(w)
        step[moving] = np.linalg.solve(bend[np.ix_(moving, moving)], slope[moving])
        for size in 0.5 ** np.arange(20):
            tried = w - size * step
            tried = np.where(at_will, tried, np.maximum(tried, 0.0))
            if loss(tried) < loss(w) - 1e-9:
                break
        else:
            return w
        w = tried
    return w


def fit(pairs: Sequence[Labelled], judge: FactsJudge) -> dict[str, float]:
    """Weights for pairs in prose; the threshold from scores of folds that were left out."""
    prose = [one for one in pairs if alike(one.a, one.b) is None]
    evidence = judge.evidence([(one.a, one.b) for one in prose])
    names = list(evidence[0].features)
    X = np.array([[one.features[name] for name in names] for one in evidence])
    y = np.array([not one.right for one in prose], dtype=np.float64)
    free = [name in FREE for name in names]
    fold = np.array([one.digest[1] % FOLDS for one in prose])
    scores = np.zeros(len(prose))
    for number in range(FOLDS):
        out = fold == number
        w = fitted(X[~out], y[~out], free)
        scores[out] = X[out] @ w[:-1] + w[-1]
    edge = float(np.quantile(scores[y == 0], 1 - REFUSED))
    refused = np.mean(scores[y == 1] > edge)
    print(f"cross-validated, {len(y)} pairs in prose: {refused:.3f} of the wrong ones refused")
    w = fitted(X, y, free)
    bias = float(w[-1]) - edge + math.log(THRESHOLD / (1 - THRESHOLD))
    kept = {name: round(float(v), 4) for name, v in zip(names, w, strict=False) if abs(v) >= 5e-5}
    return kept | {"bias": round(bias, 4)}


def auc(wrong: Sequence[float], right: Sequence[float]) -> float:
    """How often a wrong pair has the larger gap."""
    w, r = np.array(wrong)[:, None], np.array(right)[None]
    return float(np.mean((w > r) + 0.5 * (w == r)))


def figures(pairs: Sequence[Labelled], judges: dict[str, Any]) -> str:
    """A table in Markdown: share refused at the threshold, per kind."""
    gaps = {
        name: [gap.value for gap in judge.gaps([(p.a, p.b) for p in pairs])] for name, judge in judges.items()
    }
    rows: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for n, pair in enumerate(pairs):
        rows[pair.right, pair.kind].append(n)
        rows[pair.right, "**all**"].append(n)
    lines = [
        f"| pairs | kind | number | {' | '.join(f'refused, {name}' for name in judges)} |",
        "|---|---|---|" + "---|" * len(judges),
    ]
    for (right, kind), places in sorted(rows.items()):
        shares = [f"{np.mean([found[n] > THRESHOLD for n in places]):.2f}" for found in gaps.values()]
        lines.append(f"| {'right' if right else 'wrong'} | {kind} | {len(places)} | {' | '.join(shares)} |")
    for name, found in gaps.items():
        wrong = [gap for gap, pair in zip(found, pairs, strict=True) if not pair.right]
        rest = [gap for gap, pair in zip(found, pairs, strict=True) if pair.right]
        lines.append(f"\nAUC, {name}: {auc(wrong, rest):.3f}")
    return "\n".join(lines)


def main() -> None:
    """Fit, or print the figures."""
    encoder = SentenceEncoder(local_path("all-minilm-l6-v2"), 256, 1)
    facts = FactsJudge(encoder)
    if sys.argv[1:2] == ["fit"]:
        found = fit([pair for pair in load() if pair.tuning], facts)
        WEIGHTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    path = Path(sys.argv[2]) if len(sys.argv) > 2 else PAIRS
    pairs = load(path)
    halves = {"tuning": [p for p in pairs if p.tuning], "test": [p for p in pairs if not p.tuning]}
    for name, half in halves.items() if path == PAIRS else [("all", pairs)]:
        told = figures(half, {"facts": facts, "encoder": EncoderJudge(encoder)})
        print(f"\n## {name}: {len(half)} pairs\n\n{told}")
    begun = time.perf_counter()
    facts.gaps([(pair.a, pair.b) for pair in pairs])
    print(f"\n{1000 * (time.perf_counter() - begun) / len(pairs):.1f} ms a pair, the encoder's pass included")


if __name__ == "__main__":
    main()
