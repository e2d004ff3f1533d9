"""Cases, curve and recommendation, against numbers worked out by hand and a slow re-derivation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from soma_vllm.tools.calibrate.thresholds import (
    Axis,
    Calibration,
    Case,
    Missing,
    Outcome,
    Point,
    calibrate_axis,
    cases_needed,
    curve,
    wilson,
)
from soma_vllm.types import Candidate

BAD = 0.2
FINE, POOR = Outcome(0.1, 3), Outcome(0.3, 3)


def case(
    session: str,
    gap: float,
    outcome: Outcome | Missing,
    top1: float | None = 0.9,
    eps: float = 0.2,
    **more: bool | float,
) -> Case:
    values: dict[str, object] = {"min_agreement": 0.0, **more}
    return Case(session, 1, Candidate.PLAIN, gap, top1, eps, outcome=outcome, **values)


def at(points: Sequence[Point], threshold: float) -> Point:
    (found,) = (point for point in points if point.threshold == threshold)
    return found


def test_the_interval_is_wilsons() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("target", "rate"), [(0.05, 0.0), (0.1, 0.0), (0.2, 0.1), (0.05, 0.04), (0.5, 0.25)])
def test_the_cases_needed_are_the_first_number_whose_bound_reaches_the_target(
    target: float, rate: float
) -> None:
    needed = cases_needed(target, rate)
    assert needed == next(n for n in range(1, 10**5) if wilson(rate * n, n)[1] <= target)


def test_no_number_of_cases_proves_a_target_that_the_rate_itself_misses() -> None:
    assert cases_needed(0.05, 0.05) is None


def test_the_curve_of_six_cases_is_the_one_worked_out_by_hand() -> None:
    cases = [
        case("a", 0.02, FINE),
        case("b", 0.05, POOR),
        case("c", 0.05, FINE),
        case("d", 0.15, POOR),
        case("e", 0.30, Missing.REFUSED),
        case("f", 0.01, Missing.UNAUDITED),
    ]
    points = curve(cases, Axis.GAP, BAD)
    assert [p.threshold for p in points] == [0.02, 0.05, 0.15, 0.2]
    counts = [(p.false_accepts.count, p.false_accepts.total) for p in points]
    assert counts == [(0, 1), (1, 3), (2, 4), (2, 4)]
    assert [(p.let_through.count, p.let_through.total) for p in points] == [(0, 2), (1, 2), (2, 2), (2, 2)]
    # f moves although nobody audited it, e although it was refused then, once eps is large enough.
    assert [(p.moved.count, p.moved.total) for p in points] == [(2, 6), (4, 6), (5, 6), (5, 6)]


def test_on_the_axis_of_agreement_a_higher_threshold_is_stricter() -> None:
    cases = [case("a", 0.1, FINE, 0.9), case("b", 0.1, POOR, 0.6), case("c", 0.1, FINE, None)]
    points = curve(cases, Axis.TOP1, BAD)
    assert [p.threshold for p in points] == [0.9, 0.6, 0.0]
    assert [(p.false_accepts.count, p.false_accepts.total) for p in points] == [(0, 1), (1, 2), (1, 2)]


def test_an_outcome_is_bad_by_its_gap() -> None:
    assert not Outcome(0.2, 1, 0.1).is_bad(0.2)
    assert Outcome(0.2001, 1).is_bad(0.2)
    assert Outcome(math.nan, 1).is_bad(0.2)


def test_beyond_the_threshold_in_force_only_cases_that_were_measured_anyway_speak() -> None:
    served = [case(f"s{n}", 0.05, FINE, eps=0.1) for n in range(5)]
    forced = case("f", 0.4, POOR, eps=0.1, free=True)
    points = curve([*served, forced], Axis.GAP, BAD)
    assert at(points, 0.1).cases == 6
    assert at(points, 0.4).cases == 1
    assert (at(points, 0.4).false_accepts.count, at(points, 0.4).false_accepts.total) == (1, 1)
    assert calibrate_axis([*served, forced], Axis.GAP, BAD, 0.1).supported == 0.1
    assert calibrate_axis([forced], Axis.GAP, BAD, 0.1).supported is None


def test_logs_of_a_stricter_gate_do_not_speak_for_a_looser_threshold() -> None:
    """Pooled naively, five good cases of the strict gate would dilute the loose gate's two of four."""
    strict = [case(f"s{n}", 0.02, FINE, eps=0.05) for n in range(5)]
    loose = [case(f"l{n}", 0.15, POOR if n % 2 else FINE, eps=0.2) for n in range(4)]
    point = at(curve([*strict, *loose], Axis.GAP, BAD), 0.15)
    assert (point.false_accepts.count, point.false_accepts.total) == (2, 4)


def test_what_the_gate_refuses_for_other_reasons_is_accepted_at_no_threshold() -> None:
    cases = [
        case("ok", 0.1, FINE),
        case("barred", 0.01, POOR, barred=True, free=True),
        case("unsure", 0.01, POOR, 0.5, min_agreement=0.8, free=True),
    ]
    point = at(curve(cases, Axis.GAP, BAD), 0.2)
    assert (point.false_accepts.count, point.false_accepts.total) == (0, 1)
    assert (point.moved.count, point.moved.total) == (1, 3)
    far = [case("far", 0.5, POOR, 0.95, free=True), case("near", 0.1, FINE, 0.95)]
    (first, *_) = curve(far, Axis.TOP1, BAD)
    assert (first.false_accepts.count, first.false_accepts.total) == (0, 1)


def test_an_adaptation_moves_once_however_many_candidates_pass() -> None:
    plain = case("a", 0.1, Missing.OTHER)
    adapter = replace(case("a", 0.05, FINE), candidate=Candidate.ADAPTER)
    again = replace(case("a", 0.15, FINE), adaptation=2)
    points = curve([plain, adapter, again], Axis.GAP, BAD)
    assert [(p.threshold, p.moved.count, p.moved.total) for p in points] == [
        (0.05, 1, 2),
        (0.15, 2, 2),
        (0.2, 2, 2),
    ]


def population(count: int, seed: int, eps: float = 0.3) -> list[Case]:
    """Held-out gaps uniform in [0, 0.3]; a session of gap g turns out bad with probability 2g.

    So of those accepted at eps, the mean of 2g over [0, eps] is bad: the true false-accept rate is eps itself.
    """
    draw = random.Random(seed)
    cases = []
    for number in range(count):
        gap = draw.uniform(0, 0.3)
        outcome: Outcome | Missing = POOR if draw.random() < 2 * gap else FINE
        cases.append(case(str(number), gap, outcome if gap <= eps else Missing.REFUSED, 1 - gap, eps))
    return cases


@pytest.mark.parametrize("axis", Axis)
def test_the_curve_equals_a_slow_re_derivation(axis: Axis) -> None:
    draw = random.Random(1)
    cases = []
    for one in population(150, seed=2):
        gap = round(one.gap, 2)  # ties
        eps, least = draw.choice([0.1, 0.2]), draw.choice([0.0, 0.8])
        free, barred = draw.random() < 0.2, draw.random() < 0.1
        top1 = None if draw.random() < 0.1 else round(1 - gap + draw.uniform(-0.1, 0), 2)
        passed = gap <= eps and (top1 or 0.0) >= least and not barred
        outcome = one.outcome if passed or free else Missing.REFUSED
        cases.append(
            replace(
                one,
                gap=gap,
                top1=top1,
                accept_threshold=eps,
                min_agreement=least,
                free=free,
                barred=barred,
                outcome=outcome,
            )
        )
    points = curve(cases, axis, BAD)
    assert len(points) > 10
    for point in points:
        accepted = wrong = bad = speaking = moved = judged = 0
        for one in cases:
            if axis is Axis.TOP1 and one.top1 is None:
                continue
            if axis is Axis.GAP:
                passes = one.gap <= point.threshold and (one.top1 or 0.0) >= one.min_agreement
                speaks = one.free or point.threshold <= one.accept_threshold
            else:
                assert one.top1 is not None
                passes = one.top1 >= point.threshold and one.gap <= one.accept_threshold
                speaks = one.free or point.threshold >= one.min_agreement
            passes = passes and not one.barred
            judged, moved = judged + 1, moved + passes
            if not isinstance(one.outcome, Outcome) or not speaks:
                continue
            speaking += 1
            bad += one.outcome.gap > BAD
            accepted += passes
            wrong += passes and one.outcome.gap > BAD
        assert (point.false_accepts.count, point.false_accepts.total) == (wrong, accepted)
        assert (point.let_through.count, point.let_through.total) == (wrong, bad)
        assert (point.moved.count, point.moved.total) == (moved, judged)
        assert point.cases == speaking


def true_rate(threshold: float, axis: Axis) -> float:
    """Of the population above: on the axis of agreement a top-1 of 1 - g is asked for."""
    return threshold if axis is Axis.GAP else 1 - threshold


@pytest.mark.parametrize("axis", Axis)
def test_the_recommendation_is_right_for_a_population_whose_rate_is_known(axis: Axis) -> None:
    advice = calibrate_axis(population(4_000, seed=0), axis, BAD, 0.1)
    assert advice.best is not None
    assert 0.07 <= true_rate(advice.best.threshold, axis) <= 0.1


def test_small_samples_seldom_recommend_a_threshold_that_misses_the_target() -> None:
    """Choosing the loosest of many thresholds costs some of what the bound keeps."""
    found = [
        Calibration(Axis.GAP, 0.15, curve(population(250, seed), Axis.GAP, BAD)).best for seed in range(300)
    ]
    named = [best.threshold for best in found if best is not None]
    assert len(named) > 200
    assert sum(threshold > 0.15 for threshold in named) <= 0.08 * 300


def test_censored_logs_never_recommend_more_than_was_in_force() -> None:
    advice = calibrate_axis(population(5000, seed=3, eps=0.08), Axis.GAP, BAD, 0.5)
    assert advice.best is not None
    assert advice.best.threshold == 0.08


def test_too_few_cases_name_no_threshold_but_the_number_that_would_do() -> None:
    advice = calibrate_axis([case(str(n), 0.05, FINE) for n in range(10)], Axis.GAP, BAD, 0.05)
    assert advice.best is None
    assert cases_needed(0.05) == advice.needed_at_rate == 73
    enough = [case(str(n), 0.05, FINE) for n in range(73)]
    found = calibrate_axis(enough, Axis.GAP, BAD, 0.05).best
    assert found is not None
    assert found.threshold == 0.2
    assert calibrate_axis(enough[:72], Axis.GAP, BAD, 0.05).best is None


def test_without_outcomes_there_is_no_curve_and_no_recommendation() -> None:
    advice = calibrate_axis([case("a", 0.3, Missing.REFUSED)], Axis.GAP, BAD, 0.05)
    assert advice.points == ()
    assert (advice.best, advice.nearest, advice.needed_at_rate) == (None, None, None)
