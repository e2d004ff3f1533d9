"""How long a test waits: until what it waits for has come.

Guarantees: a test that waits here does not depend on how fast the machine is. Waits are for events; `GUARD_S`
only ends one for what never comes, and is many times longer than anything takes on two slow, busy cores.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

GUARD_S = 900.0
"""After this something hangs."""


def until(true: Callable[[], bool], poll_s: float = 0.05) -> None:
    """Return once a condition holds."""
    deadline = time.monotonic() + GUARD_S
    while not true():
        assert time.monotonic() < deadline, "what was waited for has not come"
        time.sleep(poll_s)


async def eventually(true: Callable[[], bool], poll_s: float = 0.005) -> None:
    """The same on an event loop."""
    async with asyncio.timeout(GUARD_S):
        while not true():
            await asyncio.sleep(poll_s)
