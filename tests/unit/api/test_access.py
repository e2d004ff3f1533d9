"""Who is let in: keys and the header that brings them, through a small application."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.access_app import (
    ADMIN,
    CHAT,
    MIB,
    asked,
    services,
    with_key,
)

from soma_vllm.api.auth.access import KEYED, KEYED_BELOW, OPEN, STEERING
from soma_vllm.config import Limits
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.state.identity import tenant_of

# -- keys -----------------------------------------------------------------------------------------------


async def test_an_issued_key_is_served_as_its_tenant(keys: KeyStore) -> None:
    built = services(keys=keys)
    _, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        response = await client.post(CHAT, json={"text": "abc"}, headers=with_key(key))
    assert response.json() == {"tenant": tenant_of(f"Bearer {key}"), "admin": False, "length": 3}


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic YTpi"}, {"X-API-Key": "nope"}],
)
async def test_without_a_known_key_the_answer_is_openais_401(keys: KeyStore, headers: dict[str, str]) -> None:
    built = services(keys=keys)
    async with built.client() as client:
        response = await client.post(CHAT, json={}, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("UnauthorizedError", "invalid_api_key", None)
    assert not built.reached
    assert built.counted("key") == 1


async def test_a_key_that_was_revoked_is_refused(keys: KeyStore) -> None:
    built = services(keys=keys)
    key_id, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        assert (await client.post(CHAT, json={}, headers=with_key(key))).status_code == 200
        await keys.revoke(key_id)
        assert (await client.post(CHAT, json={}, headers=with_key(key))).status_code == 401


async def test_wrong_revoked_and_unknown_keys_are_answered_alike(keys: KeyStore) -> None:
    built = services(keys=keys)
    key_id, revoked = await keys.add("Ana", Limits())
    await keys.revoke(key_id)
    _, good = await keys.add("Bo", Limits())
    unknown = "sk-soma-" + "f" * 12 + "-" + "x" * 43
    async with built.client() as client:
        answers = [
            await client.post(CHAT, json={}, headers=with_key(key))
            for key in (revoked, good[:-2] + "__", unknown, "hello")
        ]
    assert {(answer.status_code, answer.text) for answer in answers} == {(401, answers[0].text)}


@pytest.mark.parametrize("path", sorted(OPEN))
async def test_the_open_paths_need_no_key_not_even_a_sensible_header(keys: KeyStore, path: str) -> None:
    async with services(keys=keys).client() as client:
        assert (await client.get(path, headers={"Authorization": "\x7f"})).status_code < 400


CLOSED = [
    "/v1/models",
    "/v1/completions",
    "/v1/responses/r1",
    "/healthz",
    "/health/",
    "/load",
    "/anything",
]


@pytest.mark.parametrize("path", [*CLOSED, "/soma/sessions", "/HEALTH", "//health", "/metricsx", "/tokenize"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "HEAD", "BREW"])
async def test_every_other_path_is_closed_whatever_the_method(keys: KeyStore, path: str, method: str) -> None:
    built = services(keys=keys)
    async with built.client() as client:
        assert (await client.request(method, f"http://soma{path}")).status_code == 401
    assert not built.reached


async def test_a_preflight_of_a_browser_is_answered_before_keys_are_asked_for(keys: KeyStore) -> None:
    wish = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    async with services(keys=keys).client() as client:
        assert (await client.options(CHAT, headers=wish)).status_code == 200
        refused = await client.post(CHAT, json={}, headers={"Origin": "http://page"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "*"


STEERS = ["/scale_elastic_ep", "/start_profile", "/pause", "/collective_rpc", "/new_in_vllm", *sorted(STEERING)]


@pytest.mark.parametrize("path", STEERS)
async def test_routes_that_steer_the_server_are_the_admins(keys: KeyStore, path: str) -> None:
    built = services(keys=keys)
    _, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        refused = await client.post(path, headers=with_key(key))
        allowed = await client.post(path, headers=with_key(ADMIN))
    assert (refused.status_code, allowed.status_code) == (403, 200)
    assert built.counted("admin") == 1


@pytest.mark.parametrize("path", sorted(KEYED) + [f"{prefix}x" for prefix in KEYED_BELOW])
async def test_the_other_routes_are_for_every_key(keys: KeyStore, path: str) -> None:
    _, key = await keys.add("Ana", Limits())
    async with services(keys=keys).client() as client:
        assert (await client.post(path, headers=with_key(key))).status_code == 200


async def test_a_path_below_a_proxys_prefix_is_judged_without_it(keys: KeyStore) -> None:
    built = services(keys=keys)
    built.app.root_path = "/api"
    async with built.client() as client:
        assert (await client.get("/api/health")).status_code == 200
        assert (await client.get("/api/v1/models")).status_code == 401
        assert (await client.get("/api/healthz")).status_code == 401


async def test_while_the_database_is_away_an_unknown_key_is_told_to_come_back(tmp_path: Path) -> None:
    keys = KeyStore.at(f"sqlite+aiosqlite:///{tmp_path}/none/sessions.db")
    built = services(keys=keys)
    async with built.client() as client:
        response = await client.post(CHAT, json={}, headers=with_key("sk-soma-0123456789ab-" + "s" * 32))
    await keys.close()
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert built.counted("store") == 1


async def test_without_keys_everyone_is_let_in_as_before() -> None:
    built = services()
    async with built.client() as client:
        answers = [
            (await client.post(CHAT, json={}, headers=headers)).json()["tenant"]
            for headers in ({}, with_key("a"), with_key("b"))
        ]
        assert (await client.post("/start_profile")).status_code == 200
    assert answers == ["public", tenant_of("Bearer a"), tenant_of("Bearer b")]


# -- headers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"Bearer " + b"x" * MIB, "found 1048583 bytes; expected at most 4096"),
        (b"Bearer a\nb", "control characters"),
        (b"Bearer a\x00", "control characters"),
        (b"Bearer\ta", "control characters"),
    ],
)
async def test_an_authorization_that_cannot_be_one_is_a_400(value: bytes, told: str) -> None:
    built = services()
    status, body = await asked(built.app, CHAT, [(b"authorization", value)])
    assert status == 400
    assert told in json.loads(body)["error"]["message"]
    assert built.counted("malformed") == 1


async def test_several_authorizations_are_a_400_in_either_mode(keys: KeyStore) -> None:
    _, key = await keys.add("Ana", Limits())
    twice = [(b"authorization", f"Bearer {key}".encode())] * 2
    for built in (services(), services(keys=keys)):
        status, body = await asked(built.app, CHAT, twice)
        assert status == 400
        assert b"found 2 headers; expected one" in body
        assert not built.reached


headers = st.lists(
    st.tuples(
        st.sampled_from([b"authorization", b"content-length", b"x-session-id", b"host"]),
        st.one_of(
            st.binary(max_size=200),
            st.builds(lambda tail: b"Bearer " + tail, st.binary(max_size=80)),
            st.sampled_from([b"-1", b"9" * 6000, b"1e9", b"0x10", "٣".encode(), b" 5"]),
        ),
    ),
    max_size=4,
)


@given(headers)
async def test_no_header_makes_a_500(found: list[tuple[bytes, bytes]]) -> None:
    class Nobody:
        async def verify(self, key: str) -> None:
            return None

    for keys in (None, Nobody()):
        built = services(keys=keys)
        status, body = await asked(built.app, CHAT, found, [b"{}"])
        assert status in (200, 400, 401, 413)
        assert keys is None or status != 200
        json.loads(body)
