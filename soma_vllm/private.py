"""What other users and processes of this machine must not see: files, and secrets in the environment.

Guarantees: a secret that was withheld is in no environment that a child inherits, and `secret` still reads it;
`masked` takes the password out of every URL in a text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE_FILE, PRIVATE_FOLDER, PRIVATE_UMASK = 0o600, 0o700, 0o077

HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
OPENAI_KEY = "OPENAI_API_KEY"
SECRETS = (*HUB_TOKENS, OPENAI_KEY)
"""Variables that hold secrets whatever the configuration says; it names more."""

_PASSWORD = re.compile(r"(://[^\s:/@\"]*:)[^\s/?#\"]+@")

_withheld: dict[str, str] = {}
_users_umask: int | None = None


def withhold(names: Iterable[str]) -> None:
    """Take secrets out of this process's environment, and so out of that of its children."""
    for name in names:
        if (value := os.environ.pop(name, None)) is not None:
            _withheld[name] = value


def secret(name: str) -> str | None:
    """A secret by the name of its environment variable, withheld or not; None where it is not set."""
    return os.environ.get(name) or _withheld.get(name)


def masked(text: str) -> str:
    """The text with `***` for every password in a URL."""
    return _PASSWORD.sub(r"\1***@", text)


def keep_private(file: Path) -> None:
    """Make a file that its owner alone may read, or make an existing one so; left alone where that fails."""
    with suppress(OSError):
        try:
            # Not opened where it is there: closing it would end the locks that SQLite holds on it.
            file.chmod(PRIVATE_FILE)
        except FileNotFoundError:
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, PRIVATE_FILE))


def private_from_now_on() -> None:
    """Have this process make files that its user alone may read."""
    global _users_umask
    _users_umask = os.umask(PRIVATE_UMASK)


@contextmanager
def as_the_user_has_it() -> Iterator[None]:
    """Make files with the umask that the process began with, such as those of a cache that users share."""
    if _users_umask is None:
        yield
        return
    ours = os.umask(_users_umask)
    try:
        yield
    finally:
        os.umask(ours)
