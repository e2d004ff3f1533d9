"""The one wrapper around a stream of events: looks at each event, drops some, and sees the stream's end.

Guarantees: `on_end` is awaited exactly once, however the stream ends (read to its end, broken, closed early or
never read), and only after the wrapped stream is closed; an error of `on_event` ends the stream as one of its
own would.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Self

from soma_vllm.engines.engine import Events

OnEvent = Callable[[str], str | None]
"""Returns the event to pass on, or None to drop it."""

OnEnd = Callable[[], Awaitable[None]]


class StreamTap:
    """`Events` that pass through `on_event`.

    A class and not an async generator, because closing a generator that was never read runs none of its code.
    """

    def __init__(
        self,
        events: Events,
        on_event: OnEvent | None = None,
        on_end: OnEnd | None = None,
        first: str | None = None,
    ) -> None:
        """`first` is an event that was already read from `events`; it is passed on as it is."""
        self._events = events
        self._on_event = on_event
        self._on_end = on_end
        self._first = first
        self._over = False
        self.exhausted = False
        """The stream was read to its end."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            while True:
                event = await anext(self._events)
                passed = event if self._on_event is None else self._on_event(event)
                if passed is not None:
                    return passed
        except StopAsyncIteration:
            self.exhausted = self.exhausted or not self._over
            await self.aclose()
            raise
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Stop the generation; harmless when it is over."""
        if self._over:
            return
        self._over, self._first = True, None
        try:
            await self._events.aclose()
        finally:
            if self._on_end is not None:
                await self._on_end()
