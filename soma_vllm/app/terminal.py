"""Keeping the terminal for people: what engines and libraries print goes to a log file instead.

vLLM, Ray and torch write from C++ and from child processes, so file descriptors are redirected, not streams.
"""

from __future__ import annotations

import contextlib
import json
import logging.config
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from soma_vllm import logs
from soma_vllm.app import log_writer
from soma_vllm.config import Server
from soma_vllm.errors import SomaError
from soma_vllm.private import keep_private

LAST_LINES_S = 5.0
"""Longest wait for the file to hold everything, once the server has failed."""

VLLM_CONFIGURATION = "VLLM_LOGGING_CONFIG_PATH"
"""Names vLLM's, and its uvicorn's, logging configuration; child processes inherit it."""


@contextmanager
def output_to(log: Path, settings: Server) -> Iterator[TextIO]:
    """Send stdout and stderr of this process and its children to `log`, which is rotated; lines of logging go
    to the terminal's stderr too. Yields the terminal's stdout.

    After an error both are the terminal again and the file is complete; after success they stay with the log,
    for what libraries print while the interpreter ends.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    keep_private(log)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with os.fdopen(os.dup(1), "w", buffering=1) as terminal:
        writer = _start_writer(log, settings)
        try:
            yield terminal
        except BaseException as error:
            with contextlib.suppress(OSError):  # the writer may be gone
                if not isinstance(error, SomaError | KeyboardInterrupt):
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
            for descriptor, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, descriptor)
            with contextlib.suppress(subprocess.TimeoutExpired):
                writer.wait(LAST_LINES_S)
            raise
        finally:
            for saved in kept:
                os.close(saved)


def _start_writer(log: Path, settings: Server) -> subprocess.Popen[bytes]:
    """Start the process that writes `log`, and make its stdin our stdout and stderr."""
    size, backups = str(settings.log_max_bytes), str(settings.log_backups)
    writer = subprocess.Popen(
        [sys.executable, "-I", "-S", log_writer.__file__, str(log), size, backups, settings.log_format],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the server
    )
    assert writer.stdin is not None
    with writer.stdin as pipe:
        for descriptor in (1, 2):
            os.dup2(pipe.fileno(), descriptor)
    return writer


def log_as_configured(settings: Server, run_dir: Path) -> None:
    """Have this process, and vLLM and uvicorn in it and in its children, log to stderr in one format.

    A logging configuration that the environment names for vLLM stays vLLM's.
    """
    configuration = logs.configuration(settings.log_format, settings.log_level)
    path = run_dir / "logging.json"
    path.write_text(json.dumps(configuration, indent=1))
    os.environ.setdefault(VLLM_CONFIGURATION, str(path))
    logging.config.dictConfig(configuration)
