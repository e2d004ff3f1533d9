"""Files of adapters are deleted and cut short under load, and their sessions go on."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import httpx

from faults.real import WORDS, Real, marker_server
from faults.row import Row, on_disk, timed
from faults.suite import Scene
from faults.talk import Talk
from soma_vllm.types import WEIGHTS

ROUNDS, QUICK = 4, 2


def files(scene: Scene) -> None:
    """Three adapters come and go through room for two; then the files of one go, and another's are cut."""
    real, rows = marker_server(scene), [scene.row("files", step) for step in ("deleted", "cut short")]
    with timed(*rows):
        asyncio.run(_played(real, rows, QUICK if scene.quick else ROUNDS))


async def _played(real: Real, rows: list[Row], rounds: int) -> None:
    async with real.http() as http:
        deleted, cut, whole = [
            await real.taught(http, row, f"files of {word}", word)
            for row, word in zip([*rows, rows[0]], WORDS[2:], strict=True)
        ]
        root = real.running.run_dir / "adapters"
        loading = asyncio.create_task(_load(real, http, [deleted, cut, whole], rounds))
        await asyncio.sleep(0.5)
        shutil.rmtree(await _folder(root, deleted))
        weights = (await _folder(root, cut)) / WEIGHTS
        os.truncate(weights, weights.stat().st_size // 2)
        await loading
        for talk in (deleted, cut):
            talk.row.noted[f"last answered by the {talk.engine}"] += 1
        for row in rows:
            await real.check_idle(http, row)
            await real.check_alive(http, row)
        for talk in (deleted, cut, whole):
            await talk.check_record()


async def _folder(root: Path, talk: Talk) -> Path:
    shown = await talk.shown()
    assert shown is not None
    return await asyncio.to_thread(on_disk, root, str(shown["adapter"]))


async def _load(real: Real, http: httpx.AsyncClient, talks: list[Talk], rounds: int) -> None:
    others = await real.teach_two(http, talks[0].row)
    for number in range(rounds):
        await asyncio.gather(*(talk.say("all together", stream=number % 2 == 0) for talk in [*talks, *others]))
        for talk in talks:
            await talk.say("one by one")
