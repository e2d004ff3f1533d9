"""The policies to compare with, through the dispatcher. The packages themselves run in integration tests."""

from __future__ import annotations

from typing import Any

import pytest
from support.services import Build, Services

from soma_vllm.baselines.policies.llmlingua2 import Llmlingua2Policy
from soma_vllm.baselines.policies.routellm import threshold_for
from soma_vllm.errors import ConfigError, PolicyUnavailable, Unprocessable
from soma_vllm.scheduler.policies.base import Policies
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import Candidate

History = list[dict[str, Any]]

PREFIX = "soma:history_prefix"
FINE_TUNING = "soma:history_ft"


async def talked(services: Services, turns: int, model: str, session: str = "s") -> tuple[History, list[str]]:
    """A dialogue of some turns, and who answered them."""
    history: History = []
    engines = []
    for number in range(1, turns + 1):
        answer = await services.say(history, f"question {number}", session, model=model)
        engines.append(answer.headers["X-SOMA-Engine"])
        await services.settled()
    return history, engines


# -- history_prefix -----------------------------------------------------------------------------------------


async def test_history_prefix_lets_the_original_answer_the_warm_start_and_trains_nothing(
    services: Services,
) -> None:
    _, engines = await talked(services, 4, PREFIX)
    assert engines == ["original", "original", "surrogate", "surrogate"]
    assert services.trainer.requests == []
    assert set(services.kinds()) == {"turn"}


async def test_history_prefix_shows_the_surrogate_the_warm_start_verbatim_and_the_last_turns(
    build: Build,
) -> None:
    services = build(compressed_prefix_turns=1)
    await services.registry.start()
    history, _ = await talked(services, 6, PREFIX)
    shown = services.surrogate.calls[-1].body["messages"]
    assert [m["content"] for m in shown if m["role"] == "user"] == [
        *("question 1", "question 2"),
        *("question 5", "question 6"),
    ]
    assert shown[:4] == history[:4]


async def test_history_prefix_sends_a_history_that_is_new_to_the_server_to_the_original(
    services: Services,
) -> None:
    history: History = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
    answer = await services.say(history, "question", model=PREFIX)
    assert answer.headers["X-SOMA-Engine"] == "original"


async def test_history_prefix_leaves_requests_with_tools_to_the_original(services: Services) -> None:
    history, _ = await talked(services, 2, PREFIX)
    answer = await services.say(history, "question 3", model=PREFIX, tools=[{"type": "function"}])
    assert answer.headers["X-SOMA-Reason"] == "tools"


# -- history_ft ---------------------------------------------------------------------------------------------


async def test_history_ft_learns_from_the_whole_warm_start_and_switches_without_being_judged(
    services: Services,
) -> None:
    services.surrogate.answers = ["different"]  # no gate would let it pass
    _, engines = await talked(services, 3, FINE_TUNING)
    assert engines == ["original", "original", "surrogate"]
    (request,) = services.trainer.requests
    assert [example.turn for example in request.examples] == [1, 2]
    assert request.held_out == ()
    assert request.mining.enabled is False
    assert services.kinds() == [
        *("turn", "turn", "adaptation_started", "training_submitted", "trained"),
        *("adapter_published", "adapter_loaded", "switched", "turn"),
    ]


async def test_a_session_says_under_which_policy_it_was_adapted(services: Services) -> None:
    await talked(services, 3, FINE_TUNING)
    adapting = services.session().adapting
    assert adapting is not None
    assert (adapting.policy, adapting.gate, adapting.mining) == ("history_ft", False, False)
    started = next(event for _, event in services.events if event.kind == "adaptation_started")
    assert started.data["adapting"] == {"policy": "history_ft", "gate": False, "mining": False}


async def test_history_ft_is_neither_audited_nor_rolled_back(build: Build) -> None:
    services = build(gate={"audit_rate": 1.0, "consecutive_to_rollback": 1})
    await services.registry.start()
    services.surrogate.answers = ["different"]
    _, engines = await talked(services, 6, FINE_TUNING)
    assert engines[2:] == ["surrogate"] * 4
    assert "audited" not in services.kinds()
    assert services.session().phase is Phase.SWITCHED


async def test_a_switch_without_a_gate_serves_nobody_who_asked_for_one(services: Services) -> None:
    history, _ = await talked(services, 3, FINE_TUNING)
    answer = await services.say(history, "question 4")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.headers["X-SOMA-Reason"] == "adapted under history_ft"
    assert services.session().serving is Candidate.ADAPTER


async def test_a_switch_behind_the_gate_serves_nobody_who_asked_for_none(services: Services) -> None:
    history, engines = await talked(services, 3, "soma")
    assert engines[-1] == "surrogate"
    answer = await services.say(history, "question 4", model=FINE_TUNING)
    assert answer.headers["X-SOMA-Reason"] == "adapted under soma"


async def test_an_adaptation_without_a_gate_keeps_to_the_limits_of_its_key(services: Services) -> None:
    services.meter.adapters = 0
    _, engines = await talked(services, 3, FINE_TUNING)
    assert engines[-1] == "original"
    assert services.session().phase is Phase.ORIGINAL_ONLY


async def test_an_interrupted_adaptation_is_taken_up_under_its_own_rules(build: Build) -> None:
    first = build()
    await first.registry.start()
    first.trainer.go.clear()
    history: History = []
    for number in (1, 2):
        await first.say(history, f"question {number}", model=FINE_TUNING)
    assert first.session().phase is Phase.ADAPTING
    await first.background.stop()
    await first.registry.stop()
    second = build()
    await second.start()
    await second.settled()
    await second.stop()
    answer = await second.say(history, "question 3", model=FINE_TUNING)
    assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert "judged" not in second.kinds()


# -- packages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["llmlingua2", "routellm", "speculative"])
async def test_a_policy_that_is_not_set_up_is_refused_where_it_is_asked_for_and_at_the_start(
    services: Services, policy: str
) -> None:
    with pytest.raises(Unprocessable, match=f"policy '{policy}' is not set up here"):
        await services.say([], "question 1", model=f"soma:{policy}")
    with pytest.raises(ConfigError, match=r"found (None|null|0); expected"):
        Policies(services.config.model_copy(update={"policy": policy}))


def compressing(build: Build, **settings: Any) -> tuple[Services, Llmlingua2Policy]:
    """A house with the policy `llmlingua2`, which has not started its process."""
    services = build(baselines={"llmlingua2": {"model": "tiny-xlm-roberta-large", **settings}})
    policy = services.policies.named("llmlingua2")
    assert isinstance(policy, Llmlingua2Policy)
    return services, policy


async def test_a_policy_that_cannot_tell_leaves_the_turn_to_the_original_and_says_why(build: Build) -> None:
    services, _ = compressing(build)
    await services.registry.start()
    history: History = []
    await services.say(history, "question 1", model="soma:llmlingua2")
    answer = await services.say(history, "question 2", model="soma:llmlingua2")
    assert answer.headers["X-SOMA-Engine"] == "original"
    assert answer.headers["X-SOMA-Reason"] == "policy not ready"
    assert len(services.original.calls[-1].body["messages"]) == 3


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
    services, policy = compressing(build)
    await services.registry.start()
    policy._process = halves = Halves()
    history: History = [{"role": "system", "content": "be brief"}]
    for number in range(1, 4):
        answer = await services.say(history, f"question {number}", model="soma:llmlingua2")
    assert [m["content"] for m in services.original.calls[-1].body["messages"]] == [
        *("be brief", "quest", "sa", "quest", "sa", "question 3")
    ]
    assert halves.asked == [["question 1", "same"], ["question 2"]]
    assert "compressed to 0." in answer.headers["X-SOMA-Reason"]
    assert [turn.messages[-1]["content"] for turn in services.session().turns] == [
        f"question {number}" for number in range(1, 4)
    ]


@pytest.mark.parametrize(("score", "engine"), [(0.39, "surrogate"), (0.4, "original"), (0.9, "original")])
async def test_routellm_gives_the_original_what_scores_at_the_threshold_or_above(
    build: Build, score: float, engine: str
) -> None:
    services = build(baselines={"routellm": {"router": "random", "threshold": 0.4}})
    await services.registry.start()
    policy = services.policies.named("routellm")
    asked: list[str] = []

    class Scorer:
        async def scores(self, queries: list[str]) -> list[float]:
            asked.extend(queries)
            return [score]

    policy._router = Scorer()
    answer = await services.say([{"role": "system", "content": "be brief"}], "question", model="soma:routellm")
    assert answer.headers["X-SOMA-Engine"] == engine
    assert asked == ["question"]
    assert f"win rate {score:.4f}" in answer.headers["X-SOMA-Reason"]


async def test_the_speculative_policy_sends_every_turn_to_the_original_that_drafts(build: Build) -> None:
    services = build(original={"draft_tokens": 3})
    await services.registry.start()
    _, engines = await talked(services, 3, "soma:speculative")
    assert engines == ["original"] * 3
    assert services.session().turns[0].reason == "policy speculative, 3 tokens drafted"


def test_a_threshold_sends_the_wanted_share_of_queries_to_the_original() -> None:
    scores = [number / 100 for number in range(100)]
    for share in (0.1, 0.5, 0.8):
        threshold = threshold_for(scores, share)
        assert sum(score >= threshold for score in scores) == pytest.approx(100 * share, abs=1)
    assert threshold_for([0.2, 0.9], 0.0) == 0.9
    with pytest.raises(ValueError, match="no scores"):
        threshold_for([], 0.5)
