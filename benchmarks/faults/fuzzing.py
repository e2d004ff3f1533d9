"""Ten thousand requests that nobody means, from the language of histories that the tests play."""

from __future__ import annotations

from typing import Any

import httpx
from support.fuzzed_histories import histories
from support.fuzzing import Fuzzing, fuzzing_at

from faults.row import Row, timed
from faults.suite import Scene

REQUESTS, QUICK = 10_000, 500
OF_ONE = 20
"""Requests of one history, about."""


class Counting(Fuzzing):
    """Counts a 5xx instead of ending with it."""

    row: Row

    def send(self, method: str, path: str, key: str | None = "k", **more: Any) -> httpx.Response:
        self.row.requests += 1
        answer = self.runner.run(self.services.send(method, path, key, **more))
        if answer.status_code >= 500:
            self.row.count("needless_5xx", f"{method} {path}: {answer.status_code}")
        return answer


def fuzzing(scene: Scene) -> None:
    """Histories until there were enough requests."""
    row = scene.row("fuzzing", "histories that clients garble")
    wanted = QUICK if scene.quick else REQUESTS
    with timed(row), fuzzing_at(scene.new_folder(), Counting) as played:
        assert isinstance(played, Counting)
        played.row = row
        while row.requests < wanted:
            histories(played, (wanted - row.requests) // OF_ONE + 1)()
        inside = played.services.services
        held = sum(entry.holds for entry in inside.registry._entries.values()) + inside.leases.count()
        if held:
            row.count("leaks", "sessions or adapters held", held)
