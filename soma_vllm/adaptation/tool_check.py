"""Whether a session's surrogate may have turns with tools: its calls against the original's.

Each turn of the warm start in which the original might have called a tool is rehearsed by the candidate that
is to serve: the same messages, tools and choice of tools, whole, read by the engine's own parser. Where the
original called, the candidate has to call the same functions with valid arguments of the same values; texts in
arguments are compared by the gate's judge. Where the original answered in words, so must the candidate.

Guarantees: one turn that differs, or too few in which the original called, and turns with tools stay with the
original; a rehearsal that fails counts as one that differs and never ends an adaptation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soma_vllm.adaptation.shadow_answers import ShadowAnswers, comparable, shadow_tokens
from soma_vllm.config import Config
from soma_vllm.engines.tool_calls import Calls, Mismatch, compare
from soma_vllm.errors import AdapterError, EngineError
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.tool_turn import checkable_turns, tools_print
from soma_vllm.sessions.state.transcript import query_of
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import AdapterRef, Length, Message

logger = logging.getLogger(__name__)

MOST_CHECKED = 16
"""Turns that are rehearsed, the latest ones: agents call a tool many times for one question."""


@dataclass(frozen=True)
class ToolVerdict:
    """What the rehearsals of a session's turns with tools found."""

    turns: tuple[int, ...] = ()
    """Those that were rehearsed."""
    called: int = 0
    """Turns in which the original called a tool."""
    differs: Mapping[int, Mismatch] | None = None
    """The turn that differs and how, where one does: it ends the check."""
    tools: tuple[str, ...] = ()
    """`tools_print` of what was declared, where turns with these tools are the surrogate's; else empty."""

    def numbers(self) -> dict[str, Any]:
        """For the verdict's event, JSON-compatible."""
        return {
            "turns": list(self.turns),
            "called": self.called,
            "differs": {str(turn): word.value for turn, word in (self.differs or {}).items()},
            "passes": bool(self.tools),
        }


class ToolCheck:
    """Rehearses turns with tools."""

    def __init__(self, config: Config, shadow_answers: ShadowAnswers) -> None:
        self._config = config
        self._shadow_answers = shadow_answers

    async def check(self, session: Session, adapter: AdapterRef | None) -> ToolVerdict | None:
        """Whether the candidate that is to serve a session may have its turns with tools; None: not asked."""
        turns = checkable_turns(session)[-MOST_CHECKED:]
        called = sum(bool(turn.calls) for turn in turns)
        if self._config.surrogate.tools != "checked" or not turns:
            return None
        if called < self._config.gate.min_tool_turns:
            return ToolVerdict((), called)
        rehearsed: list[int] = []
        for turn in turns:
            rehearsed.append(turn.number)
            mismatch = await self._mismatch(session, turn, adapter)
            if mismatch is not None:
                return ToolVerdict(tuple(rehearsed), called, {turn.number: mismatch})
        prints = dict.fromkeys(tools_print(turn.fields["tools"]) for turn in turns)
        return ToolVerdict(tuple(rehearsed), called, None, tuple(prints))

    async def _mismatch(self, session: Session, turn: Turn, adapter: AdapterRef | None) -> Mismatch | None:
        config, tenant = self._config, session.key.tenant
        seen = (*session.seen_before(turn), *turn.messages)
        shown = compress(seen, config.prefix, config.compressed_prefix_turns)
        limit = tool_tokens(config.max_new_tokens, turn.length)
        try:
            said = await self._shadow_answers.reply(tenant, as_asked(shown, turn.fields), limit, adapter)
            if turn.calls or said.calls:
                tools = turn.fields["tools"]
                apart, mismatch = await call_gap(self._shadow_answers, turn.calls, said.calls, tools)
            elif query_of(turn.messages).get("role") == "user":
                return None  # its words are the gate's
            else:
                answer = comparable(turn.answer, turn.length, limit)
                (apart,), mismatch = await self._shadow_answers.gaps([said.text], [answer]), None
        except (EngineError, AdapterError) as error:
            logger.info("a turn with tools was not rehearsed: %s", type(error).__name__)
            return Mismatch.NO_ANSWER
        if mismatch is not None or apart <= config.gate.accept_threshold:
            return mismatch
        return Mismatch.OTHER_WORDS


async def call_gap(
    answers: ShadowAnswers, original: Calls, surrogate: Calls, tools: object
) -> tuple[float, Mismatch | None]:
    """(the gap of a surrogate's calls from the original's, what differs); 1 where anything but texts does.

    Raises EngineError where the judge fails.
    """
    found = compare(original, surrogate, tools)
    if found.mismatch is not None:
        return 1.0, found.mismatch
    theirs, ours = [text for text, _ in found.texts], [text for _, text in found.texts]
    return max(await answers.gaps(ours, theirs), default=0.0), None


def as_asked(messages: Sequence[Message], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat request with the client's own choice of tools."""
    return {"messages": list(messages), **fields}


def tool_tokens(most: int, length: Length) -> int:
    """Tokens for the shadow of an answer that may be a call, which is of no use when it is cut off."""
    return shadow_tokens(max(most, 2 * (length.tokens or 0)), length)
