"""An evaluation's verdict is the server's."""

from __future__ import annotations

from pathlib import Path

import pytest

from soma_vllm.config import Config, parse_config
from soma_vllm.tools.calibrate.sources import read_file
from soma_vllm.tools.command_line import write_json
from soma_vllm.tools.evaluate.harness import MeasuredTrial, judge_measured
from soma_vllm.types import Agreement, Candidate, Evidence


def config(**adaptation: object) -> Config:
    gate = {"accept_threshold": 0.1, "min_gain": 0.1}
    settings = {"warm_window": 4, "acceptance_min_turns": 2, "gate": gate, "adaptation": adaptation}
    return parse_config(settings, "test")


def evidence(candidate: Candidate, gaps: tuple[float, ...], nll: float = 1.0) -> Evidence:
    return Evidence(candidate, gaps, tuple(range(5 - len(gaps), 5)), Agreement(nll, 0.9, 10))


def trial(*gaps: float, adapted: float | None = None, nll: float = 0.5, never: bool = False) -> MeasuredTrial:
    made = MeasuredTrial(never)
    made.warm = evidence(Candidate.PLAIN, gaps)
    made.held_out = evidence(Candidate.PLAIN, gaps[-2:])
    made.adapted = None if adapted is None else evidence(Candidate.ADAPTER, (adapted, adapted), nll)
    return made


@pytest.mark.parametrize(
    ("found", "candidate"),
    [
        # Good on the held-out turns alone is not good on the warm start.
        (trial(0.9, 0.9, 0.0, 0.0), Candidate.ORIGINAL),
        (trial(0.05, 0.05, 0.12, 0.12), Candidate.PLAIN),
        (trial(0.05, 0.05, 0.12, 0.12, adapted=0.0), Candidate.PLAIN),
        (trial(0.9, 0.9, 0.0, 0.0, adapted=0.0), Candidate.ADAPTER),
        (trial(0.9, 0.9, 0.0, 0.0, adapted=0.0, nll=0.95), Candidate.ORIGINAL),
        (trial(0.9, 0.9, 0.9, 0.9, adapted=0.0, never=True), Candidate.ORIGINAL),
    ],
)
def test_plain_is_judged_on_the_whole_warm_start_and_an_adapter_only_where_that_failed_and_it_gains(
    found: MeasuredTrial, candidate: Candidate
) -> None:
    assert judge_measured(found, config())[0].candidate is candidate


def test_a_candidate_that_is_not_configured_is_not_chosen() -> None:
    both = trial(0.0, 0.0, 0.0, 0.0, adapted=0.0)
    assert judge_measured(both, config(candidates=["adapter"]))[0].candidate is Candidate.ADAPTER
    assert judge_measured(both, config(candidates=["plain"]))[0].candidate is Candidate.PLAIN
    refused = judge_measured(trial(0.9, 0.9, 0.9, 0.9), config(candidates=["adapter"]))[0]
    assert (refused.candidate, "none was trained" in refused.reason) == (Candidate.ORIGINAL, True)


def test_the_numbers_are_of_every_candidate_whoever_was_asked_for() -> None:
    verdict, numbers = judge_measured(trial(0.0, 0.0, 0.1, 0.1, adapted=0.2), config())
    assert verdict.candidate is Candidate.PLAIN
    gaps = {name: found["gaps"] for name, found in numbers["candidates"].items()}
    assert gaps == {"plain": [0.1, 0.1], "adapter": [0.2, 0.2]}
    assert numbers["warm"]["gaps"] == [0.0, 0.0, 0.1, 0.1]


def test_calibration_learns_of_plain_from_the_mean_that_the_gate_compares(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    settings = config()
    verdict, numbers = judge_measured(trial(0.4, 0.4, 0.0, 0.0, adapted=0.3), settings)
    later = {"sessions": {"a": {"gap": 0.1, "top1": 0.9, "turns": 5}}}
    chosen = {"candidate": verdict.candidate, "reason": verdict.reason, "held_out": numbers}
    document = {
        "settings": {"config": settings.model_dump(mode="json")},
        "variants": {"plain@full": later, "kd@full": later},
        "chosen": {"a": chosen},
    }
    write_json(path, document)
    gaps = {case.candidate: case.gap for case in read_file(path).cases}
    assert gaps == {Candidate.PLAIN: pytest.approx(0.2), Candidate.ADAPTER: pytest.approx(0.3)}
