"""The gate's judge of two answers off the event loop.

Guarantee: whatever a judge raises is a failure of its pairs, which pass no gate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from soma_vllm.method.gap.gap_judge import GapJudge, Pair
from soma_vllm.types import Gap

logger = logging.getLogger(__name__)


class Judge(Protocol):
    """Tells how far two answers are apart, off the event loop."""

    async def gaps(self, pairs: Sequence[Pair]) -> list[Gap]:
        """The gap of each pair, in order."""
        ...


class ThreadedJudge:
    """Runs a blocking judge on one thread of its own."""

    def __init__(self, judge: GapJudge) -> None:
        self._judge = judge
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="soma-judge")

    async def gaps(self, pairs: Sequence[Pair]) -> list[Gap]:
        """The gap of each pair, in order."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._judged, pairs)

    def _judged(self, pairs: Sequence[Pair]) -> list[Gap]:
        try:
            return self._judge.gaps(pairs)
        except Exception as error:  # its words may quote the answers
            logger.error("the gate's judge failed on %d pairs: %s", len(pairs), type(error).__name__)
            return [Gap(1.0, failure=type(error).__name__) for _ in pairs]

    def close(self) -> None:
        """End the thread once it has judged its pairs; nothing waits for that."""
        self._thread.shutdown(wait=False, cancel_futures=True)
