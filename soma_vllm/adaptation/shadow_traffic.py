"""Rehearsals: the plain surrogate answers a warm turn while the original answers it for the user.

Nobody hears a rehearsal; it is evidence. Begun with the user's request it is there when the warm start, or a
cool-down, is complete, so that a verdict needs no further answer and a session may switch before its next
turn. Sessions that end early cost nothing: rehearsals begin with the first held-out turn, and those of the
turns before it are made up for first: one after the other, so that each finds the last one's prompt cached.

Guarantees: a rehearsal is used only for the very prompt and length that it was made for; one that failed, or
was never made, is as good as none (whoever needs that answer asks for it then); nothing of one stays once its
session is switched or removed, nor, where retention has its words erased then, once it is refused. Otherwise
they are evidence of its next verdict too. Of a prompt no more than a digest is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from soma_vllm.adaptation.shadow_answers import most_tokens, shadow_answer, shadow_tokens
from soma_vllm.config import Config
from soma_vllm.engines.engine import Engine
from soma_vllm.errors import EngineError
from soma_vllm.logs import bind_session
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn_query import TurnQuery
from soma_vllm.types import Candidate, Event, Length, Message, SessionKey

logger = logging.getLogger(__name__)

MOST_SESSIONS = 2_000
"""Sessions whose rehearsals are kept; those of older ones are made again if need be."""


@dataclass(frozen=True)
class Rehearsal:
    """One answer under way, or given."""

    prompt: bytes
    """Its digest."""
    tokens: int
    answer: asyncio.Task[str]
    begun: float
    """Unix time."""


class ShadowTraffic:
    """By session. An observer of the events in `kinds`, and a cache of text."""

    kinds = frozenset({EventKind.SWITCHED, EventKind.CLOSED})

    def __init__(self, config: Config, surrogate: Engine) -> None:
        self._config = config
        self._surrogate = surrogate
        self._of: OrderedDict[SessionKey, list[Rehearsal]] = OrderedDict()

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Forget a session that was switched or is being removed."""
        self.forget(key)

    def begin(self, session: Session, asked: TurnQuery, adapting: AdaptationRules | None) -> None:
        """If a verdict is near, have the turn rehearsed that the original will answer now, and those before."""
        missing = session.turns_to_adaptation(self._config)
        if adapting is None or not adapting.gate or not self._is_near_its_verdict(missing):
            return
        judged = session.warm_examples(self._config)[-(self._config.warm_window - missing) :]
        before = [(example.messages, example.length) for example in judged]
        now = compress(asked.messages, self._config.prefix, self._config.compressed_prefix_turns)
        mine = self._of.setdefault(session.key, [])
        self._of.move_to_end(session.key)
        for messages, length in (*before, (now, Length(None, most_tokens(asked.body)))):
            tokens = shadow_tokens(self._config.max_new_tokens, length)
            if _among(mine, messages, tokens) is None:
                last = mine[-1].answer if mine else None
                with bind_session(session.key):
                    answer = self._rehearse(session.key.tenant, messages, tokens, last)
                mine.append(Rehearsal(_digest(messages), tokens, answer, time.time()))
        while len(mine) > self._config.warm_window:
            mine.pop(0).answer.cancel()
        while len(self._of) > MOST_SESSIONS:
            self.forget(next(iter(self._of)))

    async def answer(self, key: SessionKey, messages: Sequence[Message], tokens: int) -> str | None:
        """What the plain surrogate answered to this prompt in so many tokens; None without a rehearsal."""
        found = _among(self._of.get(key, ()), messages, tokens)
        if found is None:
            return None
        await asyncio.wait([found.answer])
        failed = found.answer.cancelled() or found.answer.exception() is not None
        return None if failed else found.answer.result()

    def forget(self, key: SessionKey) -> None:
        """Drop a session's rehearsals, and end those under way."""
        for rehearsal in self._of.pop(key, ()):
            rehearsal.answer.cancel()

    def forget_before(self, at: float) -> None:
        """Drop what was begun before a Unix time."""
        for key, mine in list(self._of.items()):
            if any(rehearsal.begun < at for rehearsal in mine):
                self.forget(key)

    async def stop(self) -> None:
        """End everything."""
        tasks = [rehearsal.answer for mine in self._of.values() for rehearsal in mine]
        for key in list(self._of):
            self.forget(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _rehearse(
        self, tenant: str, messages: tuple[Message, ...], tokens: int, after: asyncio.Task[str] | None
    ) -> asyncio.Task[str]:
        async def in_its_turn() -> str:
            if after is not None:
                await asyncio.wait([after])
            return await shadow_answer(self._surrogate, tenant, messages, tokens)

        answer = asyncio.create_task(in_its_turn(), name="soma-rehearsal")
        answer.add_done_callback(_told)
        return answer

    def _is_near_its_verdict(self, missing: int | None) -> TypeGuard[int]:
        """Whether the turn that comes is among those held out, if all goes on as it did."""
        return (
            missing is not None
            and missing <= self._config.acceptance_min_turns
            and Candidate.PLAIN in self._config.adaptation.candidates
        )


def _among(shadow_traffic: Iterable[Rehearsal], messages: Sequence[Message], tokens: int) -> Rehearsal | None:
    """The rehearsal of this prompt in so many tokens."""
    prompt = _digest(messages)
    return next((one for one in shadow_traffic if one.tokens == tokens and one.prompt == prompt), None)


def _digest(messages: Sequence[Message]) -> bytes:
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True).encode()).digest()


def _told(answer: asyncio.Task[str]) -> None:
    """Say why a rehearsal came to nothing; what it was about is not said."""
    if answer.cancelled() or (error := answer.exception()) is None:
        return
    if isinstance(error, EngineError):
        logger.info(
            "the surrogate did not answer a turn as shadow traffic; it is asked again at the verdict: %s",
            type(error).__name__,
        )
    else:
        logger.error(
            "shadow traffic failed unexpectedly; the surrogate is asked again at the verdict", exc_info=error
        )
