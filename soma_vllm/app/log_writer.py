"""The process that writes a server's log: its stdin is the stdout and stderr of the server and its children.

vLLM, Ray and torch print from C++ and from child processes, so logging in the server alone cannot rotate the
file; and a thread of the server could not read the pipe while an extension that holds Python's lock fills it.

Guarantees: every line goes to the file, which is rotated by its size; lines of logging go to stderr too, what
else is printed does not. A file with JSON lines has nothing but JSON lines. Neither a full disk nor a closed
stderr ends it, and a stderr that is not read loses lines and holds nothing up. It ends with the last process
that can write to it, and so has a crash's last words.

Run as a script, by its path: it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterable
from typing import IO

LOGGED = {
    "text": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ [A-Z]+ "),
    "json": re.compile(r'\{"time": "'),
}
"""How a line of logging begins (`soma_vllm.logs`)."""

INDENT = "    "
"""How the further lines of a record in text begin."""


class RotatedFile(logging.handlers.RotatingFileHandler):
    """A file of lines. `backups` older ones stay beside it; 0 bytes: it is never rotated."""

    def __init__(self, path: str, max_bytes: int, backups: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=backups, encoding="utf-8", errors="replace")

    def write(self, line: str) -> None:
        """Append a line; one that the disk has no room for is lost."""
        self.emit(logging.LogRecord("", logging.INFO, "", 0, line, None, None))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Nothing: there is no place to report it."""


class Screen:
    """Where people watch. Nothing waits for it: a line that it does not take at once is lost, or cut off."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._cut = False
        """The last line lacks its end."""
        self._gone = False

    def write(self, line: str) -> None:
        """Show a line."""
        text = f"{chr(10) if self._cut else ''}{line}\n".encode("utf-8", "replace")
        try:
            # As much as a pipe takes in one piece where it is ready: no write blocks.
            while text and not self._gone and select.select([], [self._stream], [], 0)[1]:
                text = text[os.write(self._stream.fileno(), text[: select.PIPE_BUF]) :]
                self._cut = bool(text)
        except OSError:
            self._gone = True


def write_all(source: Iterable[str], file: RotatedFile, stream: IO[str], log_format: str) -> None:
    """Copy lines until the source ends."""
    logged, screen = False, Screen(stream)
    for raw in source:
        line = raw.rstrip("\r\n").rpartition("\r")[2]  # of a progress bar what is seen last
        if LOGGED[log_format].match(line) is not None:
            logged = True
        elif log_format == "json" or not line.startswith(INDENT):
            logged = False
        if log_format == "json" and not logged:
            line = _as_json(line)
        file.write(line)
        if logged:
            screen.write(line)


def _as_json(printed: str) -> str:
    """A line that was printed and not logged, as a record."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"time": now, "level": "INFO", "logger": "output", "message": printed})


def main() -> None:
    """Arguments: the file, its largest size in bytes, the number of older files, the format."""
    # Told to stop together with the server, it still has the server's last lines to write.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    path, max_bytes, backups, log_format = sys.argv[1:]
    for stream in (sys.stdin, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    write_all(sys.stdin, RotatedFile(path, int(max_bytes), int(backups)), sys.stderr, log_format)


if __name__ == "__main__":
    main()
