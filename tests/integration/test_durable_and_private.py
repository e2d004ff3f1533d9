"""A server with API keys that is killed, and started again over the same records."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.guard import GUARD_S, until
from support.server import TINY, Dialogue, Running, free_port, kill, serving

ADMIN = "the-admin-key-of-the-tests"
# Enough steps for a training to be under way when the server is killed.
SETTINGS: dict[str, Any] = {"access": {"mode": "keys"}, "lora": {"steps": 150}}
FORCED = {"X-SOMA-Force": "adapter"}
STREAMED = {"role": "user", "content": "a question whose answer is cut off by the kill"}


def soma(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "soma_vllm.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "SOMA_ADMIN_KEY": ADMIN},
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    return tmp_path_factory.mktemp("durable")


@pytest.fixture(scope="module")
def keys(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    storage = f"sqlite+aiosqlite:///{folder}/run/sessions.db"
    limits = (["--requests-per-minute", "1000"], ["--live-sessions", "1"])
    added = [
        soma("keys", "add", name, "--storage", storage, *limit)
        for name, limit in zip("ab", limits, strict=True)
    ]
    assert [done.returncode for done in added] == [0, 0], added
    return [done.stdout.strip() for done in added]


@pytest.fixture(scope="module")
def killed(folder: Path, keys: list[str]) -> Iterator[Path]:
    """Where a server was killed after one session had switched, while another was being trained."""
    os.environ["SOMA_ADMIN_KEY"] = ADMIN
    with serving(folder, TINY, SETTINGS) as first:
        switched = Dialogue(first, "switched", keys[0], **FORCED)
        for number in range(4):
            switched.say(f"question {number} about rivers")
        first.until("switched", "SWITCHED", key=keys[0])
        switched.say("one more question about rivers")
        _refuses_strangers(first, keys)
        _obeys_the_administrator(first, keys)
        training = Dialogue(first, "training", keys[0], **FORCED)
        for number in range(4):
            training.say(f"question {number} about mountains")
        until(lambda: "training_submitted" in kinds(first, "training", keys[0]))
        time.sleep(0.1)  # records are written behind the answers
        late = Dialogue(first, "late", keys[0])
        late.say("a first question")
        late.say("a question whose answer comes just before the kill")
        with _streaming(first, keys[0], "streaming"):
            kill(first)
    (folder / "history").write_text(json.dumps(switched.messages))
    (folder / "late").write_text(json.dumps(late.messages))
    yield folder
    del os.environ["SOMA_ADMIN_KEY"]


def kinds(server: Running, session: str, key: str) -> list[str]:
    """What has happened to a session."""
    return [event["kind"] for event in server.session(session, key)["events"]]


@contextlib.contextmanager
def _streaming(server: Running, key: str, session: str) -> Iterator[None]:
    """In the middle of a warm start's first answer, of which some has reached the client."""
    stream = server.client(key).chat.completions.create(
        model="soma",
        messages=[STREAMED],
        stream=True,
        max_tokens=1900,  # more than it will get round to
        extra_headers={"X-Session-ID": session},
        extra_body={"ignore_eos": True},
    )
    events = iter(stream)
    for _ in range(3):
        next(events)
    yield
    with pytest.raises((httpx.HTTPError, openai.APIError)):
        list(events)
    stream.close()


def _refuses_strangers(server: Running, keys: list[str]) -> None:
    with pytest.raises(openai.AuthenticationError):
        server.client("sk-soma-000000000000-" + "x" * 43).models.list()
    for path in ("/v1/models", "/soma/sessions", "/soma/sessions/switched", "/tokenize"):
        assert httpx.get(f"{server.root}{path}", timeout=GUARD_S).status_code == 401, path
    assert httpx.get(f"{server.root}/health", timeout=GUARD_S).status_code == 200
    Dialogue(server, "theirs", keys[1]).say("hello")
    with pytest.raises(openai.RateLimitError) as refused:
        Dialogue(server, "another", keys[1]).say("hello")
    assert int(refused.value.response.headers["Retry-After"]) > 0
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        server.session("switched", keys[1])
    listed = server.get("/soma/sessions", keys[1]).json()["data"]
    assert [row["session"] for row in listed] == ["theirs"]
    order = httpx.post(
        f"{server.root}/soma/sessions/theirs/rollback", headers=_bearer(keys[1]), timeout=GUARD_S
    )
    assert order.status_code == 403


def _obeys_the_administrator(server: Running, keys: list[str]) -> None:
    listed = soma("sessions", "ls", "--json", "--url", server.root)
    assert listed.returncode == 0, listed.stderr
    for word in ("switched", "theirs"):
        assert f'"session": "{word}"' in listed.stdout
    tenant = server.session("theirs", keys[1])["tenant"]
    where = ["--url", server.root, "--tenant", tenant]
    assert soma("sessions", "pin", "theirs", "surrogate", *where).returncode == 0
    assert server.session("theirs", keys[1])["pinned"] == "surrogate"
    assert "expected SWITCHED" in soma("sessions", "rollback", "theirs", *where).stderr
    assert soma("sessions", "rm", "theirs", *where).stdout.strip() == "removed    theirs"
    gone_now = soma("sessions", "show", "theirs", *where)
    assert gone_now.returncode == 1
    assert "no session 'theirs'" in gone_now.stderr


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def again(killed: Path) -> Iterator[Running]:
    with serving(killed, TINY, SETTINGS) as second:
        yield second


def test_after_a_kill_a_session_goes_on_where_it_was_with_its_adapter(
    again: Running, killed: Path, keys: list[str]
) -> None:
    before = again.session("switched", keys[0])
    assert (before["phase"], len(before["turns"])) == ("SWITCHED", 5)
    dialogue = Dialogue(again, "switched", keys[0])
    dialogue.messages = json.loads((killed / "history").read_text())
    dialogue.say("and another question about rivers")
    assert dialogue.headers["X-SOMA-Engine"] == "surrogate"
    assert dialogue.headers["X-SOMA-Adapter"] == before["adapter"]
    assert len(again.session("switched", keys[0])["turns"]) == 6


def test_after_a_kill_a_training_that_was_under_way_is_done_without_anybodys_asking(
    again: Running, keys: list[str]
) -> None:
    found = again.until("training", "SWITCHED", "ORIGINAL_ONLY", key=keys[0])
    assert len(found["turns"]) == 4
    # Two where the kill came before the training's end; a fast one may have been over.
    assert [event["kind"] for event in found["events"]].count("adaptation_started") in (1, 2)
    assert sum(event["kind"] in ("switched", "refused", "training_failed") for event in found["events"]) == 1


def test_a_turn_that_was_streamed_just_before_the_kill_is_taken_from_the_clients_transcript(
    again: Running, killed: Path, keys: list[str]
) -> None:
    recorded = again.session("late", keys[0])["turns"]
    assert len(recorded) in (1, 2)  # writes come behind the answers
    dialogue = Dialogue(again, "late", keys[0])
    dialogue.messages = json.loads((killed / "late").read_text())
    dialogue.say("a question after the kill")
    assert dialogue.headers["X-SOMA-Session"] == "late"
    assert len(again.session("late", keys[0])["turns"]) == len(recorded) + 1


def test_a_request_that_the_kill_cut_off_is_asked_again_in_its_session(again: Running, keys: list[str]) -> None:
    dialogue = Dialogue(again, "streaming", keys[0])
    dialogue.say(STREAMED["content"])
    assert dialogue.headers["X-SOMA-Session"] == "streaming"
    assert len(again.session("streaming", keys[0])["turns"]) == 1


def test_no_session_was_forked_by_the_kill(again: Running, keys: list[str]) -> None:
    listed = again.get("/soma/sessions", keys[0]).json()["data"]
    assert [row["session"] for row in listed if "~" in row["session"]] == []


def test_while_the_records_disk_is_full_users_are_answered_and_afterwards_all_of_it_is_on_record(
    again: Running, keys: list[str]
) -> None:
    database = again.run_dir / "sessions.db"
    dialogue = Dialogue(again, "disk", keys[0])
    limit = again.output.stat().st_size + 50_000  # room for the server's log, and none for the record
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    while database.with_name("sessions.db-wal").stat().st_size <= limit:
        dialogue.say(f"question {len(dialogue.messages)} about disks")
        time.sleep(0.05)
        dialogue.messages = dialogue.messages[-6:]
    before = len(again.session("disk", keys[0])["turns"])
    _until_on_record(database, "disk", before)
    unlimited = resource.prlimit(again.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(again.process.pid, resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        other = Dialogue(again, "begun on a full disk", keys[0])
        for number in range(3):
            dialogue.say(f"another question {number}")
            other.say(f"a question {number}", stream=True)
            assert (dialogue.headers["X-SOMA-Session"], other.headers["X-SOMA-Session"]) == (
                "disk",
                "begun on a full disk",
            )
        time.sleep(0.5)  # writes that could be taken would have been
        assert (on_record(database, "disk"), on_record(database, "begun on a full disk")) == (before, 0)
    finally:
        resource.prlimit(again.process.pid, resource.RLIMIT_FSIZE, unlimited)
    _until_on_record(database, "disk", before + 3)
    _until_on_record(database, "begun on a full disk", 3)
    other.say("a question with room")
    assert len(again.session("begun on a full disk", keys[0])["turns"]) == 4


def on_record(database: Path, session: str) -> int:
    """Turns that the database has of a session."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT turns FROM sessions WHERE session = ?", [session]).fetchall()
    return int(rows[0][0]) if rows else 0


def _until_on_record(database: Path, session: str, turns: int) -> None:
    until(lambda: on_record(database, session) == turns)


def test_a_removed_session_is_not_found_by_a_server_started_later(again: Running, keys: list[str]) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        again.session("theirs", keys[1])


def test_an_owner_removes_its_own_session_and_its_adapter(again: Running, keys: list[str]) -> None:
    name = again.session("switched", keys[0])["adapter"]
    again.until("switched", "SWITCHED", key=keys[0])
    found = list((again.run_dir / "adapters").rglob("soma.json"))
    assert any(name in path.read_text() for path in found)
    url = f"{again.root}/soma/sessions/switched"
    assert httpx.delete(url, headers=_bearer(keys[0]), timeout=GUARD_S).status_code == 204
    assert httpx.delete(url, headers=_bearer(keys[0]), timeout=GUARD_S).status_code == 404
    left = list((again.run_dir / "adapters").rglob("soma.json"))
    assert not any(name in path.read_text() for path in left)


@pytest.mark.parametrize("shared", ["record", "run directory"])
def test_a_second_server_is_refused_before_it_starts_anything(
    shared: str, again: Running, killed: Path, tmp_path: Path
) -> None:
    storage = f"storage.url=sqlite+aiosqlite:///{again.run_dir}/sessions.db"
    elsewhere = f"server.run_dir={again.run_dir if shared == 'run directory' else tmp_path}"
    settings = [storage, elsewhere, f"server.port={free_port()}"]
    command = [sys.executable, "-m", "soma_vllm.app.serve", "--config", str(killed / "config.yaml")]
    options = [part for setting in settings for part in ("--set", setting)]
    refused = subprocess.run([*command, *options], capture_output=True, text=True, timeout=GUARD_S, check=False)
    assert refused.returncode == 1
    what = "on this record" if shared == "record" else f"in {again.run_dir}"
    assert f"found another server {what}; expected none" in refused.stderr
    assert "surrogate  starting" not in refused.stdout


def test_an_adapter_is_evicted_under_the_running_engine_and_its_session_goes_back(
    again: Running, keys: list[str]
) -> None:
    again.until("training", "SWITCHED", key=keys[0])
    name = again.session("training", keys[0])["adapter"]
    root = ["--root", str(again.run_dir / "adapters")]
    assert f'"name": "{name}"' in soma("adapters", "ls", "--json", *root).stdout
    assert soma("adapters", "verify", name, *root).returncode == 0
    assert "running server" in soma("adapters", "rm", name, "--offline", *root).stderr
    removed = soma("adapters", "rm", name, "--url", again.root)
    assert removed.stdout == f"removed    {name}\n", removed.stderr
    assert again.session("training", keys[0])["phase"] == "ROLLED_BACK"
    assert soma("adapters", "show", name, *root).returncode == 1
    assert "soma_adapters_retired_total" in again.get("/metrics").text


def test_a_body_that_is_too_large_is_refused(again: Running, keys: list[str]) -> None:
    body = b'{"model": "soma", "messages": "' + b"x" * (17 << 20) + b'"}'
    answer = httpx.post(
        f"{again.root}/v1/chat/completions", content=body, headers=_bearer(keys[0]), timeout=GUARD_S
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_text_completions_are_answered_by_the_original_or_by_whom_they_name(
    again: Running, keys: list[str]
) -> None:
    for model, engine in (("soma", "original"), ("tiny-surrogate", "surrogate")):
        raw = again.client(keys[0]).completions.with_raw_response.create(model=model, prompt="A", max_tokens=4)
        assert raw.headers["X-SOMA-Engine"] == engine
        assert raw.parse().usage.completion_tokens > 0


def test_several_choices_and_log_probabilities_come_through(again: Running, keys: list[str]) -> None:
    reply = again.client(keys[0]).chat.completions.create(
        model="soma",
        messages=[{"role": "user", "content": "hello"}],
        n=2,
        logprobs=True,
        top_logprobs=2,
        max_tokens=4,
        temperature=1.0,
        seed=1,
    )
    assert len(reply.choices) == 2
    assert all(len(choice.logprobs.content[0].top_logprobs) == 2 for choice in reply.choices)


def test_a_dialogue_goes_on_from_a_response_and_is_one_session(again: Running, keys: list[str]) -> None:
    client = again.client(keys[0])
    first = client.responses.create(model="soma", input="hello", max_output_tokens=8)
    raw = client.responses.with_raw_response.create(
        model="soma", input="and then", previous_response_id=first.id, max_output_tokens=8
    )
    assert raw.parse().previous_response_id == first.id
    assert len(again.session(raw.headers["X-SOMA-Session"], keys[0])["turns"]) == 2
    with pytest.raises(openai.NotFoundError):
        again.client(keys[1]).responses.create(model="soma", input="x", previous_response_id=first.id)
    events = list(client.responses.create(model="soma", input="hello", max_output_tokens=8, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")
