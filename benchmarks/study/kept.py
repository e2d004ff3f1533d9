"""Blocks kept on disk, so that a run goes on where it ended.

Guarantees: a block is written in one step, once it is complete; it is taken up only by a run whose inputs are
the same: dialogues, arrivals, policies, configuration, limits, cores, and the program's own source. The files
hold answers, since gaps are taken between arms; only their owner may read them, and the report holds none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import soma_vllm
from study.client import Answered, Played
from study.meter import Numbers, Reading
from study.plan import Block

PLAYING = ("client.py", "connections.py", "meter.py", "server.py")
"""Files of the study that what is kept depends on; statistics may change afterwards."""


@cache
def source_digest() -> str:
    """SHA-256 over the package and what plays."""
    package, here = Path(soma_vllm.__file__).parent, Path(__file__).parent
    total = hashlib.sha256()
    for path in (
        *sorted((*package.rglob("*.py"), *package.rglob("*.cpp"))),
        *(here / name for name in PLAYING),
    ):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def inputs(block: Block, settings: Mapping[str, Any]) -> str:
    """Digest of all that a block's numbers depend on; its sessions' ids are not among it."""
    visits = [[one.dialogue, one.turns, one.arrives_s, one.thinks_s, one.policies] for one in block.visits]
    document = [block.repeat, block.arm, visits, settings, source_digest()]
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


class Kept:
    """A folder of blocks."""

    def __init__(self, folder: Path | None) -> None:
        """None keeps nothing."""
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def read(self, key: str) -> dict[str, Any] | None:
        """What was kept under a digest."""
        path = None if self._folder is None else self._folder / f"{key}.json"
        if path is None or not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def write(self, key: str, document: Mapping[str, Any]) -> None:
        """Keep something, in one step."""
        if self._folder is None:
            return
        draft = self._folder / f".{key}.{os.getpid()}"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._folder / f"{key}.json")


def written(played: list[Played], wall_s: float, reading: Reading, idling: Numbers) -> dict[str, Any]:
    """A block that was played, as it is kept."""
    return {
        "wall_s": wall_s,
        "idling": idling,
        "reading": asdict(reading),
        "sessions": [
            {
                "turns": [asdict(turn) for turn in one.turns],
                "events": [dict(event) for event in one.events],
                "error": one.error,
            }
            for one in played
        ],
    }


def played(document: Mapping[str, Any], block: Block) -> tuple[list[Played], float, Reading, Numbers]:
    """(sessions, seconds, reading, idling) as `written` was given them."""
    sessions = [
        Played(
            visit,
            tuple(Answered(**turn) for turn in one["turns"]),
            tuple(one["events"]),
            one["error"],
        )
        for visit, one in zip(block.visits, document["sessions"], strict=True)
    ]
    return sessions, document["wall_s"], Reading(**document["reading"]), document["idling"]
