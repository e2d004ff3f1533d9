"""Keeping the terminal for people: what engines and libraries print goes to a log file instead.

vLLM, Ray and torch write from C++ and from child processes, so file descriptors are redirected, not streams.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def output_to(log: Path) -> Iterator[TextIO]:
    """Send stdout and stderr of this process and its children to `log`; yields the terminal.

    After an error both are the terminal again; after success they stay with the log, for what libraries
    print while the interpreter ends.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with log.open("ab") as file, os.fdopen(os.dup(1), "w", buffering=1) as terminal:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield terminal
        except BaseException:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, descriptor)
            raise
        finally:
            for saved in kept:
                os.close(saved)


def log_as_configured(level: str) -> None:
    """Write what soma_vllm logs to stderr, from a level on, whatever other packages make of the root logger.

    Ray raises its level in the process that starts it.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
    ours = logging.getLogger("soma_vllm")
    ours.handlers[:] = [handler]
    ours.setLevel(level.upper())
    ours.propagate = False
