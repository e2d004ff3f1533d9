"""`soma sessions ls` says so where the server does not know the admin key."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from soma_vllm.cli.main import app


class Listing(BaseHTTPRequestHandler):
    """A server whose admin key is `right`."""

    def do_GET(self) -> None:
        admin = self.headers["Authorization"] == "Bearer right"
        body = json.dumps({"object": "list", "data": [], "admin": admin}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Listing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("key", "noted"), [("wrong", True), ("right", False)])
def test_an_admin_key_that_the_server_does_not_know_is_told(key: str, noted: bool, url: str) -> None:
    done = CliRunner().invoke(app, ["sessions", "ls", "--url", url], env={"SOMA_ADMIN_KEY": key})
    assert done.exit_code == 0
    assert ("is not this server's admin key" in done.output) is noted
