"""Requests that nobody means, to the real server: no 500, no hang, and both engines live on.

There are fewer of them than in tests/unit/api/test_fuzzed_requests.py, and what they meet is all real: vLLM's
own reading of parameters, templates, tokenizers and grammars, on both engines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from support.guard import GUARD_S
from support.server import Running

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
KEYS = ("fuzz-a", "fuzz-b")
FIELDS = settings(
    max_examples=70,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=tuple(HealthCheck),
)
BRIEF = {"max_tokens": 2, "max_completion_tokens": None, "min_tokens": 0, "stream_options": None}
"""Over what was drawn: a random model does not stop by itself."""


def drawn(described: Any, path: str, mode: GenerationMode) -> list[dict[str, Any]]:
    """Bodies as the server's own description of its interface lets them be, or does not."""
    found: list[dict[str, Any]] = []

    @given(case=described[path]["POST"].as_strategy(generation_mode=mode))
    @FIELDS
    def keep(case: Any) -> None:
        if isinstance(case.body, dict):
            found.append(case.body)

    keep()
    return found


def brief(body: dict[str, Any], **more: Any) -> dict[str, Any]:
    few = {name: 2 for name in ("n", "best_of") if isinstance(body.get(name), int) and body[name] > 2}
    return {**body, **BRIEF, **few, **more}


TurnQuery = tuple[str, dict[str, Any]]
"""A path and a body."""


class Sender:
    """Sends from two tenants at once and judges every answer."""

    def __init__(self, running: Running) -> None:
        self._running = running
        limits = httpx.Limits(max_connections=16)
        self._client = httpx.Client(base_url=running.root, timeout=GUARD_S, limits=limits)
        self.statuses: Counter[int] = Counter()

    def send_all(self, requests: Iterable[TurnQuery]) -> None:
        with ThreadPoolExecutor(12) as pool:
            self.statuses.update(pool.map(self._send, enumerate(requests)))

    def _send(self, numbered: tuple[int, TurnQuery]) -> int:
        number, (path, body) = numbered
        key = KEYS[number % 2]
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        answer = self._client.post(path, content=json.dumps(body), headers=headers)
        assert answer.status_code < 500, (path, answer.status_code, answer.text[:300], str(body)[:1000])
        if answer.status_code >= 400:
            assert "message" in answer.json()["error"], (path, answer.text[:300])
        return answer.status_code

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def sender(tiny_server: Running) -> Any:
    built = Sender(tiny_server)
    yield built
    assert tiny_server.get("/health").status_code == 200
    for engine in ("original", "surrogate"):
        raw = tiny_server.client().chat.completions.with_raw_response.create(
            model=f"soma:{engine}", messages=[{"role": "user", "content": "still there?"}], max_tokens=2
        )
        assert raw.headers["X-SOMA-Engine"] == engine
    built.close()


@pytest.fixture(scope="module")
def described(tiny_server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{tiny_server.root}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "wrong"])
def test_no_drawn_request_is_a_500(sender: Sender, described: Any, mode: GenerationMode) -> None:
    said = [{"role": "user", "content": "hello"}]
    requests: list[TurnQuery] = []
    for body in drawn(described, CHAT, mode):
        requests.append((CHAT, brief(body)))
        for model in ("soma", "soma:surrogate"):
            plain = {"model": model, "messages": said}
            requests.append((CHAT, brief({**body, **plain})))
            requests.append((CHAT, brief({**body, **plain, "stream": True})))
            # A body of many odd parameters fails for the first of them: each by itself, too.
            requests += [(CHAT, brief({name: body[name], **plain})) for name in sorted(body)[:8]]
        if isinstance(body.get("messages"), list):
            requests.append((CHAT, brief({}, model="soma", messages=body["messages"])))
            requests.append((CHAT, brief({}, model="tiny-surrogate", messages=body["messages"])))
    for body in drawn(described, TEXT, mode):
        for model in ("soma", "tiny-surrogate"):
            requests.append((TEXT, brief(body, model=model)))
            requests.append((TEXT, brief(body, model=model, prompt="hello")))
    for body in drawn(described, RESPONSES, mode):
        requests.append((RESPONSES, {**body, "max_output_tokens": 2}))
        requests.append((RESPONSES, {**body, "max_output_tokens": 2, "model": "soma"}))
    sender.send_all(requests)
    assert sender.statuses.total() > 1000
    assert sender.statuses[200] > 50


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("model", ["soma", "tiny-surrogate"])
@pytest.mark.parametrize(
    "wrong",
    [{"structured_outputs": True}, {"logprobs": -1}, {"allowed_token_ids": []}, {"top_k": 10**30}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_vllm_finds_wrong_late_is_a_400_on_both_engines(
    tiny_server: Running, model: str, stream: bool, wrong: dict[str, Any]
) -> None:
    body = {"model": model, "prompt": "x", "max_tokens": 2, "stream": stream, **wrong}
    answer = httpx.post(f"{tiny_server.root}{TEXT}", json=body, timeout=GUARD_S)
    assert (answer.status_code, "message" in answer.json()["error"]) == (400, True), answer.text[:300]


ODD = (
    "session",
    "sessіon",
    "ｓession",
    "sess\u200bion",
    "session\u0301",
    "x/../session",
    "\0",
    "\ud800",
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from((*ODD, "", "<|im_end|>", "<tool_call>", "{{ 1/0 }}", "\x1b[2J")),
)
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(("system", "user", "assistant", "tool")), "content": texts}),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {
                        "id": texts,
                        "type": st.just("function"),
                        "function": st.fixed_dictionaries({"name": texts, "arguments": texts}),
                    }
                ),
                max_size=2,
            ),
        }
    ),
)


def test_no_drawn_history_is_a_500_and_none_is_anothers(sender: Sender, tiny_server: Running) -> None:
    requests: list[TurnQuery] = []

    @given(history=st.lists(messages, min_size=1, max_size=6), named=st.sampled_from(ODD))
    @settings(FIELDS, max_examples=120)
    def keep(history: list[dict[str, Any]], named: str) -> None:
        for model in ("soma", "soma:surrogate"):
            body = brief({}, model=model, messages=history, metadata={"session_id": named})
            # Twice: once for each of the two tenants.
            requests.extend([(CHAT, body)] * 2)
        requests.append((RESPONSES, {"model": "soma", "input": history, "max_output_tokens": 2}))

    keep()
    sender.send_all(requests)
    assert sender.statuses.total() > 500
    assert sender.statuses[200] > 50
    tenants = []
    for key in KEYS:
        listed = tiny_server.get("/soma/sessions?limit=1000", key).json()
        tenants.append({row["tenant"] for row in listed["data"]})
    assert [len(found) for found in tenants] == [1, 1]
    assert tenants[0] != tenants[1]
