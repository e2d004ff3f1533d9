"""An OpenAI-compatible endpoint of someone else, as far as HTTP can tell: it answers with the marker that the
dialogue's first message names. It is what lets a test teach two sessions two different things.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "markers", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        marker = body["messages"][0]["content"].split()[-1]
        self.answer(body, " ".join([marker] * 4))

    def answer(self, body: dict[str, Any], text: str) -> None:
        """Answer with a text, as the body asks for it."""
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            self._send({"object": "chat.completion", "choices": [{"index": 0, "message": message}]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        chunk = {"id": "1", "created": 0, "model": "markers", "object": "chat.completion.chunk"}
        chunk["choices"] = [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]
        self.wfile.write(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class MarkerOriginal:
    """The endpoint, on a loopback port (0: a free one), for the length of a `with`."""

    def __init__(self, handler: type[Handler] = Handler, port: int = 0) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
