"""The wrapper around a stream of events: what passes, and when its end is told."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from soma_vllm.engines.stream_tap import StreamTap
from soma_vllm.errors import EngineUnavailable


class Source:
    """A stream of some events that notes when it was closed."""

    def __init__(self, *events: str, broken: bool = False) -> None:
        self.log: list[str] = []
        self.events = self._stream(events, broken)

    async def _stream(self, events: tuple[str, ...], broken: bool) -> AsyncGenerator[str, None]:
        try:
            yield "begun"
            for event in events:
                yield event
            if broken:
                raise EngineUnavailable("broke")
        finally:
            self.log.append("closed")

    async def end(self) -> None:
        self.log.append("ended")


async def test_events_pass_are_changed_or_are_dropped() -> None:
    source = Source("a", "b")
    tap = StreamTap(source.events, on_event=lambda event: None if event == "a" else event.upper())
    assert [event async for event in tap] == ["BEGUN", "B"]
    assert tap.exhausted


async def test_the_end_is_told_once_after_the_stream_was_closed() -> None:
    source = Source("a")
    tap = StreamTap(source.events, on_end=source.end)
    assert [event async for event in tap] == ["begun", "a"]
    await tap.aclose()
    assert source.log == ["closed", "ended"]
    with pytest.raises(StopAsyncIteration):
        await anext(tap)


async def test_the_end_of_a_broken_stream_is_told_before_its_error_comes_out() -> None:
    source = Source(broken=True)
    tap = StreamTap(source.events, on_end=source.end)
    await anext(tap)
    with pytest.raises(EngineUnavailable):
        await anext(tap)
    assert source.log == ["closed", "ended"]
    assert not tap.exhausted


async def test_closing_a_stream_that_was_never_read_tells_its_end() -> None:
    source = Source("a")
    tap = StreamTap(source.events, on_end=source.end)
    await tap.aclose()
    assert source.log == ["ended"]
    with pytest.raises(StopAsyncIteration):
        await anext(tap)
    assert not tap.exhausted


async def test_an_error_of_the_observer_ends_the_stream() -> None:
    def refuse(event: str) -> str:
        raise EngineUnavailable(event)

    source = Source("a")
    tap = StreamTap(source.events, on_event=refuse, on_end=source.end)
    with pytest.raises(EngineUnavailable, match="begun"):
        await anext(tap)
    assert source.log == ["closed", "ended"]


async def test_the_end_is_told_where_closing_the_stream_fails() -> None:
    class Stubborn:
        def __aiter__(self) -> Stubborn:
            return self

        async def __anext__(self) -> str:
            return "a"

        async def aclose(self) -> None:
            raise EngineUnavailable("broke while closing")

    source = Source()
    tap = StreamTap(Stubborn(), on_end=source.end)
    with pytest.raises(EngineUnavailable):
        await tap.aclose()
    assert source.log == ["ended"]


async def test_a_first_event_that_was_read_already_comes_first_and_not_once_it_is_closed() -> None:
    source = Source("a")
    first = await anext(source.events)
    tap = StreamTap(source.events, on_event=str.upper, first=first)
    assert [event async for event in tap] == ["begun", "A"]
    closed = StreamTap(Source().events, first="begun")
    await closed.aclose()
    assert [event async for event in closed] == []
