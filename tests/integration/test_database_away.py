"""A server whose PostgreSQL goes away and comes back, and which is killed in the middle of work."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.guard import GUARD_S, until
from support.postgres import Postgres
from support.server import TINY, Dialogue, Running, kill, serving

from soma_vllm.sessions.sql.records import Summary
from soma_vllm.sessions.sql.store import reading

FORCED = {"X-SOMA-Force": "adapter"}


def on_record(url: str) -> dict[str, Summary]:
    """Every session as the database has it."""

    async def read() -> dict[str, Summary]:
        async with reading(url) as store:
            return {summary.key.session: summary for summary in await store.summaries(None, 1000)}

    return asyncio.run(read())


@pytest.fixture(scope="module")
def url(postgres: Postgres) -> str:
    return str(postgres.new_database())


@pytest.fixture(scope="module")
def settings(url: str) -> dict[str, Any]:
    # Enough steps for a training to be under way when the server is killed.
    return {"storage": {"url": url}, "lora": {"steps": 300}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    return tmp_path_factory.mktemp("outage")


@pytest.fixture(scope="module")
def outage(folder: Path, settings: dict[str, Any], url: str, postgres: Postgres) -> dict[str, Any]:
    """What a server did while its database was away, and afterwards; then it was killed at work."""
    seen: dict[str, Any] = {}
    with serving(folder, TINY, settings) as first:
        live = Dialogue(first, "live", **FORCED)
        for number in range(4):
            live.say(f"question {number} about rivers")
        first.until("live", "SWITCHED")
        postgres.stop(clean=False)
        try:
            seen["away"] = _while_it_is_away(first, live)
        finally:
            postgres.start()
        seen["turns"] = len(first.session("live")["turns"])
        until(lambda: on_record(url)["live"].turns == seen["turns"])
        late = Dialogue(first, "begun during the outage")
        late.say("a question after the outage")
        seen["late"] = dict(late.headers)
        live.say("another question after the outage")
        seen["live"] = live.messages
        _killed_at_work(first, url)
    seen["record"] = on_record(url)
    return seen


def _while_it_is_away(server: Running, live: Dialogue) -> list[tuple[str, int, dict[str, str]]]:
    """(who asked, status, headers) of each request; the database comes back after the last answer."""
    found: list[tuple[str, int, dict[str, str]]] = []

    def ask(who: str, messages: list[dict[str, str]], **headers: str) -> str:
        body = {"model": "soma", "messages": messages, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(
            f"{server.root}/v1/chat/completions",
            json=body,
            headers={"Authorization": "Bearer key", **headers},
            timeout=GUARD_S,
        )
        found.append((who, answer.status_code, dict(answer.headers)))
        return str(answer.json()["choices"][0]["message"]["content"]) if answer.status_code == 200 else ""

    query = {"role": "user", "content": "a question during the outage"}
    for _ in range(2):
        live.messages.append(query)
        answer = ask("live", live.messages, **{"X-Session-ID": "live"})
        live.messages.append({"role": "assistant", "content": answer})
    ask("new", [query], **{"X-Session-ID": "begun during the outage"})
    ask("unnamed", [query])
    ask("branch", [*live.messages[:4], query], **{"X-Session-ID": "live"})
    paths = ("/soma/sessions", "/soma/sessions/unknown", "/health")
    return [*found, *((path, server.get(path).status_code, {}) for path in paths)]


def _killed_at_work(server: Running, url: str) -> None:
    """Killed while one session is trained and another, which is being answered, is removed."""
    removed = Dialogue(server, "removed")
    removed.say("a question")
    training = Dialogue(server, "training", **FORCED)
    for number in range(4):
        training.say(f"question {number} about mountains")
    until(lambda: any(e["kind"] == "training_submitted" for e in server.session("training")["events"]))
    stream = server.client().chat.completions.create(
        model="soma",
        messages=[*removed.messages, {"role": "user", "content": "a long answer"}],
        stream=True,
        max_tokens=1500,
        extra_headers={"X-Session-ID": "removed"},
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    with ThreadPoolExecutor(1) as other:
        removing = other.submit(_delete, f"{server.root}/soma/sessions/removed")
        until(lambda: removing.done() or on_record(url)["removed"].phase == "CLOSED")
        kill(server)
        assert removing.result() != 204
    stream.close()


def _delete(url: str) -> int:
    """The status; 0 where the connection broke."""
    try:
        return httpx.delete(url, headers={"Authorization": "Bearer key"}, timeout=GUARD_S).status_code
    except httpx.HTTPError:
        return 0


@pytest.fixture(scope="module")
def again(folder: Path, settings: dict[str, Any], outage: dict[str, Any]) -> Iterator[Running]:
    with serving(folder, TINY, settings) as second:
        yield second


def test_every_request_is_answered_while_the_database_is_away(outage: dict[str, Any]) -> None:
    for who, status, _ in outage["away"]:
        # What only the database knows is not there; nothing else is refused, and nothing fails.
        assert status == (503 if who.startswith("/soma") else 200), outage["away"]
    headers = {who: headers for who, _, headers in outage["away"]}
    for who in ("new", "unnamed", "branch"):
        assert headers[who]["x-soma-engine"] == "original"
    for who in ("new", "branch"):
        assert headers[who]["x-soma-reason"] == "session store unavailable"
    # A first question without an id begins a session, whatever the record holds.
    assert headers["unnamed"]["x-soma-reason"].startswith("warm start 1")
    assert headers["live"]["x-soma-session"] == "live"


def test_what_was_queued_is_on_record_when_the_database_is_back_and_sessions_go_on(
    outage: dict[str, Any],
) -> None:
    assert outage["turns"] == 6
    assert outage["late"]["x-soma-session"] == "begun during the outage"
    assert outage["record"]["live"].turns == 7


def test_after_the_kill_the_session_is_served_by_its_adapter(again: Running, outage: dict[str, Any]) -> None:
    dialogue = Dialogue(again, "live")
    dialogue.messages = outage["live"]
    dialogue.say("a question after the kill")
    assert dialogue.headers["X-SOMA-Session"] == "live"
    assert dialogue.headers["X-SOMA-Adapter"] == outage["record"]["live"].adapter
    assert len(again.session("live")["turns"]) == 8


def test_after_the_kill_the_removal_is_complete(again: Running, outage: dict[str, Any], url: str) -> None:
    assert outage["record"]["removed"].phase == "CLOSED"
    assert "removed" not in on_record(url)


def test_after_the_kill_the_training_is_done_and_no_adapter_is_left_over(
    again: Running, outage: dict[str, Any], url: str
) -> None:
    assert outage["record"]["training"].phase in ("ADAPTING", "SWITCHED")  # a fast one may have been over
    again.until("training", "SWITCHED")
    until(lambda: on_record(url)["training"].phase == "SWITCHED")
    serving_now = {summary.adapter for summary in on_record(url).values()} - {None}
    manifests = [path.read_text() for path in (again.run_dir / "adapters").rglob("soma.json")]
    assert len(manifests) == len(serving_now) == 2
    assert all(any(name in manifest for manifest in manifests) for name in serving_now)
