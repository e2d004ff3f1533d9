"""examples/chat.py, and README.md's client, against a server that speaks OpenAI's chat format on loopback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from support.guard import GUARD_S
from support.server import ROOT

EXAMPLE = ROOT / "examples" / "chat.py"


class Handler(BaseHTTPRequestHandler):
    """Answers as soma-serve does: an event stream, and headers that say who answered."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        self.server.requests.append((self.path, self.headers, body))
        if self.server.refusal is not None:
            content = json.dumps({"error": {"message": self.server.refusal, "type": "invalid"}}).encode()
            self._send(401, "application/json", content)
            return
        turn = (len(body["messages"]) + 1) // 2
        told = {"Engine": "surrogate", "Phase": "SWITCHED", "Reason": f"turn {turn}"}
        if not body.get("stream"):
            message = {"role": "assistant", "content": f"Answer {turn}"}
            content = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
            self._send(200, "application/json", content, **told)
            return
        events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in ("Answer", f" {turn}")]
        lines = [*(json.dumps(event) for event in [*events, {"choices": []}]), "[DONE]"]
        content = "".join(f"data: {line}\n\n" for line in lines).encode()
        self._send(
            200, "text/event-stream", content, Engine="surrogate", Phase="SWITCHED", Reason=f"turn {turn}"
        )

    def _send(self, status: int, kind: str, content: bytes, **told: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in told.items():
            self.send_header(f"X-SOMA-{name}", value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is logged."""


class Server(ThreadingHTTPServer):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, Message, dict[str, Any]]] = []
        self.refusal: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def chat(said: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The example, as a user starts it."""
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )


def test_each_line_is_a_turn_whose_answer_is_printed_with_what_the_headers_say(server: Server) -> None:
    done = chat("Hello\n\n  And again  \n", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "Answer 1",
        "[engine: surrogate, adapter: -, phase: SWITCHED, reason: turn 1]",
        "Answer 2",
        "[engine: surrogate, adapter: -, phase: SWITCHED, reason: turn 2]",
    ]


def test_the_history_grows_with_every_turn(server: Server) -> None:
    chat("Hello\nAnd again\n", server.url, "--session", "mine", "--api-key", "k", "--model", "soma:original")
    path, headers, body = server.requests[-1]
    assert path == "/v1/chat/completions"
    assert headers["X-Session-ID"] == "mine"
    assert headers["Authorization"] == "Bearer k"
    assert (body["model"], body["stream"]) == ("soma:original", True)
    assert body["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Answer 1"},
        {"role": "user", "content": "And again"},
    ]


def test_a_refusal_is_one_line_and_an_exit_code(server: Server) -> None:
    server.refusal = "no such key"
    done = chat("Hello\n", server.url)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no such key" in done.stderr


def test_a_server_that_is_not_there_is_one_line_and_an_exit_code(server: Server) -> None:
    nowhere = server.url.replace("/v1", "/nowhere")
    server.shutdown()
    server.server_close()
    done = chat("Hello\n", nowhere)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{nowhere}: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_client_in_the_readme_runs_as_it_stands(server: Server) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 12
    assert code.count("http://127.0.0.1:8000/v1") == 1
    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8000/v1", server.url)],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=True,
    )
    assert done.stdout.splitlines() == ["surrogate | turn 1 | Answer 1", "surrogate | turn 2 | Answer 2"]
