"""Playing dialogues to the original, and remembering what it said."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soma_vllm.config import Config
from soma_vllm.engines.engine import ChatCall, Engine, Reply
from soma_vllm.errors import EngineRefused, EngineUnavailable, TrainingError
from soma_vllm.tools.evaluate.dataset import material, split_by_length
from soma_vllm.tools.evaluate.trajectory import (
    PlayedTurn,
    Recipe,
    Trajectory,
    TrajectoryCache,
    play,
    recipe_of,
    trajectories,
)

RECIPE = Recipe("original", max_new_tokens=16, top_logprobs=2)
WORDS = Recipe("original", max_new_tokens=16, top_logprobs=0)
TURNS = ("one?", "two?", "three?")


class Original:
    """Numbers its answers; shows token ids when asked; refuses histories longer than `context` messages."""

    name = "original"

    def __init__(self, context: int = 100) -> None:
        self.calls: list[ChatCall] = []
        self._context = context

    async def chat(self, call: ChatCall) -> Reply:
        self.calls.append(ChatCall({**call.body, "messages": list(call.body["messages"])}))
        if len(call.body["messages"]) > self._context:
            raise EngineRefused(400, {"error": {"message": "too long"}})
        number = len(call.body["messages"]) // 2 + 1
        choice: dict[str, Any] = {
            "message": {"role": "assistant", "content": f"answer {number}"},
            "finish_reason": "length" if number == 2 else "stop",
        }
        if call.body.get("logprobs"):
            choice["logprobs"] = {"content": [entry(number), entry(9)]}
        return Reply(body={"choices": [choice]})


def entry(number: int) -> dict[str, Any]:
    tops = [{"token": f"token_id:{number + extra}", "logprob": -0.5 - extra} for extra in range(2)]
    return {"token": f"token_id:{number}", "logprob": -0.5, "top_logprobs": tops}


class Counted:
    """Opens an original, and counts how often."""

    def __init__(self) -> None:
        self.engine = Original()
        self.times = 0

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Engine]:
        self.times += 1
        yield self.engine


async def test_the_original_is_asked_greedily_with_the_whole_history() -> None:
    engine = Original()
    played = await play(engine, TURNS, RECIPE)
    assert [turn.answer for turn in played.turns] == ["answer 1", "answer 2", "answer 3"]
    assert [turn.cut for turn in played.turns] == [False, True, False]
    last = engine.calls[-1].body
    assert [m["content"] for m in last["messages"]] == ["one?", "answer 1", "two?", "answer 2", "three?"]
    assert (last["temperature"], last["max_tokens"], last["top_logprobs"]) == (0.0, 16, 2)
    teacher = played.turns[2].teacher
    assert teacher is not None
    assert teacher.tokens == (3, 9)
    assert teacher.top.tolist() == [[3, 4], [9, 10]]


async def test_an_original_that_shows_only_words_is_not_asked_for_more() -> None:
    engine = Original()
    played = await play(engine, TURNS, WORDS)
    assert "logprobs" not in engine.calls[0].body
    assert [turn.teacher for turn in played.turns] == [None, None, None]


async def test_a_refused_turn_ends_the_trajectory_and_leaves_the_earlier_ones() -> None:
    played = await play(Original(context=3), TURNS, RECIPE)
    assert len(played.turns) == 2
    assert played.ended == "turn 3 was refused with status 400"


async def test_a_reply_without_the_log_probabilities_asked_for_is_told() -> None:
    class Silent(Original):
        async def chat(self, call: ChatCall) -> Reply:
            return Reply(body={"choices": [{"message": {"content": "a secret"}, "finish_reason": "stop"}]})

    with pytest.raises(EngineUnavailable, match="logprobs") as caught:
        await play(Silent(), TURNS, RECIPE)
    assert "secret" not in str(caught.value)


async def test_the_second_run_starts_no_original(tmp_path: Path) -> None:
    cache, opening, said = TrajectoryCache(tmp_path / "kept"), Counted(), list[str]()
    dialogues = {"a": TURNS, "b": ("other?", "turns?")}
    first = await trajectories(dialogues, RECIPE, cache, opening, 2, said.append)
    again = await trajectories(dialogues, RECIPE, cache, opening, 2, said.append)
    assert opening.times == 1
    assert list(first) == list(again) == ["a", "b"]
    for name in dialogues:
        assert words(again[name]) == words(first[name])
        for one, other in zip(first[name].turns, again[name].turns, strict=True):
            assert one.teacher is not None
            assert other.teacher is not None
            assert one.teacher.tokens == other.teacher.tokens
            np.testing.assert_array_equal(one.teacher.top, other.teacher.top)
            np.testing.assert_array_equal(one.teacher.logprobs, other.teacher.logprobs)
    assert "not started" in said[-1]
    assert not any(word in line for line in said for word in ("answer 1", "one?"))


async def test_only_what_is_missing_is_played(tmp_path: Path) -> None:
    cache, opening = TrajectoryCache(tmp_path), Counted()
    await trajectories({"a": TURNS}, RECIPE, cache, opening, 2, lambda line: None)
    asked = len(opening.engine.calls)
    both = await trajectories({"b": ("x",), "a": TURNS}, RECIPE, cache, opening, 2, lambda line: None)
    assert len(opening.engine.calls) - asked == 1
    assert list(both) == ["b", "a"]


@pytest.mark.parametrize(
    "other",
    [Recipe("another", 16, 2), Recipe("original", 17, 2), Recipe("original", 16, 3)],
    ids=["model", "length", "log-probabilities"],
)
async def test_another_recipe_is_another_trajectory(tmp_path: Path, other: Recipe) -> None:
    cache = TrajectoryCache(tmp_path)
    cache.store(RECIPE, TURNS, await play(Original(), TURNS, RECIPE))
    assert cache.find(RECIPE, TURNS) is not None
    assert cache.find(other, TURNS) is None
    assert cache.find(RECIPE, TURNS[:2]) is None


async def test_a_damaged_file_is_played_anew_and_nothing_half_made_stays(tmp_path: Path) -> None:
    cache = TrajectoryCache(tmp_path)
    played = await play(Original(), TURNS, RECIPE)
    cache.store(RECIPE, TURNS, played)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert cache.find(RECIPE, TURNS) is None
    cache.store(RECIPE, TURNS, played)
    assert cache.find(RECIPE, TURNS) is not None
    assert list(tmp_path.iterdir()) == [kept]


def test_an_endpoint_is_asked_for_log_probabilities_only_where_it_speaks_vllm() -> None:
    endpoint = {"url": "http://127.0.0.1:1/v1", "name": "gpt"}
    assert recipe_of(Config.model_validate({"original": endpoint})).top_logprobs == 0
    assert recipe_of(Config.model_validate({"original": {**endpoint, "api": "vllm"}})).top_logprobs == 20
    assert recipe_of(Config.model_validate({"original_model": "m"})) == Recipe("m", 200, 20)


def trajectory(answers: Sequence[str], ended: str | None = None) -> Trajectory:
    turns = (PlayedTurn(f"query {n}", answer, False, None) for n, answer in enumerate(answers, start=1))
    return Trajectory(tuple(turns), ended)


def words(played: Trajectory) -> list[tuple[str, str, bool]]:
    return [(turn.query, turn.answer, turn.cut) for turn in played.turns]


def test_a_trajectory_is_split_as_a_session_would_be() -> None:
    config = Config.model_validate({"warm_window": 3, "acceptance_min_turns": 1})
    found = material(trajectory([f"answer {n}" for n in range(1, 7)]), config)
    assert [e.turn for e in found.examples] == [1, 2]
    assert [e.turn for e in found.held_out] == [3]
    assert [e.turn for e in found.later] == [4, 5, 6]
    contents = [m["content"] for m in found.later[0].messages]
    assert contents == ["query 1", "answer 1", "query 2", "answer 2", "query 3", "answer 3", "query 4"]


def test_a_later_turn_is_prompted_under_the_configured_prefix() -> None:
    settings = {"warm_window": 3, "compressed_prefix_turns": 1, "prefix": {"mode": "sliding"}}
    found = material(trajectory([f"answer {n}" for n in range(1, 7)]), Config.model_validate(settings))
    last = [str(m["content"]) for m in found.later[-1].messages]
    assert last[-1] == "query 6"
    assert "answer 2" not in " ".join(last)
    assert last[-2] == "answer 5"


def test_a_session_without_a_later_answer_is_refused_with_the_reason() -> None:
    config = Config.model_validate({"warm_window": 3})
    with pytest.raises(TrainingError, match=r"found 3 answers; expected at least 4 \(turn 4 was refused"):
        material(trajectory(["x"] * 3, "turn 4 was refused with status 400"), config)
    with pytest.raises(TrainingError, match="without words"):
        material(trajectory(["x", "x", "", "x"]), config)


def test_dialogues_shorter_than_the_warm_start_and_one_turn_are_listed() -> None:
    config = Config.model_validate({"warm_window": 3})
    enough, short = split_by_length({"long": ("q",) * 4, "short": ("q",) * 3}, config)
    assert list(enough) == ["long"]
    assert short == ["short: found 3 turns; expected at least 4, one more than warm_window"]
