"""The study's own arithmetic: each headline from numbers that a wrong formula would tell otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from study import capacity, outcome, outcome_table
from study.capacity import Rung, Targets
from study.client import Answered, Played
from study.cost import Counting
from study.meter import Meter, Reading, _part
from study.outcome import Course
from study.plan import Block, Visit
from study.report import Also, Measured, report
from study.service import service

from soma_vllm.config import Config, Prices
from soma_vllm.types import Gap

WARM = 2
HARDWARE = {"original": {"original": 2, "surrogate": 2}, "soma": {"original": 1, "surrogate": 1}}
TARGETS = Targets(ttft_s=1.0, latency_s=4.0)


def turn(number: int, engine: str, latency: float, answer: str = "yes", correct: bool | None = None) -> Any:
    return Answered(number, engine, None, "", 0.0, 0.5, latency, 100, 10, 0, answer, correct)


def played(dialogue: str, *turns: Any, events: tuple[dict[str, Any], ...] = ()) -> Any:
    return Played(Visit(f"v-{dialogue}", dialogue, ("q",) * len(turns), 0.0, ()), tuple(turns), events)


def reading(busy: dict[str, float], requests: dict[str, int], split: tuple[float, float] = (1.0, 3.0)) -> Any:
    """A meter that counted so many requests of 100 prompt and 10 generated tokens."""
    engines = {
        name: {
            "prompt": 100.0 * count,
            "cached": 0.0,
            "generated": 10.0 * count,
            "prefill_s": split[0],
            "decode_s": split[1],
        }
        for name, count in requests.items()
    }
    cpu = {"original": 0.0, "surrogate": 0.0, "server": 0.0, "trainer": 0.0, "baseline": 0.0, "ray": 0.0}
    return Reading(10.0, cpu, busy, engines)


def measured(
    arm: str, repeat: int, sessions: Sequence[Any], found: Any, cores: dict[str, int] | None = None
) -> Any:
    block = Block(repeat, arm, tuple(one.visit for one in sessions))
    return Measured.of(block, sessions, 10.0, found, {}, Counting(cores=cores or {}))


def gaps(pairs: Sequence[tuple[str, str]]) -> list[Gap]:
    """Of other answers 1."""
    return [Gap(float(a != b)) for a, b in pairs]


def two_repeats() -> list[Any]:
    """`soma` beside the original, twice: turn W is slow, the surrogate's turn 3 wrong."""
    blocks = []
    for repeat, busy in ((0, 8.0), (1, 16.0)):
        theirs = [turn(n, "original", 4.0, correct=True) for n in (1, 2, 3, 4)]
        ours = [
            turn(1, "original", 4.0, correct=True),
            turn(2, "original", 100.0, correct=True),
            turn(3, "surrogate", 1.0, "no", correct=False),
            turn(4, "original", 3.0, correct=True),
        ]
        blocks.append(
            measured("original", repeat, [played("w.a", *theirs)], reading({"original": busy}, {"original": 4}))
        )
        mixed = {"original": busy, "surrogate": 6.0}
        counted = {"original": 3, "surrogate": 3}  # two of the surrogate's for nobody's turn
        blocks.append(measured("soma", repeat, [played("w.a", *ours)], reading(mixed, counted)))
    return blocks


def document(also: Also | None = None) -> Any:
    config = Config(warm_window=WARM)
    settings = {"arms": ["original", "soma"], "order": [["original", "soma"]] * 2, "hardware": HARDWARE}
    return report(two_repeats(), config, {"cores": Prices()}, TARGETS, gaps, None, settings, also)


def test_later_turns_begin_after_turn_w() -> None:
    found = service([one for one in two_repeats() if one.block.arm == "soma"], WARM, TARGETS)
    assert found["later_turn_latency_p50"] == 2.0  # of 1 and 3; turn 2 took 100
    assert found["share_surrogate_later"] == 0.5
    assert found["later_latency_p50_by_repeat"] == [2.0, 2.0]


def test_the_headline_ratio_is_of_later_turns_alone() -> None:
    assert document()["ratios"]["later_latency_soma_over_original"] == 0.5  # 2 over 4
    assert document()["ratios"]["switched_latency_soma_over_original"] == 0.25


def test_fidelity_of_the_surrogate_s_turns_leaves_out_the_original_s() -> None:
    agreement = document()["arms"]["soma"]["agreement"]
    assert document()["arms"]["soma"]["fidelity"] == 0.5
    assert agreement["fidelity_of_surrogate_turns"] == 0.0
    assert agreement["turns"] == 4


def test_net_cost_is_that_of_all_repeats_and_of_the_background_too() -> None:
    found = document()
    assert found["arms"]["original"]["net_cost"] == 12.0  # of 8 and 16
    assert found["arms"]["soma"]["net_cost"] == 18.0  # and 6 of the surrogate's, 4 of them for no turn
    assert found["ratios"]["net_cost_soma_over_original"] == 1.5
    bills = found["costs"]["cores"]
    assert bills["original"]["by_length"][-1] == 12.0
    assert bills["soma"]["by_length"][-1] == 18.0


def test_an_engine_s_busy_second_is_one_of_each_of_its_cores() -> None:
    one = played("w.a", turn(1, "original", 1.0))
    both = measured("original", 0, [one], reading({"original": 3.0}, {"original": 1}), {"original": 2})
    assert both.courses(Prices())[0].cost == pytest.approx(6.0)
    assert both.spent.seconds["turns"] == pytest.approx(6.0)


def test_reading_and_writing_are_paid_as_the_engine_divides_them() -> None:
    long = replace(turn(1, "original", 1.0), prompt_tokens=300, completion_tokens=10)
    short = replace(turn(2, "original", 1.0), prompt_tokens=100, completion_tokens=30)
    found = Reading(
        1.0,
        {},
        {"original": 8.0},
        {"original": {"prompt": 400.0, "generated": 40.0, "prefill_s": 3.0, "decode_s": 1.0}},
    )
    (costs,) = measured("original", 0, [played("w.a", long, short)], found).spent.turns
    assert costs == pytest.approx((6 * 0.75 + 2 * 0.25, 6 * 0.25 + 2 * 0.75))


def test_sessions_costs_add_up_to_the_block_s() -> None:
    one = two_repeats()[1]
    assert sum(course.cost for course in one.courses(Prices())) == pytest.approx(8.0 + 6.0)


async def test_an_engine_is_busy_only_while_a_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(SimpleNamespace(), "http://127.0.0.1:9")  # type: ignore[arg-type]
    running = iter([0.0, 2.0, 0.0])

    async def series(client: Any) -> dict[str, float]:
        try:
            return {"vllm:num_requests_running": next(running)}
        except StopIteration:
            raise ConnectionError from None

    async def no_wait(seconds: float) -> None:
        meter._looked -= seconds  # as if so long had passed

    monkeypatch.setattr("study.meter._series", series)
    monkeypatch.setattr("study.meter.asyncio.sleep", no_wait)
    monkeypatch.setattr(meter, "_look_at_processes", lambda: None)
    with pytest.raises(ConnectionError):
        await meter._keep_looking()
    assert meter._busy["surrogate"] == pytest.approx(1.0, abs=0.1)  # one look of three


@pytest.mark.parametrize(
    ("command", "parent", "part"),
    [
        (["ray::AdapterTrainer.train"], "ray", "trainer"),
        (["/x/ray/core/raylet"], "server", "ray"),
        (["python", "/x/site-packages/ray/dashboard.py"], "server", "ray"),
        (["python", "-m", "vllm.entrypoints.launchers.api_server.entry"], "server", "original"),
        (["VLLM::EngineCore"], "server", "surrogate"),
        (["VLLM::EngineCore"], "original", "original"),
        (["python", "-m", "soma_vllm.baselines.worker"], "server", "baseline"),
    ],
)
def test_a_process_is_booked_to_its_part(command: list[str], parent: str, part: str) -> None:
    process: Any = SimpleNamespace(cmdline=lambda: command, name=lambda: command[0])
    assert _part(process, parent) == part


def course(dialogue: str, seconds: float, cost: float, *grades: bool | None, engines: str = "O") -> Course:
    names = {"O": "original", "s": "surrogate"}
    letters = engines * len(grades) if len(engines) == 1 else engines
    turns = tuple(
        turn(n, names[letter], seconds / len(grades), correct=grade)
        for n, (grade, letter) in enumerate(zip(grades, letters, strict=True), 1)
    )
    return Course(dialogue, turns, cost)


OURS = [
    course("w.a", 2.0, 3.0, True, False),
    course("w.b", 6.0, 5.0, True, True),
    course("w.c", 4.0, 4.0, True, None),
]
THEIRS = [
    course("w.a", 4.0, 2.0, True, True),
    course("w.b", 8.0, 2.0, True, True),
    course("w.c", 4.0, 2.0, True, True),
]


def test_ratios_are_of_means_over_sessions_and_over_turns() -> None:
    assert outcome.compared(OURS, THEIRS, outcome.whole_time)[0] == 0.75
    assert outcome.compared(OURS, THEIRS, outcome.net_cost)[0] == 2.0
    assert outcome.compared(OURS, THEIRS, outcome.task_accuracy)[0] == 0.8  # four of five turns with a check
    assert outcome.session_accuracy(OURS) == pytest.approx(2 / 3)


def test_an_interval_draws_whole_dialogues_in_both_arms_at_once() -> None:
    value, spread = outcome.compared(OURS, THEIRS, outcome.whole_time)
    assert spread is not None
    assert value is not None
    assert 0.5 <= spread[0] <= value <= spread[1] <= 1.0
    assert outcome.compared(OURS, OURS, outcome.whole_time) == (1.0, [1.0, 1.0])  # drawn alike: no spread
    assert outcome.compared(OURS[:1], THEIRS[:1], outcome.whole_time)[1] is None
    twice = outcome.compared(OURS * 2, THEIRS * 2, outcome.whole_time)[1]
    assert twice == spread  # repeats are no further dialogues


def test_the_document_tells_the_new_ratios_with_their_intervals() -> None:
    found = document()
    names = {"whole_session_time", "net_cost", "task_accuracy", "capacity"}
    for name in (f"{one}_soma_over_original" for one in names):
        assert name in found["ratios"]
        assert name in found["intervals"]
    assert found["ratios"]["whole_session_time_soma_over_original"] == 6.75  # 108 over 16
    assert found["ratios"]["task_accuracy_soma_over_original"] == 0.75
    assert found["ratios"]["capacity_soma_over_original"] is None


def test_every_turn_s_numbers_are_written_and_none_of_its_words() -> None:
    (session,) = document()["blocks"][1]["sessions"]
    assert [one["gap"] for one in session["turns"]] == [0.0, 0.0, 1.0, 0.0]
    assert [one["correct"] for one in session["turns"]] == [True, True, False, True]
    assert "answer" not in session["turns"][0]


def test_bins_are_the_paper_s() -> None:
    long = [course("w.a", 14.0, 1.0, *[True] * 14)]
    double = [course("w.a", 28.0, 1.0, *[True] * 14)]
    rows = outcome.bins(double, long)
    assert [(row["turns"], row["count"], row["latency"]) for row in rows] == [
        ("1-4", 4, 2.0), ("5-8", 4, 2.0), ("9-12", 4, 2.0), ("13+", 2, 2.0),
    ]  # fmt: skip


def test_drift_is_told_of_sessions_that_the_surrogate_served_before_it() -> None:
    rolled = frozenset({"rolled_back"})
    four = (True,) * 4
    injected = [
        replace(course("a", 1.0, 1.0, *four, engines="OsOO"), kinds=rolled),
        course("b", 1.0, 1.0, *four, engines="Osss"),
        course("c", 1.0, 1.0, *four, engines="OOOO"),
    ]
    calm = [replace(course("d", 1.0, 1.0, True, True, engines="Os"), kinds=rolled), course("e", 1.0, 1.0, True)]
    assert outcome.drift(injected, calm, dict.fromkeys("abc", 3)) == {
        "sessions": 3,
        "served_before": 2,
        "recall": 0.5,
        "turns_to_the_original": 0.5,
        "switched_without_change": 1,
        "false_rollbacks": 1.0,
    }


def rung(rate: float, latency: float) -> Rung:
    return Rung(rate, tuple(Course(name, (turn(1, "original", latency),), 1.0) for name in ("a", "b")))


def test_capacity_lies_where_the_strain_is_one_between_two_rates() -> None:
    assert capacity.capacity({10.0: 0.5, 40.0: 2.0}) == pytest.approx(20.0)
    assert capacity.capacity({10.0: 0.5, 40.0: 2.0, 80.0: 0.9}) == pytest.approx(20.0)  # luck beyond a miss
    assert capacity.capacity({10.0: 0.5}) is None
    assert capacity.capacity({10.0: 1.5}) is None
    told = capacity.told([rung(10.0, 2.0), rung(40.0, 8.0)], TARGETS)
    assert told["sessions_per_hour"] == 20.0
    assert [one["strain"] for one in told["rungs"]] == [0.5, 2.0]


def test_the_next_rate_encloses_the_target() -> None:
    assert capacity.next_rate({10.0: 0.5}) == 40.0
    assert capacity.next_rate({10.0: 0.9999}) == pytest.approx(20.0, rel=1e-3)
    assert capacity.next_rate({60.0: 1.5}) == 20.0
    assert capacity.next_rate({160.0: 99.0}) == 10.0
    assert capacity.next_rate({10.0: 0.5, 40.0: 1.5}) == pytest.approx(20.0)


def test_strain_is_the_worse_of_first_token_and_answer_for_nine_turns_of_ten() -> None:
    turns = [turn(n, "original", 2.0) for n in range(10)]
    assert TARGETS.strain(turns) == 0.5
    assert TARGETS.strain([*turns[:9], turn(9, "original", 400.0)]) > 0.5
    assert TARGETS.strain([replace(one, ttft_s=3.0) for one in turns]) == 3.0


def test_capacities_are_compared_only_where_both_were_found() -> None:
    ours, theirs = [rung(10.0, 2.0), rung(40.0, 8.0)], [rung(5.0, 2.0), rung(20.0, 8.0)]
    assert capacity.compared(ours, theirs, TARGETS) == (2.0, [2.0, 2.0])
    assert capacity.compared(ours, theirs[:1], TARGETS) == (None, None)


def test_capacity_stands_among_the_ratios_where_it_was_measured() -> None:
    def block(arm: str, latency: float) -> Any:
        one = played("w.a", *(turn(n, "original", latency) for n in (1, 2, 3, 4)))
        return measured(arm, 0, [one], reading({"original": 1.0}, {"original": 4}))

    rungs = {"original": [(120.0, block("original", 16.0))], "soma": [(30.0, block("soma", 1.0))]}
    found = document(Also(rate=60.0, rungs=rungs))
    assert found["capacity"]["original"]["sessions_per_hour"] == 60.0  # its own blocks are at the target
    assert found["ratios"]["capacity_soma_over_original"] == pytest.approx(
        found["capacity"]["soma"]["sessions_per_hour"] / 60.0, rel=1e-3
    )


def test_the_tables_tell_hardware_accuracy_and_ratios_of_every_arm() -> None:
    one = document()
    sessions, workloads, turns = outcome_table.grids(one)
    rows = {row[0]: list(row[1:]) for row in sessions[2]}
    assert rows["cores: original, surrogate"] == ["2, 2", "1, 1"]
    assert rows["task accuracy, turns"] == ["1.000", "0.750"]
    assert rows["whole session, s, mean / median"] == ["16.00 / 16.00", "108.00 / 108.00"]
    assert rows["cost over the original's"] == ["1.00", "1.50"]
    assert workloads[2] == [["w", "1.00", "0.75"]]
    assert turns[2] == [["1-4", "1.00 / 1.00", "6.75 / 1.00"]]


def test_a_capacity_that_no_two_rates_enclose_is_told_as_a_bound() -> None:
    rungs = [{"sessions_per_hour": 60.0, "strain": 0.5}]
    found = {"sessions_per_hour": None, "at_least": 60.0, "less_than": None, "rungs": rungs}
    assert outcome_table._capacity(found) == ["at least 60.0", "60: 0.50"]
    found |= {"at_least": None, "less_than": 60.0}
    assert outcome_table._capacity(found)[0] == "less than 60.0"


def test_a_document_from_before_has_none_of_the_new_tables() -> None:
    assert outcome_table.grids({"arms": {"original": {}}}) == []
