"""What is held in memory: bytes of a live session and of a stream under way, measured.

Sessions are recorded through the registry over SQLite, as a server records them, each with `--turns` turns of
`--words` words a question and an answer, and stay live; the growth of this process's resident memory is divided
by their number. Streams are `--streams` observed streams of `--events` events each, of which the client has
read all but the last.

    python benchmarks/memory.py [--sessions 10000] [--turns 20] [--words 12] [--memory-mib 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from soma_vllm.config import parse_config
from soma_vllm.engines.reply_parser import ParsedReply, observe_stream
from soma_vllm.engines.stream_tap import StreamTap
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.transcript import read, spoken
from soma_vllm.sessions.state.turn import Turn, turn_event
from soma_vllm.types import Message, Role, SessionKey, Usage

MIB = 1024 * 1024


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    with Path("/proc/self/status").open(encoding="ascii") as status:
        (kib,) = (line.split()[1] for line in status if line.startswith("VmRSS:"))
    return int(kib) * 1024


def words(count: int, seed: str) -> str:
    """So many words of seven letters, other ones for each seed."""
    return " ".join(f"{abs(hash((seed, number))) % 10**7:07d}" for number in range(count))


def turn_of(tenant: str, history: list[Message], number: int, count: int, name: str) -> Turn:
    """The next turn of a dialogue, which grows by it."""
    history.append({"role": "user", "content": words(count, f"{name} {number} asked")})
    digest, answer = read(tenant, tuple(history)), words(count, f"{name} {number} said")
    answered = digest.followed_by(spoken(answer, ()))
    history.append({"role": "assistant", "content": answer})
    mark = answered.marks[-1]
    return Turn(
        number=number,
        messages=(json.loads(json.dumps(history[-2])),),
        answer=answer,
        engine=Role.ORIGINAL,
        adapter=None,
        phase=Phase.WARM_START,
        reason=f"warm start {number} of 4",
        usage=Usage(100 * number, 90 * number, 3 * count),
        ttft_s=0.123 * number,
        latency_s=1.234 * number,
        most_tokens=200,
        chain=answered.asked,
        asked=digest.asked,
        links=(mark.link,),
        said=mark.answer,
        query=digest.query,
        guard=digest.guard,
    )


async def sessions(count: int, turns: int, length: int, memory_mib: int) -> tuple[int, int, int]:
    """(bytes that so many sessions take, how many of them are live, how many of these are packed)."""
    with tempfile.TemporaryDirectory() as folder:
        store = SessionStore(f"sqlite+aiosqlite:///{folder}/sessions.db")
        await store.open()
        registry = SessionRegistry(parse_config({"sessions": {"memory_mib": memory_mib}}, "benchmark"), store)
        await registry.start()
        before = 0
        for number in range(-50, count):  # the first ones fill what is filled once
            if number == 0:
                await registry.written()
                before = resident()
            key, history = SessionKey("0123456789abcdef", f"session-{number}"), list[Message]()
            await registry.open(key)
            for turn in range(1, turns + 1):
                made = turn_of(key.tenant, history, turn, length, key.session)
                registry.record(key, turn_event(made, turn - 1, time.time()))
            if number % 50 == 0:
                await registry.written()
        await registry.written()
        taken = resident() - before
        packed = sum(one.is_packed for one in registry._entries.values())
        live = registry.size
        await registry.stop()
        await store.close()
    return taken, live, packed


async def streams(count: int, events: int) -> int:
    """Bytes that so many streams under way take, each read to its last event but one."""

    async def pieces() -> AsyncIterator[str]:
        for number in range(events):
            delta = {"index": 0, "delta": {"content": f" {number:06d}"}, "finish_reason": None}
            chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", "choices": [delta]}
            yield f"data: {json.dumps(chunk)}\n\n"

    async def ended(reply: ParsedReply) -> None:
        assert reply.text

    before, open_streams = 0, list[StreamTap]()
    for number in range(-50, count):  # the first ones fill what is filled once
        if number == 0:
            before = resident()
        stream = observe_stream(pieces(), time.monotonic(), ended)  # type: ignore[arg-type]
        for _ in range(events - 1):
            await anext(stream)
        open_streams.append(stream)
    taken = resident() - before
    for stream in open_streams:
        await stream.aclose()
    return taken


async def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was found, in bytes."""
    heard = await streams(arguments.streams, arguments.events)
    taken, live, packed = await sessions(
        arguments.sessions, arguments.turns, arguments.words, arguments.memory_mib
    )
    return {
        "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
        "at": time.strftime("%Y-%m-%d"),
        "sessions": {
            "count": arguments.sessions,
            "turns": arguments.turns,
            "live": live,
            "packed": packed,
            "bytes": taken,
        },
        "streams": {"count": arguments.streams, "events": arguments.events, "bytes": heard},
    }


def main() -> None:
    """Measure, show, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    defaults = {"sessions": 10_000, "turns": 20, "words": 12, "memory-mib": 256, "streams": 500, "events": 500}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = asyncio.run(measured(arguments))
    table = Table("of", "count", "in memory", "packed", "each, bytes", "all, MiB")
    for what in ("sessions", "streams"):
        one = found[what]
        count, live = one["count"], one.get("live", one["count"])
        each, whole = f"{one['bytes'] / live:,.0f}", f"{one['bytes'] / MIB:.0f}"
        table.add_row(what, str(count), str(live), str(one.get("packed", 0)), each, whole)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
