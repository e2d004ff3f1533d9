"""An original that is slow, hangs, lies or is dead, while some dialogues warm up and others were switched."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from typing import Any

from support.marker_original import Handler

HANG_S = 30.0


class Moody(Handler):
    """Answers in markers; in the way that the last message asks for in brackets."""

    def answer(self, body: dict[str, Any], text: str) -> None:
        said = str(body["messages"][-1].get("content"))
        mood = said.rsplit("[", 1)[1].split("]")[0] if "[" in said else "well"
        with suppress(ConnectionError):  # the server has given this answer up
            getattr(self, f"_{mood}", super().answer)(body, text)

    def _slow(self, body: dict[str, Any], text: str) -> None:
        if not body.get("stream"):
            time.sleep(2.0)
            super().answer(body, text)
            return
        self._begin()
        for word in (text + " ").split(" ") * 3:
            self._event({"content": f"{word} "})
            time.sleep(0.3)
        self._event({}, "stop")
        self._write("data: [DONE]\n\n")

    def _hangs(self, body: dict[str, Any], text: str) -> None:
        threading.Event().wait(HANG_S)
        self.close_connection = True

    def _garbled(self, body: dict[str, Any], text: str) -> None:
        self._begin()
        self._write('data: {oops\n\ndata: [1]\n\ndata: {"choices": [null]}\n\nid: 7\n\n\xff\n\n')

    def _half(self, body: dict[str, Any], text: str) -> None:
        self._begin()
        self._event({"content": text})

    def _error(self, body: dict[str, Any], text: str) -> None:
        self._send({"error": {"message": "the model is overloaded", "type": "server_error", "code": 500}})

    def _empty(self, body: dict[str, Any], text: str) -> None:
        self._send({"object": "chat.completion", "choices": []})

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def _event(self, delta: dict[str, str], finish: str | None = None) -> None:
        chunk: dict[str, Any] = {"id": "1", "created": 0, "model": "markers", "object": "chat.completion.chunk"}
        chunk["choices"] = [{"index": 0, "delta": delta, "finish_reason": finish}]
        self._write(f"data: {json.dumps(chunk)}\n\n")

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode("latin-1"))
        self.wfile.flush()
