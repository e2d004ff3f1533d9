"""The gate's arithmetic and verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from soma_vllm.config import Gate
from soma_vllm.sessions.state.gate import Drift, Vector, centroid, gap, judge
from soma_vllm.types import Agreement, Candidate, Evidence

GATE = Gate(accept_threshold=0.1, drift_window=2, drift_threshold=0.3, consecutive_to_rollback=2)


def vector(*values: float) -> Vector:
    return np.asarray(values, dtype=np.float32)


def evidence(candidate: Candidate, *gaps: float, nll: float | None = None, top1: float = 0.9) -> Evidence:
    agreement = None if nll is None else Agreement(nll, top1, 50)
    return Evidence(candidate, gaps, tuple(range(1, len(gaps) + 1)), agreement)


def test_the_gap_is_one_minus_the_cosine() -> None:
    a, b = vector(1, 2, 3), vector(-1, 0.5, 2)
    cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(14 * 5.25)
    assert gap(a, b) == pytest.approx(1 - cosine, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "expected"), [((1, 0), (1, 0), 0), ((1, 0), (-1, 0), 2), ((1, 0), (0, 1), 1)]
)
def test_the_gap_spans_zero_to_two(a: tuple[float, ...], b: tuple[float, ...], expected: float) -> None:
    assert gap(vector(*a), vector(*b)) == pytest.approx(expected)


def test_two_empty_texts_agree_and_an_empty_one_disagrees_with_any_other() -> None:
    assert gap(vector(0, 0), vector(0, 0)) == 0
    assert gap(vector(0, 0), vector(1, 0)) == 1


def test_the_centroid_is_the_mean() -> None:
    assert centroid([vector(1, 0), vector(0, 1)]).tolist() == [0.5, 0.5]


def test_the_cheapest_candidate_that_passes_is_chosen() -> None:
    verdict = judge(
        [evidence(Candidate.PLAIN, 0.05, nll=0.5), evidence(Candidate.ADAPTER, 0.01, nll=0.1)], GATE, 1
    )
    assert verdict.candidate is Candidate.PLAIN


def test_the_adapter_is_chosen_where_the_plain_surrogate_fails() -> None:
    verdict = judge(
        [evidence(Candidate.PLAIN, 0.2, nll=0.5), evidence(Candidate.ADAPTER, 0.05, nll=0.4)], GATE, 1
    )
    assert verdict.candidate is Candidate.ADAPTER
    assert "0.200" in verdict.numbers["candidates"]["plain"]["failure"]


@pytest.mark.parametrize(
    ("adapted", "serves"), [(0.44, True), (0.46, False), (0.6, False), (float("nan"), False)]
)
def test_an_adapter_serves_only_where_it_gains_enough_over_the_plain_surrogate(
    adapted: float, serves: bool
) -> None:
    judged = [evidence(Candidate.PLAIN, 0.2, nll=0.5), evidence(Candidate.ADAPTER, 0.05, nll=adapted)]
    verdict = judge(judged, GATE, 1)
    assert verdict.candidate is (Candidate.ADAPTER if serves else Candidate.ORIGINAL)
    if not serves:
        assert "is not 10% less than plain 0.500" in verdict.reason


def test_an_adapter_as_good_as_plain_may_be_let_in_by_configuration_and_a_worse_one_never() -> None:
    gate = GATE.model_copy(update={"min_gain": 0.0})
    plain = evidence(Candidate.PLAIN, 0.2, nll=0.5)
    assert judge([plain, evidence(Candidate.ADAPTER, 0.05, nll=0.5)], gate, 1).candidate is Candidate.ADAPTER
    assert judge([plain, evidence(Candidate.ADAPTER, 0.05, nll=0.51)], gate, 1).candidate is Candidate.ORIGINAL


def test_acceptance_needs_its_least_number_of_turns() -> None:
    verdict = judge([evidence(Candidate.PLAIN, 0.0, nll=0.1)], GATE, 2)
    assert verdict.candidate is Candidate.ORIGINAL
    assert "fewer than 2" in verdict.reason


def test_the_margin_counts_against_the_candidate() -> None:
    gate = Gate(accept_threshold=0.1, accept_margin=0.06)
    assert judge([evidence(Candidate.PLAIN, 0.05)], gate, 1).candidate is Candidate.ORIGINAL


def test_token_agreement_can_refuse_what_the_encoder_lets_pass() -> None:
    gate = Gate(accept_threshold=0.1, min_agreement=0.8)
    verdict = judge([evidence(Candidate.PLAIN, 0.01, nll=1.0, top1=0.5)], gate, 1)
    assert verdict.candidate is Candidate.ORIGINAL
    assert "0.500 below 0.8" in verdict.reason


def test_a_gap_that_is_not_a_number_never_passes() -> None:
    assert judge([evidence(Candidate.PLAIN, math.nan)], GATE, 1).candidate is Candidate.ORIGINAL


def test_a_candidate_that_is_not_allowed_is_compared_but_not_chosen() -> None:
    verdict = judge([evidence(Candidate.PLAIN, 0.01)], GATE, 1, allowed=[Candidate.ADAPTER])
    assert verdict.candidate is Candidate.ORIGINAL
    assert verdict.numbers["candidates"]["plain"]["passes"]


def test_forcing_overrules_the_verdict_and_keeps_the_numbers() -> None:
    items = [evidence(Candidate.PLAIN, 0.5, nll=0.5), evidence(Candidate.ADAPTER, 0.4, nll=0.4)]
    verdict = judge(items, GATE, 1, forced=Candidate.ADAPTER)
    assert verdict.candidate is Candidate.ADAPTER
    assert "the gate says gap 0.400 above 0.1" in verdict.reason


def test_drift_rolls_back_after_consecutive_breaches_of_the_moving_mean() -> None:
    drift = Drift().observe("gap", 0.5, GATE)
    assert not drift.demands_rollback(GATE)
    assert drift.observe("gap", 0.4, GATE).demands_rollback(GATE)


def test_a_calm_audit_resets_the_breaches() -> None:
    drift = Drift().observe("gap", 0.5, GATE).observe("gap", 0.0, GATE)
    assert drift.moving() == pytest.approx(0.25 / GATE.drift_threshold)
    assert drift.breaches == 0


def test_the_window_forgets_old_audits() -> None:
    drift = Drift()
    for value in (2.0, 0.1, 0.1):
        drift = drift.observe("gap", value, GATE)
    assert [audit.value for audit in drift.window] == [0.1, 0.1]


def test_gaps_and_surprises_are_compared_each_by_its_own_threshold() -> None:
    gate = Gate(drift_window=2, drift_threshold=0.3, surprise_threshold=2.0, consecutive_to_rollback=1)
    calm = Drift().observe("gap", 0.29, gate).observe("surprise", 1.9, gate)
    assert not calm.demands_rollback(gate)
    assert [audit.relative for audit in calm.window] == pytest.approx([0.29 / 0.3, 0.95])
    assert Drift().observe("surprise", 2.1, gate).demands_rollback(gate)
    # One well above its threshold and one below: together 1.2 of it, whatever their units.
    assert Drift().observe("gap", 0.45, gate).observe("surprise", 1.8, gate).demands_rollback(gate)


@pytest.mark.parametrize("value", [1.0e-6, 1.0])
def test_under_a_threshold_of_nothing_any_drift_breaches_and_none_does_not(value: float) -> None:
    gate = Gate(drift_threshold=0.0, consecutive_to_rollback=1)
    assert Drift().observe("gap", value, gate).demands_rollback(gate)
    assert not Drift().observe("gap", 0.0, gate).demands_rollback(gate)


def test_every_rollback_makes_the_gate_stricter() -> None:
    gate = Gate(accept_threshold=0.1, readmit_factor=0.5)
    item = [evidence(Candidate.PLAIN, 0.04)]
    judged = [judge(item, gate, 1, setbacks=count) for count in range(3)]
    assert [v.candidate for v in judged] == [Candidate.PLAIN, Candidate.PLAIN, Candidate.ORIGINAL]
    assert [v.numbers["accept_threshold"] for v in judged] == pytest.approx([0.1, 0.05, 0.025])
    assert "0.040 above 0.025" in judged[-1].reason
