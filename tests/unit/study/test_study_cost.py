"""From seconds and tokens to a session's bill: every second is paid once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study.client import Answered, Played
from study.cost import Counting, bill, break_even, divided, load_prices
from study.meter import Reading, parsed
from study.plan import Visit

import soma_vllm
from soma_vllm.config import Prices
from soma_vllm.errors import ConfigError

ROOT = Path(soma_vllm.__file__).parent.parent
WARM = 2
CPU = Counting(busy=False)


def turn(number: int, engine: str, prompt: int = 100, written: int = 10, cached: int | None = 0) -> Any:
    return Answered(number, engine, None, "", 0.0, 0.1, 1.0, prompt, written, cached, "text")


def session(engines: str, events: tuple[dict[str, Any], ...] = ()) -> Any:
    names = {"O": "original", "s": "surrogate"}
    turns = tuple(turn(n, names[letter]) for n, letter in enumerate(engines, start=1))
    return Played(Visit("v", "d", ("q",) * len(engines), 0.0, ()), turns, events)


def reading(original: float, surrogate: float, trainer: float = 0.0, audits: int = 0, turns: str = "") -> Any:
    """A meter whose engines counted those turns, and `audits` more of the original's."""

    def counted(requests: int) -> dict[str, float]:
        tokens = {"prompt": 100.0 * requests, "cached": 0.0, "generated": 10.0 * requests}
        return {**tokens, "prefill_s": 1.0, "decode_s": 3.0}

    cpu = {"original": original, "surrogate": surrogate, "server": 1.0, "trainer": trainer, "baseline": 0.0}
    engines = {"original": counted(turns.count("O") + audits), "surrogate": counted(turns.count("s"))}
    return Reading(10.0, {**cpu, "ray": 5.0}, {"original": 7.0, "surrogate": 2.0}, engines)


def test_a_bill_adds_up_to_all_that_was_spent() -> None:
    played = [session("OOss"), session("OOOs")]
    spent = divided(played, reading(60.0, 6.0, 8.0, audits=2, turns="OOssOOOs"), CPU)
    prices = Prices(original_second=2.0, surrogate_second=0.5, trainer_second=0.25)
    total = sum(bill(played, spent, prices, WARM)) * len(played)
    assert total == pytest.approx(60.0 * 2.0 + 6.0 * 0.5 + 8.0 * 0.25 + 1.0 * 0.5)


def test_what_the_original_computed_for_nobody_s_turn_is_its_audits() -> None:
    played = [session("OOss")]
    spent = divided(played, reading(40.0, 4.0, audits=2, turns="OOss"), CPU)
    assert spent.seconds["audits"] == pytest.approx(20.0)  # two requests of four
    assert spent.seconds["acceptance"] == pytest.approx(0.0)
    assert spent.background_tokens == {"prompt": 200.0, "generated": 20.0}


def test_cached_prompt_tokens_cost_nothing() -> None:
    played = [
        Played(Visit("v", "d", ("q", "q"), 0.0, ()), (turn(1, "original"), turn(2, "original", cached=100)))
    ]
    engine = {"prompt": 200.0, "cached": 100.0, "generated": 20.0, "prefill_s": 1.0, "decode_s": 1.0}
    found = Reading(1.0, {"original": 8.0}, {}, {"original": engine})
    (costs,) = divided(played, found, CPU).turns
    assert costs == pytest.approx((4.0 + 2.0, 2.0))


def test_training_is_billed_when_the_warm_start_is_over_and_audits_with_the_surrogate_s_turns() -> None:
    played = [session("OOss")]
    with_both = divided(played, reading(40.0, 4.0, 9.0, audits=2, turns="OOss"), CPU)
    without = divided(played, reading(20.0, 4.0, 0.0, turns="OOss"), CPU)
    prices = Prices()
    added = [
        a - b
        for a, b in zip(bill(played, with_both, prices, WARM), bill(played, without, prices, WARM), strict=True)
    ]
    assert added == pytest.approx([0.0, 9.0, 10.0, 10.0])


def test_a_remote_original_is_paid_by_its_tokens() -> None:
    played = [session("OO")]
    spent = divided(played, reading(99.0, 0.0, turns="OO"), CPU)
    prices = Prices(original_prompt_thousand=1.0, original_completion_thousand=10.0, surrogate_second=0.0)
    assert bill(played, spent, prices, WARM) == pytest.approx([0.2, 0.2])


def test_busy_seconds_take_the_trainer_s_own_word() -> None:
    trained = {"kind": "trained", "data": {"mining_s": 1.0, "finetune_s": 2.0, "scoring_s": 0.5}}
    spent = divided(
        [session("OOs", (trained,))],
        reading(60.0, 6.0, 8.0, turns="OOs"),
        Counting(busy=True, trainers_report=True),
    )
    assert spent.trainer_s == 3.5
    assert sum(spent.turns[0]) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "turn", "extrapolated"),
    [
        ([2, 4, 1, 1], [2, 2, 2, 2], 4.0, False),  # 2 6 7 8 against 2 4 6 8
        ([1, 1, 1, 1], [2, 2, 2, 2], 3.0, False),  # never behind, and nothing is saved before it may switch
        ([2, 8, 1, 1], [2, 2, 2, 2], 8.0, True),  # 4 behind at turn 4, 1 saved by every further turn
        ([2, 8, 2, 2], [2, 2, 2, 2], None, True),
    ],
)
def test_a_session_breaks_even_where_its_sum_stays_below(
    ours: list[float], theirs: list[float], turn: float | None, extrapolated: bool
) -> None:
    assert break_even(ours, theirs, WARM, earliest=3) == {"turn": turn, "extrapolated": extrapolated}


def test_shipped_tariffs_load_and_the_first_is_in_core_seconds() -> None:
    tariffs = load_prices(ROOT / "configs" / "prices.yaml")
    assert next(iter(tariffs)) == "cores"
    assert tariffs["cores"] == Prices()
    assert tariffs["api"].original_completion_thousand


def test_a_misspelt_price_is_told_with_its_tariff(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("mine: {original_seconds: 1.0}\nyours: {trainer_second: -1}\n")
    with pytest.raises(ConfigError) as caught:
        load_prices(path)
    text = str(caught.value)
    assert "mine.original_seconds" in text
    assert "yours.trainer_second" in text


def test_series_are_summed_over_their_labels() -> None:
    text = (
        "# TYPE vllm:prompt_tokens counter\n"
        'vllm:prompt_tokens_total{engine="0",model_name="a"} 3.0\n'
        'vllm:prompt_tokens_total{engine="1",model_name="a"} 4.0\n'
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0"} 2.0\n'
    )
    assert parsed(text) == {"vllm:prompt_tokens_total": 7.0, "vllm:num_requests_running": 2.0}
