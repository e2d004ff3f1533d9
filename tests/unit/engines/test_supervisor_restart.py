"""A supervisor outlives what it cannot start: no process, no memory, no file handles left for a while."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from support.guard import eventually

from soma_vllm.engines.child_process import ChildServer
from soma_vllm.engines.supervisor import Patience, State, Supervisor

QUICK = Patience(start=5, first_delay=0.01, longest_delay=0.02, quick_deaths=50, poll=0.005, health_every=0.01)


class FakeChild:
    """A child that lives until it is told to die, and starts where the machine lets it."""

    log_path = Path("none.log")

    def __init__(self) -> None:
        self.pid: int | None = None
        self.starts = 0
        self.refusals = 0

    def start(self) -> None:
        self.starts += 1
        if self.pid is None and self.starts > 1 and self.refusals:
            self.refusals -= 1
            raise OSError(12, "Cannot allocate memory")
        self.pid = 1

    def alive(self) -> bool:
        return self.pid is not None

    async def healthy(self, timeout: float) -> bool:
        return self.alive()

    async def stop(self, grace: float) -> int:
        self.pid = None
        return 1


async def test_a_child_that_the_machine_cannot_start_is_tried_again_until_it_can() -> None:
    child = FakeChild()
    supervisor = Supervisor(cast(ChildServer, child), patience=QUICK)
    supervisor.start()
    await supervisor.wait_ready(5)
    child.refusals = 3
    child.pid = None
    await eventually(lambda: child.starts == 5 and supervisor.state is State.READY)
    assert supervisor.restarts == 4
    await supervisor.stop()
