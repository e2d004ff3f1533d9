"""The client against a small real HTTP server that speaks OpenAI's stream and the session report."""

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from openai import AsyncOpenAI
from support.guard import GUARD_S

from soma_vllm.engines.child_process import ChildProcess
from soma_vllm.errors import EngineUnavailable
from soma_vllm.tools.replay.child_server import run_server, serve_command, while_alive
from soma_vllm.tools.replay.client import Player
from soma_vllm.tools.replay.dialogues import Script
from soma_vllm.tools.replay.pace import Expected, Rules, Timekeeper
from soma_vllm.tools.replay.replay_view import SessionRecord

WARM = 2
"""Turns the fake's original answers."""


@dataclass
class FakeSoma:
    """Answers `reply <n>` to turn n: first as the original, later as a surrogate with an adapter."""

    url: str = ""
    requests: list[tuple[Mapping[str, str], dict[str, Any]]] = field(default_factory=list)
    reports: int = 0
    adapting: int = 0
    """Reports that still say ADAPTING."""
    busy: int = 0
    """Reports that still say idle: false."""
    warming: bool = False
    """Whether sessions never leave their warm start."""
    holds_verdict_of: str | None = None
    """Dialogue that is adapting until others are over."""
    breaks_at: int | None = None
    """Turn whose stream ends before its finish_reason."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append((request.headers, body))
        turn = sum(message["role"] == "user" for message in body["messages"])
        switched = turn > WARM
        headers = {
            "Content-Type": "text/event-stream",
            "X-SOMA-Session": request.headers["X-Session-ID"],
            "X-SOMA-Engine": "surrogate" if switched else "original",
            "X-SOMA-Adapter": "lora-1" if switched else "",
            "X-SOMA-Phase": "SWITCHED" if switched else "WARM_START",
            "X-SOMA-Reason": f"turn {turn}",
        }
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for piece in ("reply ", str(turn)):
            await response.write(event([{"index": 0, "delta": {"content": piece}, "finish_reason": None}]))
        if turn != self.breaks_at:
            await response.write(event([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
        usage = {"prompt_tokens": 10 * turn, "completion_tokens": 2, "total_tokens": 10 * turn + 2}
        await response.write(event([], usage | {"prompt_tokens_details": {"cached_tokens": turn}}))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def report(self, request: web.Request) -> web.Response:
        self.reports += 1
        self.adapting, adapting = max(self.adapting - 1, 0), self.adapting > 0
        if (held := self.holds_verdict_of) and request.match_info["session"].startswith(held):
            others = [headers for headers, _ in self.requests if not headers["X-Session-ID"].startswith(held)]
            adapting = len(others) < 3
        phase = "WARM_START" if self.warming else "ADAPTING" if adapting else "SWITCHED"
        self.busy, busy = max(self.busy - 1, 0), self.busy > 0
        return web.json_response(
            {
                "session": request.match_info["session"],
                "phase": phase,
                "adapter": "lora-1",
                "turns": [{"turn": WARM + 1, "gap": 0.125, "prompt_tokens": 31, "latency_s": 99.0}],
                "events": [
                    {"kind": "switched", "at": 1.0, "data": {}},
                    {"kind": "novel", "at": 2.0, "data": {}},
                ],
                "training": {"mining_s": 1.0, "finetune_s": 2.0, "steps": 3, "hardness": {"1": 0.5}},
                "idle": not busy,
            }
        )


def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "soma", "choices": choices}
    return f"data: {json.dumps(chunk | {'usage': usage})}\n\n".encode()


@pytest.fixture
async def soma() -> AsyncIterator[FakeSoma]:
    fake = FakeSoma()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", fake.chat)
    app.router.add_get("/soma/sessions/{session}", fake.report)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


async def played(
    soma: FakeSoma, script: Script, timekeeper: Timekeeper | None = None
) -> dict[str, SessionRecord]:
    async with AsyncOpenAI(base_url=f"{soma.url}/v1", api_key="key-1") as client:
        player = Player(client, soma.url, script, lambda _: None, timekeeper)
        await player.play()
    return player.sessions


async def test_the_history_grows_by_each_answer_the_client_got(soma: FakeSoma) -> None:
    await played(soma, Script({"a": ("one", "two", "three")}))
    contents = [[message["content"] for message in body["messages"]] for _, body in soma.requests]
    assert contents == [
        ["one"],
        ["one", "reply 1", "two"],
        ["one", "reply 1", "two", "reply 2", "three"],
    ]


async def test_every_request_names_its_session_and_streams_with_usage(soma: FakeSoma) -> None:
    sessions = await played(soma, Script({"a": ("one", "two"), "b": ("one",)}, max_tokens=48))
    ids = {headers["X-Session-ID"] for headers, _ in soma.requests}
    assert ids == {sessions["a"].session, sessions["b"].session}
    assert all(session.session.startswith(f"{name}-") for name, session in sessions.items())
    for headers, body in soma.requests:
        assert headers["Authorization"] == "Bearer key-1"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("soma", 0, 48)
        assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


async def test_only_forced_dialogues_ask_for_the_adapter(soma: FakeSoma) -> None:
    await played(soma, Script({"a": ("one",), "b": ("one",)}, forced=frozenset({"b"})))
    forced = {headers["X-Session-ID"][0]: headers.get("X-SOMA-Force") for headers, _ in soma.requests}
    assert forced == {"a": None, "b": "adapter"}


async def test_turns_hold_the_headers_the_usage_and_what_the_server_adds(soma: FakeSoma) -> None:
    record = (await played(soma, Script({"a": ("one", "two", "three")})))["a"]
    first, _, third = record.turns
    assert (first.answer, first.engine, first.adapter, first.phase) == (
        "reply 1",
        "original",
        None,
        "WARM_START",
    )
    assert (first.prompt_tokens, first.cached_tokens, first.completion_tokens) == (10, 1, 2)
    assert first.gap is None
    assert first.ttft_s is not None
    assert 0 < first.ttft_s <= first.latency_s < 99.0
    assert (third.engine, third.adapter, third.reason) == ("surrogate", "lora-1", "turn 3")
    assert (third.gap, third.prompt_tokens) == (0.125, 31)
    assert third.latency_s < 99.0
    assert [event["kind"] for event in record.events] == ["switched", "novel"]
    assert record.training is not None
    assert record.training["steps"] == 3


async def test_the_user_reads_until_the_session_is_no_longer_adapting(soma: FakeSoma) -> None:
    soma.adapting = 3
    phases: list[str] = []
    async with AsyncOpenAI(base_url=f"{soma.url}/v1", api_key="none") as client:
        script = Script({"a": ("one", "two", "three")}, warm_window=2, awaits_verdicts=True, poll_s=0.01)
        await Player(client, soma.url, script, lambda record: phases.append(record.phase)).play()
    assert soma.adapting == 0
    assert phases.count("ADAPTING") == 3


async def test_a_wait_ends_when_nothing_happens_for_much_longer_than_anything_took(soma: FakeSoma) -> None:
    soma.adapting = 10**6
    script = Script({"a": ("one", "two", "three")}, warm_window=2, awaits_verdicts=True, poll_s=0.001)
    ticks = itertools.count(step=50.0)
    expected = Expected(original_s=10.0, surrogate_s=2.0, training_s=100.0)
    watch = Timekeeper(Rules(2), expected, clock=lambda: next(ticks))
    record = (await played(soma, script, watch))["a"]
    assert len(record.turns) == 3
    assert record.given_up == "gave up waiting for its verdict: nothing happened for 100 s"
    assert soma.adapting > 10**5


async def test_a_session_that_stays_in_its_warm_start_is_not_waited_for(soma: FakeSoma) -> None:
    soma.warming = True
    script = Script({"a": ("one", "two", "three")}, warm_window=2, awaits_verdicts=True, poll_s=3600.0)
    assert len((await played(soma, script))["a"].turns) == 3


async def test_a_lane_is_free_while_its_user_waits_for_a_verdict(soma: FakeSoma) -> None:
    soma.holds_verdict_of = "a"
    script = Script(
        {"a": ("one", "two", "three"), "b": ("one", "two", "three")},
        warm_window=2,
        awaits_verdicts=True,
        poll_s=0.001,
    )
    await played(soma, script)
    asked = [headers["X-Session-ID"][0] for headers, _ in soma.requests]
    assert asked == ["a", "a", "b", "b", "b", "a"]


async def test_a_dialogue_left_waiting_begins_once_others_turn_out_to_be_quick(soma: FakeSoma) -> None:
    watch = Timekeeper(Rules(2), Expected(600.0, 600.0, 1.0), deadline=700.0, always=["a"], clock=lambda: 0.0)
    sessions = await played(soma, Script({"b": ("one",) * 3, "a": ("one",) * 3}, concurrency=2), watch)
    assert {name: len(session.turns) for name, session in sessions.items()} == {"a": 3, "b": 3}


async def test_a_spare_dialogue_is_played_where_there_is_time_and_else_counts_for_nothing(
    soma: FakeSoma,
) -> None:
    script = Script({"a": ("one", "two"), "b": ("one",)}, spare=frozenset({"b"}))
    expected = Expected(10.0, 10.0, 1.0)
    timely = Timekeeper(Rules(2), expected, deadline=1.0, always=["a"], clock=lambda: 0.0)
    sessions = await played(soma, script, timely)
    assert [len(session.turns) for session in sessions.values()] == [2, 1]
    assert not sessions["b"].left_out
    late = Timekeeper(Rules(2), expected, deadline=0.0, always=["a"], clock=lambda: 1.0)
    sessions = await played(soma, script, late)
    assert [len(session.turns) for session in sessions.values()] == [2, 0]
    assert sessions["b"].left_out


async def test_after_the_deadline_only_what_is_always_played_begins(soma: FakeSoma) -> None:
    watch = Timekeeper(Rules(2), Expected(1.0, 1.0, 1.0), deadline=0.0, always=["b"], clock=lambda: 1.0)
    sessions = await played(soma, Script({"a": ("one",), "b": ("one", "two")}), watch)
    assert {name: session.left_out for name, session in sessions.items()} == {"a": True, "b": False}
    assert {name: len(session.turns) for name, session in sessions.items()} == {"a": 0, "b": 2}


async def test_the_end_of_a_dialogue_waits_for_audits(soma: FakeSoma) -> None:
    soma.busy = 4
    await played(soma, Script({"a": ("one",)}, poll_s=0.01))
    assert soma.reports == 5


async def test_a_stream_that_breaks_ends_its_dialogue_and_no_other(soma: FakeSoma) -> None:
    soma.breaks_at = 2
    sessions = await played(soma, Script({"a": ("one", "two", "three"), "b": ("one",)}))
    assert len(sessions["a"].turns) == 1
    assert "the stream of turn 2 ended before its finish_reason" in str(sessions["a"].error)
    assert (len(sessions["b"].turns), sessions["b"].error) == (1, None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def test_a_started_server_is_ready_in_the_block_and_ended_after_it() -> None:
    port, lines = free_port(), list[str]()
    command = [sys.executable, "-c", SERVER, str(port)]
    async with run_server(command, f"http://127.0.0.1:{port}", GUARD_S, lines.append) as process:
        assert process.alive()
        with pytest.raises(EngineUnavailable, match="found a server at"):
            async with run_server(command, f"http://127.0.0.1:{port}", GUARD_S, lines.append):
                pass
    assert process.returncode == -15
    assert "listening" in lines


async def test_a_server_that_ends_before_it_is_ready_is_reported_with_its_status() -> None:
    lines: list[str] = []
    command = [sys.executable, "-c", "print('no model'); raise SystemExit(3)"]
    with pytest.raises(EngineUnavailable, match="ended with status 3 before it was ready"):
        async with run_server(command, f"http://127.0.0.1:{free_port()}", GUARD_S, lines.append):
            pass
    assert lines == ["no model"]


async def test_a_server_that_dies_ends_the_replay(soma: FakeSoma) -> None:
    process = ChildProcess([sys.executable, "-c", "raise SystemExit(4)"])
    process.start_with(subprocess.DEVNULL)
    async with AsyncOpenAI(base_url=f"{soma.url}/v1", api_key="none") as client:
        player = Player(client, soma.url, Script({"a": ("one", "two")}, think_s=3600.0), lambda _: None)
        with pytest.raises(EngineUnavailable, match="ended with status 4 during the replay"):
            await while_alive(process, player.play())
    assert await process.stop() == 4


async def command(*arguments: str) -> tuple[int | None, str]:
    code = "import typer; from soma_vllm.tools.replay.replay import replay; typer.run(replay)"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "160"},
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    config, dialogues = tmp_path / "config.yaml", tmp_path / "dialogues.json"
    config.write_text("warm_window: 2\nadaptation: {allow_force_header: true}\n", encoding="utf-8")
    dialogues.write_text('{"a": ["one", "two", "three"], "b": ["one"]}', encoding="utf-8")
    return ["--config", str(config), "--dialogues", str(dialogues), "--out", str(tmp_path / "out")]


async def test_the_command_writes_log_and_figure_and_checks_its_expectations(
    soma: FakeSoma, files: list[str], tmp_path: Path
) -> None:
    expect = [word for name in ("switch", "adapter", "rollback") for word in ("--expect", name)]
    status, out = await command(*files, "--url", f"{soma.url}/v1", "--force-adapter", "a", *expect)
    assert status == 1
    assert "a: forced to its adapter" in out
    assert "expected rollback: found no session that was rolled back" in out
    assert "expected switch" not in out
    assert "reply 1" not in out
    assert f"look at {tmp_path}/out/timeline.png and {tmp_path}/out/soma_log.json" in out
    log = json.loads((tmp_path / "out" / "soma_log.json").read_text(encoding="utf-8"))
    assert log["config"]["warm_window"] == 2
    assert log["sessions"]["a"]["forced"] == "adapter"
    keys = "turn query answer engine adapter phase reason gap prompt_tokens cached_tokens completion_tokens"
    for session in log["sessions"].values():
        assert {"turns", "events", "training"} <= set(session)
        for turn in session["turns"]:
            assert {*keys.split(), "ttft_s", "latency_s"} <= set(turn)
    assert [turn["answer"] for turn in log["sessions"]["a"]["turns"]] == ["reply 1", "reply 2", "reply 3"]
    assert (tmp_path / "out" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["soma_log.json", "timeline.png"]


async def test_the_command_ends_well_when_its_expectations_are_met(soma: FakeSoma, files: list[str]) -> None:
    status, out = await command(*files, "--url", f"{soma.url}/v1", "--expect", "switch", "--only", "a")
    assert status == 0, out


async def test_a_server_started_by_the_command_has_its_overrides_and_is_heard(
    files: list[str], tmp_path: Path
) -> None:
    overrides = ["--set", f"server.port={free_port()}", "--set", "original.url=http://127.0.0.1:1/v1"]
    status, out = await command(*files, *overrides)
    assert status == 1
    assert "server | " in out
    assert "original.name: found null; expected the model's name at original.url" in out
    assert "the replay ended early: soma-serve ended with status 1 before it was ready" in out
    assert f"look at {tmp_path}/out/soma_log.json" in out


def test_a_server_is_started_with_the_configuration_and_every_override() -> None:
    line = serve_command(Path("demo.yaml"), ["server.port=8100", "warm_window=2"])
    arguments = ["--config", "demo.yaml", "--set", "server.port=8100", "--set", "warm_window=2"]
    assert line == [sys.executable, "-m", "soma_vllm.app.serve", *arguments]


async def test_the_command_refuses_wrong_input_before_anything_starts(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("warm_windows: 2\n", encoding="utf-8")
    (tmp_path / "dialogues.json").write_text('{"a": []}', encoding="utf-8")
    status, out = await command(*files)
    assert status == 2
    assert "warm_windows: unknown key" in out
    assert "a: found an empty list; expected a list of user turns" in out
    assert not (tmp_path / "out").exists()
