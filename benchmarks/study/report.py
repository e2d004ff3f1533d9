"""The study as one JSON document. Holds no conversation text; table and figures are made from it alone.

Guarantees: a run in which a planned turn is missing, or an arm was answered by an engine it must not use, is
refused and not reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from soma_vllm.config import Config, Prices
from study import capacity, outcome
from study.capacity import Rung, Targets
from study.client import Answered
from study.cost import bill, break_even, mean_bill
from study.fidelity import Compared, Gaps, compare, summary
from study.outcome import RATIOS, Course
from study.plan import Block
from study.service import Measured, percentiles, rankings, service, switched_latency, work

__all__ = ["Also", "IncompleteRun", "Measured", "Targets", "check", "percentiles", "rankings", "report",
           "switched_latency"]  # fmt: skip

REFERENCE = "original"
OURS = "soma"
OVERHEADS = {  # ratios, by where they stand among what `study.overhead` found
    "dispatch_overhead_ms": ("added_ms", "session"),
    "first_turn_overhead_ms": ("added_ms_first_turns", "session"),
    "bypass_overhead_ms": ("added_ms", "by_name"),
}
CAPACITY = "capacity_soma_over_original"
ALLOWED = {
    "original": {"original"},
    "original_one_core": {"original"},
    "surrogate": {"surrogate"},
    "speculative": {"original"},
}
"""Engines, by arm."""


@dataclass(frozen=True)
class Also:
    """What was played beside the arms' own blocks."""

    rate: float = 0.0
    """Sessions an hour of the arms' own blocks."""
    rungs: Mapping[str, Sequence[tuple[float, Measured]]] = field(default_factory=dict)
    """By arm: (sessions an hour, the block played at it)."""
    drift: Mapping[str, Sequence[Measured]] = field(default_factory=dict)
    """By arm: blocks of sessions whose topic changes."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """By dialogue of these: the turn with which it changes."""


class IncompleteRun(Exception):
    """What was planned did not all happen."""


def check(measured: Sequence[Measured], blocks: Sequence[Block]) -> None:
    """Raises IncompleteRun: a planned turn is missing, or an engine answered in an arm it has no place in."""
    problems = []
    if [_place(one.block) for one in measured] != [_place(block) for block in blocks]:
        problems.append(f"found {len(measured)} blocks in their order; expected {len(blocks)}")
    for one in measured:
        where = f"{one.block.arm}, repeat {one.block.repeat}"
        problems += [f"{where}: {p.visit.session}: {p.error}" for p in one.played if p.error]
        if len(one.turns) != one.block.planned:
            problems.append(f"{where}: found {len(one.turns)} turns; expected {one.block.planned}")
        engines = {turn.engine for turn in one.turns}
        if not engines <= ALLOWED.get(one.block.arm, {"original", "surrogate"}):
            problems.append(f"{where}: was answered by {', '.join(sorted(engines))}")
        if silent := sum(turn.completion_tokens == 0 for turn in one.turns):
            problems.append(f"{where}: {silent} turns without a token")
    if problems:
        raise IncompleteRun("\n".join(problems))


def _place(block: Block) -> tuple[int, str, list[str]]:
    return block.repeat, block.arm, [visit.dialogue for visit in block.visits]


def report(
    measured: Sequence[Measured],
    config: Config,
    tariffs: Mapping[str, Prices],
    targets: Targets,
    gaps: Gaps,
    overhead: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    also: Also | None = None,
) -> dict[str, Any]:
    """The document. The first tariff is the one that `net_cost` and the ratios are in."""
    warm = config.warm_window
    # In the order of the command line, and of repeats: how they were played is in `blocks`.
    by_arm: dict[str, list[Measured]] = {arm: [] for arm in settings["arms"]}
    for one in sorted(measured, key=lambda one: one.block.repeat):
        by_arm[one.block.arm].append(one)
    bills = {
        name: {
            arm: mean_bill([bill(b.played, b.spent, prices, warm) for b in blocks])
            for arm, blocks in by_arm.items()
        }
        for name, prices in tariffs.items()
    }
    first = next(iter(tariffs))
    promise = 1.0 - config.gate.accept_threshold
    also = also or Also()
    courses = {
        name: {arm: [one for b in blocks for one in b.courses(prices)] for arm, blocks in by_arm.items()}
        for name, prices in tariffs.items()
    }
    compared = {
        arm: [
            compare(block.played, reference.played, 0, gaps)
            for block, reference in zip(blocks, by_arm[REFERENCE], strict=True)
        ]
        for arm, blocks in by_arm.items()
    }
    arms = {
        arm: {
            **service(blocks, warm, targets),
            **_faithful(compared[arm], warm, promise),
            **work(blocks),
            "switched_latency_over_original": switched_latency(blocks, by_arm[REFERENCE], warm),
            "net_cost": round(outcome.net_cost(courses[first][arm]) or 0.0, 4),
            "net_cost_by_tariff": {
                name: round(outcome.net_cost(of[arm]) or 0.0, 6) for name, of in courses.items()
            },
            "sessions_told": outcome.told(courses[first][arm], warm),
            "by_workload": outcome.by_workload(courses[first][arm]),
            "bins": outcome.bins(courses[first][arm], courses[first][REFERENCE]),
        }
        for arm, blocks in by_arm.items()
    }
    arms[REFERENCE]["agreement"]["against_its_own_repeat"] = _again(by_arm[REFERENCE], warm, gaps, promise)
    ladders = _ladders(also, courses[first], tariffs[first])
    ratios, intervals = _ratios(arms, bills[first], overhead, warm)
    more, spreads = _outcomes(courses[first], ladders, targets)
    return {
        "settings": {**settings, "warm_window": warm, "promise": promise, "targets": asdict(targets)},
        "arms": arms,
        "ratios": {**ratios, **more},
        "intervals": {**intervals, **spreads},
        "over_original": {
            arm: {name: _pair(of, courses[first][REFERENCE], name) for name in RATIOS}
            for arm, of in courses[first].items()
        },
        "capacity": {arm: capacity.told(rungs, targets) for arm, rungs in ladders.items()},
        "drift": {
            arm: outcome.drift(
                [one for block in blocks for one in block.courses(tariffs[first])],
                courses[first][arm],
                also.changes,
            )
            for arm, blocks in also.drift.items()
        },
        "rankings": rankings(arms, settings["order"]),
        "overhead": overhead,
        "idle_cpu_s_per_s": measured[0].idling,
        "costs": {name: _curves(of, arms, warm) for name, of in bills.items()},
        "blocks": [_block(one, compared[one.block.arm][by_arm[one.block.arm].index(one)]) for one in measured],
    }


def _pair(ours: Sequence[Course], theirs: Sequence[Course], name: str) -> dict[str, Any]:
    value, spread = outcome.compared(ours, theirs, RATIOS[name])
    return {"value": value, "interval": spread}


def _outcomes(
    courses: Mapping[str, Sequence[Course]], ladders: Mapping[str, Sequence[Rung]], targets: Targets
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ratios of means of ours over the original's, their intervals)."""
    if OURS not in courses:
        return dict.fromkeys((*RATIOS, CAPACITY)), dict.fromkeys((*RATIOS, CAPACITY))
    found = {
        name: outcome.compared(courses[OURS], courses[REFERENCE], measure) for name, measure in RATIOS.items()
    }
    if OURS in ladders and REFERENCE in ladders:
        found[CAPACITY] = capacity.compared(ladders[OURS], ladders[REFERENCE], targets)
    else:
        found[CAPACITY] = (None, None)
    return {name: value for name, (value, _) in found.items()}, {name: s for name, (_, s) in found.items()}


def _ladders(also: Also, courses: Mapping[str, Sequence[Course]], prices: Prices) -> dict[str, list[Rung]]:
    """Each arm's rungs, its own blocks first."""
    return {
        arm: [
            Rung(also.rate, tuple(courses[arm])),
            *(Rung(rate, tuple(block.courses(prices))) for rate, block in rungs),
        ]
        for arm, rungs in also.rungs.items()
    }


def _faithful(compared: Sequence[Sequence[Compared]], warm: int, promise: float) -> dict[str, Any]:
    found = summary([one for block in compared for one in block if one.turn > warm], promise)
    return {"fidelity": found.pop("fidelity"), "agreement": found}


def _again(originals: Sequence[Measured], warm: int, gaps: Gaps, promise: float) -> dict[str, Any] | None:
    """The original against its own next repeat of the same dialogues: the floor of what differences mean."""
    again: list[Compared] = []
    for number, one in enumerate(originals):
        later = [*originals[number + 1 :], *originals[:number]]
        names = [played.visit.dialogue for played in one.played]
        same = (b for b in later if [played.visit.dialogue for played in b.played] == names)
        if (other := next(same, None)) is not None:
            again += compare(one.played, other.played, warm, gaps)
    return summary(again, promise) if again else None


def _ratios(
    arms: Mapping[str, Mapping[str, Any]],
    bills: Mapping[str, Sequence[float]],
    overhead: Mapping[str, Any] | None,
    warm: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ratios, intervals of those that have one)."""
    ours = arms.get(OURS)
    even = None if ours is None else _even(OURS, arms, bills, warm)
    found = {
        "later_latency_soma_over_original": None
        if ours is None
        else round(ours["later_turn_latency_p50"] / arms[REFERENCE]["later_turn_latency_p50"], 4),
        "switched_latency_soma_over_original": None if ours is None else ours["switched_latency_over_original"],
        **{
            name: None if overhead is None else overhead[over][way]["median"]
            for name, (over, way) in OVERHEADS.items()
        },
        "break_even_turn": None if even is None else even["turn"],
        "break_even_extrapolated": None if even is None else even["extrapolated"],
    }
    spreads = (
        {}
        if overhead is None
        else {name: overhead[over][way]["ci95"] for name, (over, way) in OVERHEADS.items()}
    )
    return found, spreads


def _even(
    arm: str, arms: Mapping[str, Mapping[str, Any]], bills: Mapping[str, Sequence[float]], warm: int
) -> dict[str, Any]:
    """N* of an arm: not before the first turn that the surrogate answered in it."""
    return break_even(bills[arm], bills[REFERENCE], warm, min(arms[arm]["switch_turns"], default=1))


def _curves(
    bills: Mapping[str, Sequence[float]], arms: Mapping[str, Mapping[str, Any]], warm: int
) -> dict[str, Any]:
    return {
        arm: {
            "by_turn": [round(cost, 5) for cost in costs],
            "by_length": [round(cost, 5) for cost in accumulate(costs)],
            "break_even": None if arm == REFERENCE else _even(arm, arms, bills, warm),
        }
        for arm, costs in bills.items()
    }


def _block(one: Measured, compared: Sequence[Compared]) -> dict[str, Any]:
    """The raw numbers, without what was said: those of every turn, with its gap to the original's answer."""
    gaps = {(each.session, each.turn): each for each in compared}
    return {
        "repeat": one.block.repeat,
        "arm": one.block.arm,
        "wall_s": round(one.wall_s, 3),
        "seconds": {name: round(value, 3) for name, value in one.spent.seconds.items()},
        "reading": asdict(one.reading),
        "sessions": [
            {
                "dialogue": played.visit.dialogue,
                "arrives_s": round(played.visit.arrives_s, 3),
                "turns": [_turn(turn, gaps.get((number, turn.turn))) for turn in played.turns],
                "events": Counter(event["kind"] for event in played.events),
            }
            for number, played in enumerate(one.played)
        ],
    }


def _turn(turn: Answered, compared: Compared | None) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(turn).items() if name != "answer"}
    if compared is not None:
        told = ("gap", "rouge_l", "same", "agreement")
        kept |= {name: getattr(compared, name) for name in told}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in kept.items()}
