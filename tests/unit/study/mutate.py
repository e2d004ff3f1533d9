"""Puts nine defects into copies of the study, one at a time, and says which ones the fast tests let live.

    python tests/unit/study/mutate.py

Exit code: 0 if every defect fails a test, 1 if one lives or could not be put in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MUTATIONS = (
    (
        "later turns include turn W",
        "service.py",
        "turn.turn > warm]\n    switches",
        "turn.turn >= warm]\n    switches",
    ),
    (
        "the headline ratio is taken over all turns",
        "report.py",
        'round(ours["later_turn_latency_p50"] / arms[REFERENCE]["later_turn_latency_p50"], 4)',
        'round(ours["latency_s"]["p50"] / arms[REFERENCE]["latency_s"]["p50"], 4)',
    ),
    (
        "fidelity of the surrogate's turns is that of all",
        "fidelity.py",
        'if one.engine == "surrogate"]',
        "if one.engine]",
    ),
    (
        "the bill is that of the first repeat",
        "cost.py",
        "for column in zip_longest(*bills)",
        "for column in zip_longest(*bills[:1])",
    ),
    (
        "the net cost is that of the first repeat",
        "outcome.py",
        "return fmean(one.cost for one in courses) if courses else None",
        "return fmean(one.cost for one in courses[:1]) if courses else None",
    ),
    (
        "the surrogate's background is not paid",
        "cost.py",
        'prices) + spent.background_s["surrogate"] * prices.surrogate_second',
        "prices)",
    ),
    (
        "the surrogate's background is not billed",
        "cost.py",
        'sums[at] += spent.background_s["surrogate"] * prices.surrogate_second',
        "pass",
    ),
    ("prefill and decode are not told apart", "cost.py", "prefill / (prefill + decode) if", "0.5 if"),
    ("an engine is always busy", "meter.py", "if running > 0:", "if running >= 0:"),
    ("the trainer's seconds are Ray's", "meter.py", 'return "trainer"', 'return "ray"'),
)


def lives(file: str, old: str, new: str) -> bool:
    """Whether the fast tests pass with the defect in."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "benchmarks", copy / "benchmarks", ignore=shutil.ignore_patterns("gpu"))
        path = copy / "benchmarks" / "study" / file
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{file}: found {text.count(old)} of {old!r}; expected 1")
        path.write_text(text.replace(old, new), encoding="utf-8")
        tests = [
            str(ROOT / "tests/unit/study" / name) for name in ("test_study_outcome.py", "test_study_cost.py")
        ]
        settings = ["-p", "no:cacheprovider", "-o", f"pythonpath={ROOT / 'tests'} {copy / 'benchmarks'}"]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-x", "-q", *settings, *tests],
            cwd=ROOT,
            env=os.environ,
            capture_output=True,
            check=False,
        )
    if done.returncode not in (0, 1):
        raise ValueError(done.stdout.decode()[-2000:])
    return done.returncode == 0


def main() -> int:
    """Every mutation in turn."""
    alive = [name for name, *mutation in MUTATIONS if lives(*mutation)]
    for name, *_ in MUTATIONS:
        print(f"{'LIVES' if name in alive else 'fails'}  {name}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
