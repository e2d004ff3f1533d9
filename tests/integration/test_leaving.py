"""A client that leaves stops the generation on whichever engine runs it, by the engine's own count."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from support.guard import GUARD_S
from support.server import Running, engine_metric

CHOICES, TOKENS = 8, 1500
"""What is asked for, and its length; whoever leaves early gets a part of it. Many choices make it last for
seconds even on a tiny model."""


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("engine", ["original", "surrogate"])
async def test_a_client_that_leaves_stops_the_generation(
    tiny_server: Running, engine: str, stream: bool
) -> None:
    # On busy cores an engine may be done before its first words reach the client; another try shows it.
    for attempt in range(8):
        session = f"left-{engine}-{stream}-{attempt}"
        before = await counted(tiny_server, engine, "vllm:generation_tokens_total")
        await ask_and_leave(tiny_server, engine, session, stream, 0.1 * 1.5**attempt)
        async with asyncio.timeout(GUARD_S):
            while await counted(tiny_server, engine, "vllm:num_requests_running") > 0:
                await asyncio.sleep(0.05)
        generated = await counted(tiny_server, engine, "vllm:generation_tokens_total") - before
        if 0 < generated < CHOICES * TOKENS * 0.8:
            if stream:
                (turn,) = tiny_server.session(session)["turns"]
                assert turn["engine"] == engine
            return
    raise AssertionError("every generation went on to its end, or never began")


async def ask_and_leave(server: Running, engine: str, session: str, stream: bool, after_s: float) -> None:
    """Leave at the first words of a stream, or some time into a whole answer."""
    async with openai.AsyncOpenAI(base_url=f"{server.root}/v1", api_key="key", max_retries=0) as client:
        asked: dict[str, Any] = {
            "model": "soma",
            "messages": [{"role": "user", "content": "talk for ever"}],
            "max_tokens": TOKENS,
            "extra_headers": {"X-Session-ID": session, "X-SOMA-Policy": engine},
            "n": CHOICES,
            "extra_body": {"ignore_eos": True},
        }
        if stream:
            events = await client.chat.completions.create(**asked, stream=True)
            async for chunk in events:
                if chunk.choices[0].delta.content:
                    break
            await events.close()
            return
        waiting = asyncio.create_task(client.chat.completions.create(**asked))
        # Not once the engine says that it works at it: on a busy core that may be heard when it is done.
        await asyncio.wait([waiting], timeout=after_s)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def counted(server: Running, engine: str, name: str) -> float:
    return await asyncio.to_thread(engine_metric, server, engine, name)
