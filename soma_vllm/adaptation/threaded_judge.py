"""The gate's judge of two answers off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from soma_vllm.method.gap.gap_judge import GapJudge, Pair
from soma_vllm.types import Gap


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
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._judge.gaps, pairs)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
