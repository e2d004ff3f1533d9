"""docs/results.md: every figure of its prose is computed anew from the committed runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from study import outcome
from study.client import Answered
from study.outcome import Course, Courses

import soma_vllm

ROOT = Path(soma_vllm.__file__).parent.parent
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RUN = json.loads((ROOT / "docs" / "results" / "study.json").read_text(encoding="utf-8"))
QUICK = json.loads((ROOT / "docs" / "results" / "quick.json").read_text(encoding="utf-8"))
WARM = RUN["settings"]["warm_window"]
TEN = 10
"""Turns that all sessions of the run have."""


def prose() -> str:
    """Without what the run's JSON makes by itself, in one line."""
    text = re.sub(r"<!-- study.*?: begin.*?: end -->", "", PAGE, flags=re.DOTALL)
    return " ".join(text.split())


def courses(arm: str) -> list[Course]:
    names = Answered.__dataclass_fields__
    found = []
    for block in RUN["blocks"]:
        if block["arm"] == arm:
            cost = sum(block["seconds"].values()) / len(block["sessions"])
            for one in block["sessions"]:
                kept = [{k: v for k, v in turn.items() if k in names} for turn in one["turns"]]
                found.append(Course(one["dialogue"], tuple(Answered(answer="", **turn) for turn in kept), cost))
    return found


def short(value: float) -> str:
    """As the page writes it: two digits, no leading zero."""
    return f"{value:.2f}".removeprefix("0")


def later(of: Courses) -> list[float]:
    return [turn.latency_s for one in of for turn in one.turns if turn.turn > WARM]


def ratio(measure: Any, arm: str = "soma") -> str:
    return short(measure(courses(arm)) / measure(courses("original")))


def bounds(measure: Any) -> str:
    spread = outcome.interval(
        (courses("soma"), courses("original")), lambda two: measure(two[0]) / measure(two[1])
    )
    assert spread is not None
    return f"[{short(spread[0])}, {short(spread[1])}]"


def at_ten(tariff: str) -> float:
    curves = RUN["costs"][tariff]
    found: float = curves["soma"]["by_length"][TEN - 1] / curves["original"]["by_length"][TEN - 1]
    return found


def later_mean(of: Courses) -> float:
    return fmean(later(of))


def later_median(of: Courses) -> float:
    return median(later(of))


def figures() -> dict[str, str]:
    """What the page must say, by what it is about."""
    ours, theirs = courses("soma"), courses("original")
    cost = RUN["costs"]["cores"]
    excess = cost["soma"]["by_length"][TEN - 1] - cost["original"]["by_length"][TEN - 1]
    turns = zip(cost["original"]["by_turn"][WARM:TEN], cost["soma"]["by_turn"][WARM:TEN], strict=True)
    saving = fmean(a - b for a, b in turns)
    arms = RUN["arms"]
    warm = [fmean(t.latency_s for one in of for t in one.turns if t.turn <= WARM) for of in (ours, theirs)]
    overhead = RUN["overhead"]["added_ms"]["session"]
    served = f"{arms['soma']['agreement']['fidelity_of_surrogate_turns']:.3f}".removeprefix("0")
    prefix = f"{arms['history_prefix']['fidelity']:.3f}".removeprefix("0")
    seconds = f"({outcome.net_cost(ours):.2f} s against {outcome.net_cost(theirs):.2f} s a session)"
    mean = f"({later_mean(ours):.2f} s over {later_mean(theirs):.2f} s)"
    middle = f"({later_median(ours):.2f} s over {later_median(theirs):.2f} s)"
    told = short(RUN["ratios"]["net_cost_soma_over_original"])
    share = f"{100 * arms['soma']['share_surrogate_later']:.0f} %"
    return {
        "cost at ten turns": f"a session of ten turns {short(at_ten('cores'))} of the original's core-seconds",
        "all seconds": f"all seconds measured {ratio(outcome.net_cost)} {seconds}",
        "the made-up session": f"The table's {told} is a made-up session",
        "GPU prices": f"With GPU prices ten turns cost {short(at_ten('gpus'))}",
        "by the token": f"with the original paid by the token {short(at_ten('api'))}",
        "the promise": f"what the surrogate serves reaches **{served}**",
        "behind": f"{excess:.2f} core-seconds behind and saves {short(saving)} a turn",
        "break-even": f"which would be turn {TEN + excess / saving:.0f}",
        "whole sessions": f"take {ratio(outcome.whole_time)} of the time** {bounds(outcome.whole_time)}",
        "the warm start": f"({warm[0]:.2f} s a turn against {warm[1]:.2f} s, means)",
        "later turns, mean": f"**{ratio(later_mean)}** by mean {mean} {bounds(later_mean)}",
        "later turns, median": f"**{ratio(later_median)}** by median {middle} {bounds(later_median)}",
        "share": f"because {share} of the later turns are",
        "prefix, later": f"takes {ratio(later_mean, 'history_prefix')} of later turns by mean",
        "prefix, whole": f"{ratio(outcome.whole_time, 'history_prefix')} of whole sessions",
        "prefix, fidelity": f"whole sessions, at {prefix} of fidelity",
        "dispatch": f"Dispatch adds **{overhead['median']:.1f} ms**",
    }


@pytest.mark.parametrize("about", list(figures()))
def test_the_prose_quotes_the_run(about: str) -> None:
    assert figures()[about] in prose()


def test_the_page_says_on_what_hardware_each_arm_ran() -> None:
    assert "`original` computed on one core" in prose()
    assert RUN["settings"]["config"]["original"]["cpu_cores"] == "0"
    assert RUN["settings"]["config"]["surrogate"]["cpu_cores"] == "1"


def quoted(name: str) -> str:
    """A ratio of the run on equal hardware with its interval."""
    low, high = QUICK["intervals"][name]
    return f"{short(QUICK['ratios'][name])} [{short(low)}, {short(high)}]"


def quick_figures() -> dict[str, str]:
    ours = QUICK["arms"]["soma"]
    right = {name: short(arm["sessions_told"]["task_accuracy"]) for name, arm in QUICK["arms"].items()}
    return {
        "whole sessions": f"A whole session takes {quoted('whole_session_time_soma_over_original')}",
        "later turns": f"later turns {short(QUICK['ratios']['later_latency_soma_over_original'])} by median",
        "share": f"answered {100 * ours['share_surrogate_later']:.0f} % of the later turns",
        "fidelity": f"later turns it is {short(ours['fidelity'])}, since",
        "the promise": f"fidelity {short(ours['agreement']['fidelity_of_surrogate_turns'])} in its two turns",
        "accuracy": f"is {right['soma']} of turns against {right['original']} of the original's, "
        f"{quoted('task_accuracy_soma_over_original')}; the plain surrogate's is {right['surrogate']}",
        "cost": f"fall to {quoted('net_cost_soma_over_original')}",
    }


@pytest.mark.parametrize("about", list(quick_figures()))
def test_the_prose_quotes_the_run_on_equal_hardware(about: str) -> None:
    assert quick_figures()[about] in prose()
