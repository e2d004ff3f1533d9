"""What a request may cost: the size of its body, and the limits of its key."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.access_app import (
    ADMIN,
    CHAT,
    MIB,
    Clock,
    asked,
    services,
    untouched,
    with_key,
)

from soma_vllm.config import Limits
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.state.identity import tenant_of
from soma_vllm.types import Usage

# -- bodies ---------------------------------------------------------------------------------------------


async def test_a_declared_length_above_the_limit_is_refused_before_a_byte_is_read() -> None:
    built = services()
    length = (b"content-length", str(MIB + 1).encode())
    status, body = await asked(built.app, CHAT, [length], untouched)
    assert status == 413
    assert json.loads(body)["error"]["code"] == "body_too_large"
    assert "found more than 1 MiB" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/raw"])
@pytest.mark.parametrize("length", [None, b"10", b"nonsense"])
async def test_a_body_that_grows_too_large_is_refused_whatever_it_declared(
    path: str, length: bytes | None
) -> None:
    built = services()
    pieces = [b"x" * (MIB // 4)] * 9
    sent = [(b"content-length", length)] if length is not None else []
    status, body = await asked(built.app, path, sent, pieces)
    assert status == 413
    assert json.loads(body)["error"]["code"] == "body_too_large"
    assert len(pieces) == 9 - 5, "no more is read than shows that it is too large"
    assert CHAT not in built.reached
    assert built.counted("body") == 1


async def test_a_body_of_exactly_the_limit_passes() -> None:
    status, body = await asked(services().app, "/v1/raw", [], [b"x" * (MIB // 2)] * 2)
    assert (status, json.loads(body)) == (200, {"length": MIB})


async def test_the_application_gets_each_piece_as_it_comes() -> None:
    status, body = await asked(services().app, "/v1/duplex", [], [b"a", b"bb", b"ccc"])
    assert (status, body) == (200, b"begun 1 2 3 0 ")


async def test_a_body_that_grows_too_large_under_a_running_reply_looks_like_a_client_that_left() -> None:
    built = services()
    status, body = await asked(built.app, "/v1/duplex", [], [b"x" * MIB, b"x"])
    assert (status, body) == (200, b"begun 1048576 left")
    assert built.counted("body") == 1


async def test_an_open_path_takes_no_larger_body() -> None:
    built = services()
    status, _ = await asked(built.app, "/ping", [(b"content-length", b"99999999")], untouched)
    assert status == 413


# -- limits ---------------------------------------------------------------------------------------------


async def test_the_request_above_the_limit_is_told_exactly_when_to_come_back() -> None:
    clock = Clock()
    built = services(Limits(requests_per_minute=2), clock=clock)
    async with built.client() as client:
        for clock.now in (1000.0, 1012.5):
            assert (await client.post(CHAT, json={})).status_code == 200
        clock.now = 1020.25
        refused = await client.post(CHAT, json={})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "40"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        clock.now = 1020.25 + 40 - 1
        assert (await client.post(CHAT, json={})).status_code == 429
        clock.now = 1020.25 + 40
        assert (await client.post(CHAT, json={})).status_code == 200
    assert built.counted("requests_per_minute") == 2


CHEAP = [("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/v1/messages/count_tokens")]
CHEAP += [("POST", "/v1/conversations"), ("GET", "/soma/sessions"), ("DELETE", "/soma/sessions/s")]


@pytest.mark.parametrize(("method", "path"), CHEAP)
async def test_what_costs_the_processor_or_the_database_counts_though_it_needs_no_tokens(
    method: str, path: str
) -> None:
    built = services(Limits(requests_per_minute=2, tokens_per_minute=1))
    built.quotas.spent("public", Usage(1, None, 1))
    async with built.client() as client:
        statuses = [(await client.request(method, path)).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        for _ in range(3):
            admin = await client.request(method, path, headers={"Authorization": f"Bearer {ADMIN}"})
            assert admin.status_code == 200


async def test_requests_that_cost_next_to_nothing_do_not_count() -> None:
    built = services(Limits(requests_per_minute=1))
    async with built.client() as client:
        for _ in range(5):
            assert (await client.get("/v1/models")).status_code == 200
            assert (await client.delete("/v1/responses/r1")).status_code == 200
            for path in ("/v1/responses/r1/cancel", "/ping"):
                assert (await client.post(path)).status_code == 200
        assert (await client.post("/v1/messages")).status_code == 200
        for path in (CHAT, "/invocations", "/inference/v1/generate", "/v1/not_yet_known"):
            assert (await client.post(path)).status_code == 429


async def test_a_request_refused_for_its_key_or_size_takes_nothing_from_the_limit(keys: KeyStore) -> None:
    built = services(Limits(requests_per_minute=1), keys)
    _, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        assert (await client.post(CHAT, json={}, headers=with_key(key + "x"))).status_code == 401
        large = await client.post(CHAT, content=b"x" * (MIB + 1), headers=with_key(key))
        assert large.status_code == 413
        assert (await client.post(CHAT, json={}, headers=with_key(key))).status_code == 200


async def test_a_keys_own_limit_counts_instead_of_the_configured_one(keys: KeyStore) -> None:
    built = services(Limits(requests_per_minute=1), keys)
    _, free = await keys.add("free", Limits(requests_per_minute=None))
    _, usual = await keys.add("usual", Limits())
    async with built.client() as client:
        for _ in range(5):
            assert (await client.post(CHAT, json={}, headers=with_key(free))).status_code == 200
        assert (await client.post(CHAT, json={}, headers=with_key(usual))).status_code == 200
        assert (await client.post(CHAT, json={}, headers=with_key(usual))).status_code == 429


async def test_of_many_requests_at_once_exactly_the_allowed_ones_pass(keys: KeyStore) -> None:
    built = services(Limits(requests_per_minute=10), keys)
    _, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        answers = await asyncio.gather(*(client.post(CHAT, json={}, headers=with_key(key)) for _ in range(50)))
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [429] * 40


async def test_spent_tokens_refuse_the_next_request_and_only_that_tenants() -> None:
    clock = Clock()
    built = services(Limits(tokens_per_minute=100), clock=clock)
    async with built.client() as client:
        assert (await client.post(CHAT, json={}, headers=with_key("a"))).status_code == 200
        built.quotas.spent(tenant_of("Bearer a"), Usage(90, None, 10))
        clock.now += 18.0
        refused = await client.post(CHAT, json={}, headers=with_key("a"))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "42")
        assert (await client.get("/v1/models", headers=with_key("a"))).status_code == 200
        assert (await client.post(CHAT, json={}, headers=with_key("b"))).status_code == 200
