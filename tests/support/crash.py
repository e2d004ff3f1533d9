"""Work in a child process that is killed, or refused, at its n-th change to the files below a folder.

Python tells of every change that it is about to make to a file system (audit events); those are the steps.
"""

from __future__ import annotations

import errno
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


NEEDS_SPACE = frozenset({"open", "os.mkdir", "os.rename"})

Prepare = Callable[[], Any]
Work = Callable[[Any], object]


def each_step(below: Path, prepare: Prepare, work: Work) -> Iterator[Any]:
    """Whatever `prepare` returned, after `work` on it was killed at its first step, second, ... and at none."""
    for step in count(1):
        assert step < MOST_STEPS, "work without an end"
        prepared = prepare()
        ended = _in_child(lambda: _kill_at(step, str(below)), lambda: work(prepared))  # noqa: B023 - runs at once
        yield prepared
        if ended == 0:
            assert step > 3, f"only {step - 1} steps were seen"
            return
        assert ended == -signal.SIGKILL, "the work failed by itself"


def each_refusal(below: Path, prepare: Prepare, work: Work) -> Iterator[Any]:
    """The same where the disk was full at each step that takes space; `work` raises what it may raise."""
    for step in count(1):
        assert step < MOST_STEPS, "work without an end"
        prepared = prepare()
        ended = _in_child(lambda: _refuse_at(step, str(below)), lambda: work(prepared))  # noqa: B023
        yield prepared
        assert ended in (0, REFUSED), "an error of another kind"
        if ended == 0:
            assert step > 3, f"only {step - 1} steps were seen"
            return


REFUSED = 7
"""Exit code of a child whose disk was full."""


def _in_child(arm: Callable[[], object], work: Callable[[], object]) -> int:
    """The exit code of a child that works; minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            arm()
            work()
            status = REFUSED if _was_refused else 0
        finally:
            os._exit(status)
    _, found = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(found)


_was_refused: list[str] = []


def _kill_at(step: int, below: str) -> None:
    _watch(step, below, CHANGES | {"open"}, lambda event: os.kill(os.getpid(), signal.SIGKILL))


def _refuse_at(step: int, below: str) -> None:
    def refuse(event: str) -> None:
        _was_refused.append(event)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _watch(step, below, NEEDS_SPACE, refuse)


def _watch(step: int, below: str, events: frozenset[str], then: Callable[[str], object]) -> None:
    left = step

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in events and _changes(event, arguments, below):
            left -= 1
            if left == 0:
                then(event)

    sys.addaudithook(watch)


def _changes(event: str, arguments: tuple[Any, ...], below: str) -> bool:
    if event == "open":
        path, mode, flags = arguments
        return str(path).startswith(below) and (bool(set(mode or "") & set("wxa")) or bool(flags & WRITING))
    # What rmtree deletes is named relative to an open directory.
    relative = event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None)
    return relative or str(arguments[0]).startswith(below)
