"""A second server on one record: it is refused, and the first one does not notice."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from support.server import free_port

from faults.real import Real, marker_server
from faults.row import Row, timed
from faults.suite import Scene


def servers(scene: Scene) -> None:
    """Another soma-serve over the same database and the same adapters, while dialogues go on."""
    real, row = marker_server(scene), scene.row("two servers", "on one record")
    with timed(row):
        asyncio.run(_played(real, row))


async def _played(real: Real, row: Row) -> None:
    async with real.http() as http:
        talks = await real.teach_two(http, row)
        run_dir = real.running.run_dir
        elsewhere = {
            "storage.url": f"sqlite+aiosqlite:///{run_dir}/sessions.db",
            "adapters.root": f"{run_dir}/adapters",
            "server.run_dir": f"{run_dir.parent}/second",
            "server.port": free_port(),
        }
        options = [part for key, value in elsewhere.items() for part in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "soma_vllm.app.serve", "--config", str(run_dir.parent / "config.yaml")]
        second = asyncio.create_task(
            asyncio.to_thread(subprocess.run, [*command, *options], capture_output=True, text=True, check=False)
        )
        while not second.done():
            await asyncio.gather(*(talk.say("beside another server") for talk in talks))
        refused = await second
        if refused.returncode != 1 or "found another server on this record" not in refused.stderr:
            raise AssertionError(f"ended with {refused.returncode}: {refused.stderr[-200:]}")
        await real.check_idle(http, row)
        await real.check_alive(http, row)
        for talk in talks:
            await talk.check_record()
