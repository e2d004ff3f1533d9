"""The policies to compare with, through the dispatcher. The packages themselves run in integration tests."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_house import Build, House  # type: ignore[import-not-found]

from soma_vllm.errors import ConfigError, PolicyUnavailable, Unprocessable
from soma_vllm.scheduler.policies.base import Policies
from soma_vllm.scheduler.policies.llmlingua2 import Llmlingua2Policy
from soma_vllm.scheduler.policies.routellm import threshold_for
from soma_vllm.session.phases import Phase
from soma_vllm.types import Candidate

History = list[dict[str, Any]]

PREFIX = "soma:history_prefix"
FINE_TUNING = "soma:history_ft"


async def talked(house: House, turns: int, model: str, session: str = "s") -> tuple[History, list[str]]:
    """A dialogue of some turns, and who answered them."""
    history: History = []
    engines = []
    for number in range(1, turns + 1):
        answer = await house.say(history, f"question {number}", session, model=model)
        engines.append(answer.headers["X-SOMA-Engine"])
        await house.settled()
    return history, engines


# -- history_prefix -----------------------------------------------------------------------------------------


async def test_history_prefix_lets_the_original_answer_the_warm_start_and_trains_nothing(house: House) -> None:
    _, engines = await talked(house, 4, PREFIX)
    assert engines == ["original", "original", "surrogate", "surrogate"]
    assert house.trainer.requests == []
    assert set(house.kinds()) == {"turn"}


async def test_history_prefix_shows_the_surrogate_the_warm_start_verbatim_and_the_last_turns(
    build: Build,
) -> None:
    house = build(compressed_prefix_turns=1)
    await house.book.start()
    history, _ = await talked(house, 6, PREFIX)
    shown = house.surrogate.calls[-1].body["messages"]
    assert [m["content"] for m in shown if m["role"] == "user"] == [
        *("question 1", "question 2"),
        *("question 5", "question 6"),
    ]
    assert shown[:4] == history[:4]


async def test_history_prefix_sends_a_history_that_is_new_to_the_server_to_the_original(house: House) -> None:
    history: History = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
    answer = await house.say(history, "question", model=PREFIX)
    assert answer.headers["X-SOMA-Engine"] == "original"


async def test_history_prefix_leaves_requests_with_tools_to_the_original(house: House) -> None:
    history, _ = await talked(house, 2, PREFIX)
    answer = await house.say(history, "question 3", model=PREFIX, tools=[{"type": "function"}])
    assert answer.headers["X-SOMA-Reason"] == "tools"


# -- history_ft ---------------------------------------------------------------------------------------------


async def test_history_ft_learns_from_the_whole_warm_start_and_switches_without_being_judged(
    house: House,
) -> None:
    house.surrogate.answers = ["different"]  # no gate would let it pass
    _, engines = await talked(house, 3, FINE_TUNING)
    assert engines == ["original", "original", "surrogate"]
    (request,) = house.trainer.requests
    assert [example.turn for example in request.examples] == [1, 2]
    assert request.held_out == ()
    assert request.mining.enabled is False
    assert house.kinds() == [
        *("turn", "turn", "adaptation_started", "training_submitted", "trained"),
        *("adapter_published", "adapter_loaded", "switched", "turn"),
    ]


async def test_a_session_says_under_which_policy_it_was_adapted(house: House) -> None:
    await talked(house, 3, FINE_TUNING)
    adapting = house.session().adapting
    assert adapting is not None
    assert (adapting.policy, adapting.gate, adapting.mining) == ("history_ft", False, False)
    started = next(event for _, event in house.events if event.kind == "adaptation_started")
    assert started.data["adapting"] == {"policy": "history_ft", "gate": False, "mining": False}


async def test_history_ft_is_neither_audited_nor_rolled_back(build: Build) -> None:
    house = build(gate={"audit_rate": 1.0, "consecutive_to_rollback": 1})
    await house.book.start()
    house.surrogate.answers = ["different"]
    _, engines = await talked(house, 6, FINE_TUNING)
    assert engines[2:] == ["surrogate"] * 4
    assert "audited" not in house.kinds()
    assert house.session().phase is Phase.SWITCHED


async def test_a_switch_without_a_gate_serves_nobody_who_asked_for_one(house: House) -> None:
    history, _ = await talked(house, 3, FINE_TUNING)
    answer = await house.say(history, "question 4")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.headers["X-SOMA-Reason"] == "adapted under history_ft"
    assert house.session().serving is Candidate.ADAPTER


async def test_a_switch_behind_the_gate_serves_nobody_who_asked_for_none(house: House) -> None:
    history, engines = await talked(house, 3, "soma")
    assert engines[-1] == "surrogate"
    answer = await house.say(history, "question 4", model=FINE_TUNING)
    assert answer.headers["X-SOMA-Reason"] == "adapted under soma"


async def test_an_adaptation_without_a_gate_keeps_to_the_limits_of_its_key(house: House) -> None:
    house.meter.adapters = 0
    _, engines = await talked(house, 3, FINE_TUNING)
    assert engines[-1] == "original"
    assert house.session().phase is Phase.ORIGINAL_ONLY


async def test_an_interrupted_adaptation_is_taken_up_under_its_own_rules(build: Build) -> None:
    first = build()
    await first.book.start()
    first.trainer.go.clear()
    history: History = []
    for number in (1, 2):
        await first.say(history, f"question {number}", model=FINE_TUNING)
    assert first.session().phase is Phase.ADAPTING
    await first.background.stop()
    await first.book.stop()
    second = build()
    await second.book.start()
    await second.custody.start()
    await second.settled()
    await second.custody.stop()
    answer = await second.say(history, "question 3", model=FINE_TUNING)
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert "judged" not in second.kinds()


# -- packages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["llmlingua2", "routellm", "speculative"])
async def test_a_policy_that_is_not_set_up_is_refused_where_it_is_asked_for_and_at_the_start(
    house: House, policy: str
) -> None:
    with pytest.raises(Unprocessable, match=f"policy '{policy}' is not set up here"):
        await house.say([], "question 1", model=f"soma:{policy}")
    with pytest.raises(ConfigError, match=r"found (None|null|0); expected"):
        Policies(house.config.model_copy(update={"policy": policy}))


def compressing(build: Build, **settings: Any) -> tuple[House, Llmlingua2Policy]:
    """A house with the policy `llmlingua2`, which has not started its process."""
    house = build(baselines={"llmlingua2": {"model": "tiny-xlm-roberta-large", **settings}})
    policy = house.policies.named("llmlingua2")
    assert isinstance(policy, Llmlingua2Policy)
    return house, policy


async def test_a_policy_that_cannot_tell_leaves_the_turn_to_the_original_and_says_why(build: Build) -> None:
    house, _ = compressing(build)
    await house.book.start()
    history: History = []
    await house.say(history, "question 1", model="soma:llmlingua2")
    answer = await house.say(history, "question 2", model="soma:llmlingua2")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert "found no such directory" in answer.headers["X-SOMA-Reason"]
    assert len(house.original.calls[-1].body["messages"]) == 3


class Halves:
    """Compresses as a test can foresee."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.fails = False

    async def ask(self, request: dict[str, Any]) -> list[str]:
        if self.fails:
            raise PolicyUnavailable("llmlingua2 has ended")
        self.asked.append(request["texts"])
        return [text[: len(text) // 2] for text in request["texts"]]


async def test_llmlingua2_shortens_earlier_messages_once_and_never_the_query(build: Build) -> None:
    house, policy = compressing(build)
    await house.book.start()
    policy._process = halves = Halves()  # type: ignore[assignment]
    history: History = [{"role": "system", "content": "be brief"}]
    for number in range(1, 4):
        answer = await house.say(history, f"question {number}", model="soma:llmlingua2")
    assert [m["content"] for m in house.original.calls[-1].body["messages"]] == [
        *("be brief", "quest", "sa", "quest", "sa", "question 3")
    ]
    assert halves.asked == [["question 1", "same"], ["question 2"]]
    assert "compressed to 0." in answer.headers["X-SOMA-Reason"]
    assert [turn.messages[-1]["content"] for turn in house.session().turns] == [
        f"question {number}" for number in range(1, 4)
    ]


@pytest.mark.parametrize(("score", "engine"), [(0.39, "surrogate"), (0.4, "original"), (0.9, "original")])
async def test_routellm_gives_the_original_what_scores_at_the_threshold_or_above(
    build: Build, score: float, engine: str
) -> None:
    house = build(baselines={"routellm": {"router": "random", "threshold": 0.4}})
    await house.book.start()
    policy = house.policies.named("routellm")
    asked: list[str] = []

    class Scorer:
        async def scores(self, queries: list[str]) -> list[float]:
            asked.extend(queries)
            return [score]

    policy._router = Scorer()  # type: ignore[attr-defined]
    answer = await house.say([{"role": "system", "content": "be brief"}], "question", model="soma:routellm")
    assert answer.headers["X-SOMA-Engine"] == engine
    assert asked == ["question"]
    assert f"win rate {score:.4f}" in answer.headers["X-SOMA-Reason"]


async def test_the_speculative_policy_sends_every_turn_to_the_original_that_drafts(build: Build) -> None:
    house = build(original={"draft_tokens": 3})
    await house.book.start()
    _, engines = await talked(house, 3, "soma:speculative")
    assert engines == ["original"] * 3
    assert house.session().turns[0].reason == "policy speculative, 3 tokens drafted"


def test_a_threshold_sends_the_wanted_share_of_queries_to_the_original() -> None:
    scores = [number / 100 for number in range(100)]
    for share in (0.1, 0.5, 0.8):
        threshold = threshold_for(scores, share)
        assert sum(score >= threshold for score in scores) == pytest.approx(100 * share, abs=1)
    assert threshold_for([0.2, 0.9], 0.0) == 0.9
    with pytest.raises(ValueError, match="no scores"):
        threshold_for([], 0.5)
