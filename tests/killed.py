"""Work in a child process that is killed before its n-th change to the files below a folder."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.utime", "os.link"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MOST_STEPS = 400


def each_step(below: Path, prepare: Callable[[], Any], work: Callable[[Any], object]) -> Iterator[Any]:
    """Whatever `prepare` returned, after `work` on it was killed at its first step, second, ... and at none.

    Python tells of every change that it is about to make to a file system; those are the steps.
    """
    for step in count(1):
        assert step < MOST_STEPS, "work without an end"
        prepared = prepare()
        killed = _killed_at(step, below, lambda prepared=prepared: work(prepared))  # type: ignore[misc]
        yield prepared
        if not killed:
            assert step > 3, f"only {step - 1} steps were seen"
            return


def _killed_at(step: int, below: Path, work: Callable[[], object]) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _arm(step, str(below))
            work()
            status = 0
        finally:
            os._exit(status)
    _, found = os.waitpid(child, 0)
    if os.WIFSIGNALED(found):
        assert os.WTERMSIG(found) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(found) == 0, "the work failed by itself"
    return False


def _arm(step: int, below: str) -> None:
    left = step

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if not _changes(event, arguments, below):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _changes(event: str, arguments: tuple[Any, ...], below: str) -> bool:
    if event == "open":
        path, mode, flags = arguments
        return str(path).startswith(below) and (bool(set(mode or "") & set("wxa")) or bool(flags & WRITING))
    # What rmtree deletes is named relative to an open directory.
    relative = event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None)
    return event in CHANGES and (relative or str(arguments[0]).startswith(below))
