"""The study as one JSON document. Holds no conversation text; table and figures are made from it alone.

Guarantees: a run in which a planned turn is missing, or an arm was answered by an engine it must not use, is
refused and not reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import fmean, median
from typing import Any

import numpy as np

from soma_vllm.config import Config, Prices
from study.client import Answered, Played
from study.cost import Counting, Spent, bill, break_even, divided, mean_bill, trained_s
from study.fidelity import Encode, compare, summary
from study.meter import ENGINES, Numbers, Reading
from study.plan import Block

REFERENCE = "original"
OURS = "soma"
OVERHEADS = {  # ratios, by where they stand among what `study.overhead` found
    "dispatch_overhead_ms": ("added_ms", "session"),
    "first_turn_overhead_ms": ("added_ms_first_turns", "session"),
    "bypass_overhead_ms": ("added_ms", "by_name"),
}
ALLOWED = {"original": {"original"}, "surrogate": {"surrogate"}, "speculative": {"original"}}  # by arm


@dataclass(frozen=True)
class Measured:
    """One block that was played."""

    block: Block
    played: tuple[Played, ...]
    wall_s: float
    """From its begin to its last answer."""
    reading: Reading
    """Up to when nothing of it ran in the background any more."""
    idling: Numbers
    """What was taken off `reading`: the server's processor seconds per second while idle, by part."""
    spent: Spent

    @classmethod
    def of(
        cls,
        block: Block,
        played: Sequence[Played],
        wall_s: float,
        reading: Reading,
        idling: Numbers,
        how: Counting,
    ) -> Measured:
        """Divide what it took."""
        return cls(block, tuple(played), wall_s, reading, idling, divided(played, reading, how))

    @property
    def turns(self) -> list[Answered]:
        """All of them."""
        return [turn for one in self.played for turn in one.turns]


@dataclass(frozen=True)
class Targets:
    """What a user accepts, seconds."""

    ttft_s: float
    latency_s: float

    def met(self, turn: Answered) -> bool:
        """By one turn."""
        return turn.ttft_s <= self.ttft_s and turn.latency_s <= self.latency_s


class IncompleteRun(Exception):
    """What was planned did not all happen."""


def check(measured: Sequence[Measured], blocks: Sequence[Block]) -> None:
    """Raises IncompleteRun: a planned turn is missing, or an engine answered in an arm it has no place in."""
    problems = []
    if [one.block for one in measured] != list(blocks):
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


def report(
    measured: Sequence[Measured],
    config: Config,
    tariffs: Mapping[str, Prices],
    targets: Targets,
    encode: Encode,
    overhead: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
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
    arms = {
        arm: {
            **_service(blocks, warm, targets),
            **_faithful(blocks, by_arm[REFERENCE], warm, encode, promise),
            **_work(blocks),
            "switched_latency_over_original": switched_latency(blocks, by_arm[REFERENCE], warm),
            "net_cost": round(sum(bills[first][arm]), 4),
            "net_cost_by_tariff": {name: round(sum(of[arm]), 4) for name, of in bills.items()},
        }
        for arm, blocks in by_arm.items()
    }
    return {
        "settings": {**settings, "warm_window": warm, "promise": promise, "targets": asdict(targets)},
        "arms": arms,
        "ratios": _ratios(arms, bills[first], overhead, warm),
        "rankings": rankings(arms, settings["order"]),
        "overhead": overhead,
        "idle_cpu_s_per_s": measured[0].idling,
        "costs": {name: _curves(of, arms, warm) for name, of in bills.items()},
        "blocks": [_block(one) for one in measured],
    }


def switched_latency(blocks: Sequence[Measured], originals: Sequence[Measured], warm: int) -> float | None:
    """Median, over the later turns that the surrogate answered, of their latency over that of the same turn
    under the original; None where it answered none."""
    ratios = [
        turn.latency_s / reference.latency_s
        for block, other in zip(blocks, originals, strict=True)
        for one, theirs in zip(block.played, other.played, strict=True)
        for turn, reference in zip(one.turns, theirs.turns, strict=True)
        if turn.turn > warm and turn.engine == "surrogate"
    ]
    return round(median(ratios), 4) if ratios else None


def rankings(arms: Mapping[str, Mapping[str, Any]], order: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The order in which each repeat played the arms, and that in which it ranks them by their later turns."""
    medians = {arm: found["later_latency_p50_by_repeat"] for arm, found in arms.items()}
    return [
        {"played": list(played), "ranked": sorted(medians, key=lambda arm: medians[arm][repeat])}
        for repeat, played in enumerate(order)
    ]


def _service(blocks: Sequence[Measured], warm: int, targets: Targets) -> dict[str, Any]:
    """What users got."""
    turns = [turn for block in blocks for turn in block.turns]
    later = [turn for turn in turns if turn.turn > warm]
    switches = [n for block in blocks for one in block.played if (n := _switch(one)) is not None]
    wall = sum(block.wall_s for block in blocks)
    latency = percentiles([turn.latency_s for turn in later])
    ttft = percentiles([turn.ttft_s for turn in turns])
    return {
        "later_turn_latency_p50": latency["p50"],
        "later_turn_latency_p99": latency["p99"],
        "ttft_p50": ttft["p50"],
        "turns_per_s": round(len(turns) / wall, 4),
        "goodput_turns_per_s": round(sum(map(targets.met, turns)) / wall, 4),
        "share_surrogate": _share(turns),
        "share_surrogate_later": _share(later),
        "ttft_s": ttft,
        "later_ttft_s": percentiles([turn.ttft_s for turn in later]),
        "token_s": percentiles([turn.token_s for turn in turns if turn.token_s is not None]),
        "latency_s": percentiles([turn.latency_s for turn in turns]),
        "later_latency_s": latency,
        "later_latency_p50_by_repeat": [
            percentiles([turn.latency_s for turn in block.turns if turn.turn > warm])["p50"] for block in blocks
        ],
        "switch_turns": switches,
        "median_switch_turn": median(switches) if switches else None,
        "by_turn": _by_turn(turns),
        "turns": len(turns),
    }


def _by_turn(turns: Sequence[Answered]) -> list[dict[str, Any]]:
    rows = []
    for number in range(1, max(turn.turn for turn in turns) + 1):
        here = [turn for turn in turns if turn.turn == number]
        rows.append(
            {
                "turn": number,
                "latency_s": percentiles([turn.latency_s for turn in here]),
                "ttft_s": percentiles([turn.ttft_s for turn in here]),
                "share_surrogate": _share(here),
                "turns": len(here),
            }
        )
    return rows


def _switch(played: Played) -> int | None:
    """The first turn that the surrogate answered."""
    return next((turn.turn for turn in played.turns if turn.engine == "surrogate"), None)


def _share(turns: Sequence[Answered]) -> float:
    return round(sum(turn.engine == "surrogate" for turn in turns) / len(turns), 4) if turns else 0.0


def _faithful(
    blocks: Sequence[Measured], originals: Sequence[Measured], warm: int, encode: Encode, promise: float
) -> dict[str, Any]:
    compared = [
        one
        for block, reference in zip(blocks, originals, strict=True)
        for one in compare(block.played, reference.played, warm, encode)
    ]
    found = summary(compared, promise)
    if blocks is originals:
        # Against itself it is 1 by definition; against its own other repeat it is the floor of this measure.
        others = [*originals[1:], originals[0]]
        pairs = zip(originals, others, strict=True) if len(originals) > 1 else ()
        again = [one for a, b in pairs for one in compare(a.played, b.played, warm, encode)]
        found["against_its_own_repeat"] = summary(again, promise) if again else None
    return {"fidelity": found.pop("fidelity"), "agreement": found}


def _work(blocks: Sequence[Measured]) -> dict[str, Any]:
    """What the server did for it: per session, mean over all."""
    played = [one for block in blocks for one in block.played]
    sessions = len(played)
    kinds = Counter(event["kind"] for one in played for event in one.events)
    trainings = [trained_s(one) for one in played if trained_s(one) > 0]
    seconds = [block.spent.seconds for block in blocks]
    parts = {part: sum(block.reading.cpu_s[part] for block in blocks) for part in blocks[0].reading.cpu_s}
    busy = {name: sum(block.reading.busy_s.get(name, 0.0) for block in blocks) for name in ENGINES}
    tokens = {
        name: {
            kind: round(sum(block.reading.engines.get(name, {}).get(kind, 0.0) for block in blocks))
            for kind in ("prompt", "cached", "generated")
        }
        for name in ENGINES
    }
    return {
        "sessions": sessions,
        "engine_tokens": tokens,
        "seconds_per_session": {key: round(sum(s[key] for s in seconds) / sessions, 3) for key in seconds[0]},
        "cpu_s_per_session": {part: round(value / sessions, 3) for part, value in parts.items()},
        "busy_s_per_session": {name: round(value / sessions, 3) for name, value in busy.items()},
        "adapters_trained": len(trainings),
        "training_s_mean": round(fmean(trainings), 2) if trainings else None,
        "sessions_with_adapter": sum(any(turn.adapter for turn in one.turns) for one in played),
        "events": dict(sorted(kinds.items())),
    }


def _ratios(
    arms: Mapping[str, Mapping[str, Any]],
    bills: Mapping[str, Sequence[float]],
    overhead: Mapping[str, Any] | None,
    warm: int,
) -> dict[str, Any]:
    ours = arms.get(OURS)
    even = None if ours is None else _even(OURS, arms, bills, warm)
    return {
        "later_latency_soma_over_original": None
        if ours is None
        else round(ours["later_turn_latency_p50"] / arms[REFERENCE]["later_turn_latency_p50"], 4),
        "switched_latency_soma_over_original": None if ours is None else ours["switched_latency_over_original"],
        "net_cost_soma_over_original": None
        if ours is None or not arms[REFERENCE]["net_cost"]
        else round(ours["net_cost"] / arms[REFERENCE]["net_cost"], 4),
        **{
            name: None if overhead is None else overhead[over][way]["median"]
            for name, (over, way) in OVERHEADS.items()
        },
        "break_even_turn": None if even is None else even["turn"],
        "break_even_extrapolated": None if even is None else even["extrapolated"],
    }


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


def _block(one: Measured) -> dict[str, Any]:
    """The raw numbers, without what was said."""
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
                "turns": [_turn(turn) for turn in played.turns],
                "events": Counter(event["kind"] for event in played.events),
            }
            for played in one.played
        ],
    }


def _turn(turn: Answered) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(turn).items() if name != "answer"}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in kept.items()}


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99; None without values."""
    if not values:
        return {"p50": None, "p90": None, "p99": None}
    found = np.percentile(np.asarray(values), [50, 90, 99])
    return {name: round(float(value), 4) for name, value in zip(("p50", "p90", "p99"), found, strict=True)}
