"""Shadow traffic: the plain surrogate answers the warm turns too, and only the gate reads its answers.

A shadow answer is requested together with the original's, so that all evidence exists when the warm start, or
a cool-down, is complete, and a session may switch before its next turn. Sessions that end early cost nothing:
shadow traffic starts at the first held-out turn. It then answers the turns before that one as well, one after
the other, so that each finds the prompt of the last one in the engine's cache.

Guarantees: a shadow answer is used only for the very prompt and length that it was made for. Where there is
none, or it failed, `answer` returns None, and the caller asks the surrogate itself. Answers are dropped when
their session is switched or removed and, where `retention.text` has its text erased at that point, when it is
refused; else they count in its next verdict too. Of a prompt only a digest is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from soma_vllm.adaptation.shadow_answers import most_tokens, shadow_answer, shadow_tokens
from soma_vllm.config import Config
from soma_vllm.engines.engine import Engine
from soma_vllm.errors import EngineError
from soma_vllm.logs import bind_session
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn import prompt_fields
from soma_vllm.sessions.state.turn_query import TurnQuery
from soma_vllm.types import Candidate, Event, Length, SessionKey, chat_body

logger = logging.getLogger(__name__)

MAX_SESSIONS = 2_000
"""Sessions whose shadow answers are kept; the least recently used are dropped first and requested again if a
verdict needs them."""


@dataclass(frozen=True)
class ShadowAnswer:
    """One answer, given or still being generated."""

    prompt: bytes
    """Digest of the prompt."""
    tokens: int
    """Most tokens that it may have."""
    answer: asyncio.Task[str]
    began: float
    """Unix time, seconds."""


class ShadowTraffic:
    """The shadow answers of each session. An observer of the events in `kinds`, and a cache of text."""

    kinds = frozenset({EventKind.SWITCHED, EventKind.CLOSED})

    def __init__(self, config: Config, surrogate: Engine) -> None:
        self._config = config
        self._surrogate = surrogate
        self._answers: OrderedDict[SessionKey, list[ShadowAnswer]] = OrderedDict()

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Forget a session that was switched or is being removed."""
        self.forget(key)

    def begin(self, session: Session, asked: TurnQuery, adapting: AdaptationRules | None) -> None:
        """If a verdict is near, request shadows of the turn that the original will answer now and of those
        before."""
        missing = session.turns_to_adaptation(self._config)
        if adapting is None or not adapting.gate or not self._is_near_its_verdict(missing):
            return
        judged = session.warm_examples(self._config)[-(self._config.warm_window - missing) :]
        before = [(example.body, example.length) for example in judged]
        shown = compress(asked.messages, self._config.prefix, self._config.compressed_prefix_turns)
        now = chat_body(shown, prompt_fields(asked.body))
        made = self._answers.setdefault(session.key, [])
        self._answers.move_to_end(session.key)
        for prompt, length in (*before, (now, Length(None, most_tokens(asked.body)))):
            tokens = shadow_tokens(self._config.max_new_tokens, length)
            if _find(made, prompt, tokens) is None:
                with bind_session(session.key):
                    answer = self._request(
                        session.key.tenant, prompt, tokens, made[-1].answer if made else None
                    )
                made.append(ShadowAnswer(_digest(prompt), tokens, answer, time.time()))
        while len(made) > self._config.warm_window:
            made.pop(0).answer.cancel()
        while len(self._answers) > MAX_SESSIONS:
            self.forget(next(iter(self._answers)))

    async def answer(self, key: SessionKey, prompt: Mapping[str, Any], tokens: int) -> str | None:
        """The plain surrogate's shadow answer to this chat request in `tokens` tokens; None without one."""
        found = _find(self._answers.get(key, ()), prompt, tokens)
        if found is None:
            return None
        await asyncio.wait([found.answer])
        failed = found.answer.cancelled() or found.answer.exception() is not None
        return None if failed else found.answer.result()

    def forget(self, key: SessionKey) -> None:
        """Drop a session's shadow answers and cancel those still being generated."""
        for shadow in self._answers.pop(key, ()):
            shadow.answer.cancel()

    def forget_before(self, at: float) -> None:
        """Forget each session that has a shadow answer requested before a Unix time."""
        for key, made in list(self._answers.items()):
            if any(shadow.began < at for shadow in made):
                self.forget(key)

    async def stop(self) -> None:
        """Cancel everything and wait for its end."""
        tasks = [shadow.answer for made in self._answers.values() for shadow in made]
        for key in list(self._answers):
            self.forget(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _request(
        self, tenant: str, prompt: Mapping[str, Any], tokens: int, after: asyncio.Task[str] | None
    ) -> asyncio.Task[str]:
        """Have the surrogate answer once `after` is over."""

        async def in_turn() -> str:
            if after is not None:
                await asyncio.wait([after])
            return await shadow_answer(self._surrogate, tenant, prompt, tokens)

        answer = asyncio.create_task(in_turn(), name="soma-shadow-answer")
        answer.add_done_callback(_log_failure)
        return answer

    def _is_near_its_verdict(self, missing: int | None) -> TypeGuard[int]:
        """Whether the next turn will be held out, unless the session is rewritten before its verdict."""
        return (
            missing is not None
            and missing <= self._config.acceptance_min_turns
            and Candidate.PLAIN in self._config.adaptation.candidates
        )


def _find(answers: Iterable[ShadowAnswer], prompt: Mapping[str, Any], tokens: int) -> ShadowAnswer | None:
    """The shadow answer to this chat request in `tokens` tokens."""
    digest = _digest(prompt)
    return next((one for one in answers if one.tokens == tokens and one.prompt == digest), None)


def _digest(prompt: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()


def _log_failure(answer: asyncio.Task[str]) -> None:
    """Log the kind of a failure; an engine's message may quote the prompt and is left out."""
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
