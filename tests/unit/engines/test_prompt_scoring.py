"""How an answer is scored by the original: the arithmetic, and what of a vLLM's reply is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.guard import GUARD_S

from soma_vllm.engines.engine import ChatCall
from soma_vllm.engines.original import OriginalEngine
from soma_vllm.engines.prompt_scoring import agreement_from_prompt
from soma_vllm.errors import EngineError, EngineRefused

OPENING = [1, 7, 7]
CALL = ChatCall({"messages": [{"role": "user", "content": "hi"}]}, None, "tenant", background=True)


def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
    best = {"999": {"logprob": -0.1, "rank": 1, "decoded_token": "x"}} if rank > 1 else {}
    return {**best, str(token): {"logprob": logprob, "rank": rank, "decoded_token": "y"}}


def reply(**changes: Any) -> dict[str, Any]:
    """A prompt of three opening tokens and an answer of four."""
    ids = [*OPENING, 4, 5, 4, 6]
    scores = [None, entry(7, -9.0, 50), entry(7, -9.0, 50)]
    scores += [entry(4, -0.5, 1), entry(5, -3.5, 20), entry(4, -1.0, 1), entry(6, -2.0, 2)]
    return {"prompt_token_ids": ids, "prompt_logprobs": scores, **changes}


def test_only_the_answers_own_tokens_are_scored() -> None:
    found = agreement_from_prompt(reply(), OPENING)
    assert found.nll == pytest.approx((0.5 + 3.5 + 1.0 + 2.0) / 4)
    assert (found.top1, found.tokens) == (0.5, 4)


@pytest.mark.parametrize(
    ("changes", "opening", "message"),
    [
        ({}, [1, 7, 8], "expected the 3 tokens that open an answer first"),
        ({}, [1, 7, 7, 4, 5, 4, 6, 6], "expected the 8 tokens"),
        ({}, [1, 7, 7, 4, 5, 4, 6], "an answer without tokens"),
        ({"prompt_logprobs": None}, OPENING, "found no prompt_logprobs"),
        ({"prompt_token_ids": [1, 7]}, OPENING, "found no prompt_logprobs"),
        ({"prompt_logprobs": [None] * 7}, OPENING, "no log-probability of one"),
        ({"prompt_logprobs": [None] * 3 + [entry(3, -1.0, 1)] * 4}, OPENING, "no log-probability of one"),
        ({"prompt_logprobs": [entry(i, float("nan"), 1) for i in reply()["prompt_token_ids"]]}, OPENING, "nan"),
    ],
)
def test_a_reply_that_does_not_show_the_answers_scores_is_refused(
    changes: dict[str, Any], opening: list[int], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        agreement_from_prompt(reply(**changes), opening)


COMPLETION = {"choices": [{"message": {"role": "assistant", "content": "an answer"}}]}


class Vllm:
    """A server that tokenizes and scores as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, dict[str, Any]] = {}
        self.reply: dict[str, Any] = reply()
        self.status = 200

    async def answer(self, request: web.Request) -> web.Response:
        self.asked[request.path] = await request.json()
        if request.path == "/tokenize":
            return web.json_response({"count": 3, "tokens": OPENING})
        return web.json_response(self.reply, status=self.status)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Vllm, OriginalEngine]]:
    server = Vllm()
    app = web.Application()
    app.router.add_post("/tokenize", server.answer)
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "u.sock")).start()
    engine = OriginalEngine("big", "http://original/v1", socket=tmp_path / "u.sock", speaks_vllm=True)
    yield server, engine
    await engine.close()
    await runner.cleanup()


async def test_an_answer_is_scored_by_one_prefill_behind_all_users(
    served: tuple[Vllm, OriginalEngine],
) -> None:
    server, engine = served
    assert (await engine.score(CALL, "an answer")).tokens == 4
    question = server.asked["/tokenize"]
    assert (question["model"], question["messages"]) == ("big", CALL.body["messages"])
    asked = server.asked["/v1/chat/completions"]
    assert asked["messages"] == [*CALL.body["messages"], {"role": "assistant", "content": "an answer"}]
    assert (asked["add_generation_prompt"], asked["continue_final_message"]) == (False, True)
    assert (asked["max_tokens"], asked["prompt_logprobs"], asked["return_token_ids"]) == (1, 1, True)
    assert (asked["priority"], asked["cache_salt"], asked["model"]) == (1, "tenant", "big")


async def test_a_users_request_goes_before_the_background_whatever_he_asks_for(
    served: tuple[Vllm, OriginalEngine],
) -> None:
    server, engine = served
    server.reply = COMPLETION
    await engine.chat(ChatCall({"messages": [], "priority": -5}))
    assert server.asked["/v1/chat/completions"]["priority"] == 0


async def test_someone_elses_vllm_is_not_asked_for_a_priority_that_it_might_refuse(
    unused_tcp_port: int,
) -> None:
    server = Vllm()
    server.reply = COMPLETION
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    engine = OriginalEngine("big", f"http://127.0.0.1:{unused_tcp_port}/v1", speaks_vllm=True)
    await engine.chat(ChatCall({"messages": [], "priority": -5}, background=True))
    await engine.close()
    await runner.cleanup()
    assert "priority" not in server.asked["/v1/chat/completions"]


async def test_a_refused_score_is_a_refusal(served: tuple[Vllm, OriginalEngine]) -> None:
    server, engine = served
    server.status, server.reply = 400, {"error": {"message": "too long"}}
    with pytest.raises(EngineRefused):
        await engine.score(CALL, "an answer")


async def test_an_original_that_is_no_vllm_is_not_asked(unused_tcp_port: int) -> None:
    engine = OriginalEngine("big", f"http://127.0.0.1:{unused_tcp_port}/v1")
    with pytest.raises(EngineError, match="does not speak vLLM"):
        await asyncio.wait_for(engine.score(CALL, "an answer"), GUARD_S)
