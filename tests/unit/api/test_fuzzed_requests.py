"""Thousands of requests that nobody means, from the server's own description of its interface: none is a 500,
none hangs.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from support.api_services import (
    marker,
)
from support.fuzzing import Fuzzing, fuzzed

CHAT = "/v1/chat/completions"
Message = dict[str, Any]

pytestmark = pytest.mark.slow


# -- bodies -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described(fuzzing: Fuzzing) -> Any:
    """What the server says of itself."""
    return schemathesis.openapi.from_dict(fuzzing.send("GET", "/openapi.json").json())


def drawn(described: Any, method: str, path: str, mode: GenerationMode) -> st.SearchStrategy[Any]:
    found: st.SearchStrategy[Any] = described[path][method].as_strategy(generation_mode=mode)
    return found


def as_drawn(case: Any) -> dict[str, Any]:
    """The request that a case stands for, for httpx."""
    found = case.as_transport_kwargs(base_url="http://soma")
    sent = {"params": found.get("params"), "json": found.get("json"), "content": found.get("data")}
    return {name: value for name, value in sent.items() if value is not None}


BOTH = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.mark.parametrize("mode", BOTH, ids=["fitting", "wrong"])
def test_no_chat_request_is_a_500(fuzzing: Fuzzing, described: Any, mode: GenerationMode) -> None:
    @given(case=drawn(described, "POST", CHAT, mode))
    @fuzzed(90)
    def asked(case: Any) -> None:
        fuzzing.send("POST", CHAT, "anna", **as_drawn(case))
        if not isinstance(case.body, dict):
            return
        fuzzing.examples += 1
        said = [{"role": "user", "content": f"{marker('anna')} {fuzzing.examples}"}]
        plain = {"model": "soma", "messages": said}
        # A body of many odd parameters fails for the first of them: each by itself, too.
        alone = [{name: value} for name, value in case.body.items()]
        for body in (case.body, {**case.body, "stream": True}, *alone):
            fuzzing.send("POST", CHAT, "anna", json={**body, **plain})
        fuzzing.heard()

    before = fuzzing.services.sent[CHAT]
    asked()
    assert fuzzing.services.sent[CHAT] - before > 550


WRONG = (
    True,
    3,
    -0.5,
    10**30,
    "x",
    None,
    [],
    {},
    [True],
    [None],
    [{}],
    {"x": True},
    {"type": True},
    [{"type": [1]}],
)
"""A value of each of JSON's types, and what looks like a list or an object of something."""


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
    ],
)
def test_no_parameter_of_a_wrong_type_is_a_500(fuzzing: Fuzzing, path: str, told: dict[str, Any]) -> None:
    interface = fuzzing.send("GET", "/openapi.json").json()
    schema = interface["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    if "$ref" in schema:
        schema = interface["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    assert len(schema["properties"]) > 20
    for name in schema["properties"]:
        for value in WRONG:
            for more in ({}, {"tools": [True], "tool_choice": {"type": "function", "function": {"name": "x"}}}):
                fuzzing.send("POST", path, "anna", json={"model": "soma", **told, **more, name: value})


OTHERS = [
    ("POST", "/v1/completions", 40),
    ("POST", "/v1/responses", 40),
    ("GET", "/soma/sessions", 40),
    ("GET", "/soma/sessions/{session}", 20),
    ("DELETE", "/soma/sessions/{session}", 20),
    ("POST", "/soma/sessions/{session}/pin", 20),
    ("POST", "/soma/sessions/{session}/rollback", 20),
    ("POST", "/soma/sessions/{session}/readapt", 20),
]
FITTING = [
    ("GET", "/v1/models/{model}", 20),
    ("GET", "/v1/responses/{response_id}", 20),
    ("DELETE", "/v1/responses/{response_id}", 20),
    ("GET", "/v1/responses/{response_id}/input_items", 20),
    ("POST", "/v1/responses/{response_id}/cancel", 20),
]
"""What is asked of them cannot be wrong: any text is a path."""


@pytest.mark.parametrize(
    ("method", "path", "examples", "mode"),
    [
        *((*other, mode) for other in OTHERS for mode in BOTH),
        *((*other, GenerationMode.POSITIVE) for other in FITTING),
    ],
)
def test_no_request_to_another_route_is_a_500(
    fuzzing: Fuzzing, described: Any, method: str, path: str, examples: int, mode: GenerationMode
) -> None:
    @given(case=drawn(described, method, path, mode))
    @fuzzed(examples)
    def asked(case: Any) -> None:
        for key in ("anna", "the-admin-of-this-house"):
            fuzzing.send(method, case.formatted_path, key, **as_drawn(case))

    asked()
