"""A private PostgreSQL server on a Unix socket, for tests: it can be stopped and started, as in an outage.

Guarantees: it listens on no port, keeps everything in one temporary folder, and is gone when the block ends. As
root it runs as another user, because PostgreSQL refuses root.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from support.guard import GUARD_S

PACKAGE = "postgresql"
QUICK = ("fsync=off", "full_page_writes=off", "shared_buffers=16MB")
"""A commit survives the end of the server, not of the machine."""


def binaries() -> Path | None:
    """The folder of PostgreSQL's programs, the newest that Debian's package installed, or that of PATH."""
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = shutil.which("initdb")
    initdb = packaged[-1] if packaged else found and Path(found).resolve()
    return Path(initdb).parent if initdb else None


class Postgres:
    """The server: running inside a `with` block, except between `stop` and `start`."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="soma-pg-"))  # short: a socket's path has at most 107 bytes
        self._data = self._folder / "data"
        self._as = _unprivileged()
        self._server: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()

    def __enter__(self) -> Postgres:
        try:
            if self._as:
                shutil.chown(self._folder, self._as["user"], self._as["group"])
            self._run("initdb", "-D", self._data, "-U", "soma", "-A", "trust", "-E", "UTF8", "--no-sync")
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(clean=False)
        shutil.rmtree(self._folder)

    def start(self) -> None:
        """Return when it takes connections."""
        settings = [f"-c{name}" for name in QUICK]
        command = [self._programs / "postgres", "-D", self._data, "-k", self._folder, "-h", "", *settings]
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, **self._as)
        until = time.monotonic() + GUARD_S
        while not self._takes_connections():
            if self._server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"PostgreSQL did not start:\n{(self._folder / 'log').read_text()}")
            time.sleep(0.05)

    def stop(self, clean: bool = True) -> None:
        """End it and every connection to it at once; not `clean`: as `pg_ctl stop -m immediate` does."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT if clean else signal.SIGQUIT)
            self._server.wait()
            self._server = None

    def new_database(self) -> str:
        """The URL of an empty database of its own."""
        name = f"d{next(self._numbers)}"
        self._run("createdb", "-h", self._folder, "-U", "soma", name)
        return self.url(name)

    def url(self, database: str) -> str:
        """The URL of a database, there or not."""
        return f"postgresql+asyncpg://soma@/{database}?host={self._folder}"

    def _takes_connections(self) -> bool:
        asked = [self._programs / "pg_isready", "-q", "-h", self._folder, "-U", "soma", "-d", "postgres"]
        return subprocess.run(asked, check=False).returncode == 0

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._programs / program), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self._folder, **self._as
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr}")


def _unprivileged() -> dict[str, Any]:
    """What makes a child run as another user, where this process is root."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}
