"""What users got and what the server did for it, arm by arm, from blocks that were played. Pure.

Later turns are those after the warm start; turn W itself is the original's and none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from soma_vllm.config import Prices
from study.capacity import Targets
from study.client import Answered, Played
from study.cost import Counting, Spent, divided, session_costs, trained_s
from study.meter import ENGINES, Numbers, Reading
from study.outcome import Course
from study.plan import Block


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

    def courses(self, prices: Prices) -> list[Course]:
        """Its sessions with what they got and cost."""
        costs = session_costs(self.played, self.spent, prices)
        return [
            Course(one.visit.dialogue, one.turns, cost, frozenset(str(event["kind"]) for event in one.events))
            for one, cost in zip(self.played, costs, strict=True)
        ]

    @property
    def turns(self) -> list[Answered]:
        """All of them."""
        return [turn for one in self.played for turn in one.turns]


def service(blocks: Sequence[Measured], warm: int, targets: Targets) -> dict[str, Any]:
    """What users got."""
    turns = [turn for block in blocks for turn in block.turns]
    later = [turn for turn in turns if turn.turn > warm]
    switches = [n for block in blocks for one in block.played if (n := switch(one)) is not None]
    wall = sum(block.wall_s for block in blocks)
    latency = percentiles([turn.latency_s for turn in later])
    ttft = percentiles([turn.ttft_s for turn in turns])
    return {
        "later_turn_latency_p50": latency["p50"],
        "later_turn_latency_p99": latency["p99"],
        "ttft_p50": ttft["p50"],
        "turns_per_s": round(len(turns) / wall, 4),
        "goodput_turns_per_s": round(sum(map(targets.met, turns)) / wall, 4),
        "share_surrogate": share(turns),
        "share_surrogate_later": share(later),
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
        "by_turn": by_turn(turns),
        "turns": len(turns),
    }


def by_turn(turns: Sequence[Answered]) -> list[dict[str, Any]]:
    rows = []
    for number in range(1, max(turn.turn for turn in turns) + 1):
        here = [turn for turn in turns if turn.turn == number]
        rows.append(
            {
                "turn": number,
                "latency_s": percentiles([turn.latency_s for turn in here]),
                "ttft_s": percentiles([turn.ttft_s for turn in here]),
                "share_surrogate": share(here),
                "turns": len(here),
            }
        )
    return rows


def switch(played: Played) -> int | None:
    """The first turn that the surrogate answered."""
    return next((turn.turn for turn in played.turns if turn.engine == "surrogate"), None)


def share(turns: Sequence[Answered]) -> float:
    return round(sum(turn.engine == "surrogate" for turn in turns) / len(turns), 4) if turns else 0.0


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


def work(blocks: Sequence[Measured]) -> dict[str, Any]:
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


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99; None without values."""
    if not values:
        return {"p50": None, "p90": None, "p99": None}
    found = np.percentile(np.asarray(values), [50, 90, 99])
    return {name: round(float(value), 4) for name, value in zip(("p50", "p90", "p99"), found, strict=True)}
