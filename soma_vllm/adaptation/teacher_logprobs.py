"""What the original shows of its own distribution in turns that may be learned from, and where that is kept.

On a turn that may be trained on, a vLLM original is asked for its likeliest tokens in the user's own request;
they are taken off the reply on its way to the client.

Guarantees:

* The client gets what it would have got: a stream's text is cut where the log-probabilities stand and is
  otherwise the same bytes; a whole reply is the same fields.
* Only requests made of plain, known fields are added to. Any other, and one that asks for log-probabilities
  itself, goes out as it came, and its answer teaches as text.
* What is kept stays in this process's memory, within a bound; it is never logged and never put on record.
  After a restart answers teach as text.
* A teacher is only handed out with the very answer that it was heard with, and its tokens spell that answer.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from soma_vllm.config import Config
from soma_vllm.engines.engine import Events, Reply
from soma_vllm.engines.logprobs import teacher_from_logprobs, teaching_fields
from soma_vllm.engines.reply_parser import ParsedReply
from soma_vllm.errors import EngineError
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Candidate, Event, Example, SessionKey, Teacher

KEPT_BYTES = 256 * 1024 * 1024
"""Teachers kept in all: at 20 tokens a position some 200 bytes per answer token."""

PLAIN_FIELDS = frozenset(
    {
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "user",
        "metadata",
        "store",
        "service_tier",
        "session_id",
        "cache_salt",
        "priority",
    }
)
"""Fields under which every generated token is a token of the answer, and log-probabilities are the model's own
(vLLM takes them before temperature and penalties)."""

ABSENT: Mapping[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "stop": [],
    "tools": [],
    "echo": False,
}
"""Values of other fields that say the same as leaving them out; null always does."""

OVER = frozenset({EventKind.SWITCHED, EventKind.ADAPTATION_ABANDONED, EventKind.CLOSED})
"""Events after which a session's teachers have done their work."""

Spelling = Callable[[Sequence[int], str], int | None]
"""How many of an answer's tokens, from the first, spell its text; None where they do not."""

NOT_HEARD = "the original's log-probabilities were not heard with these answers"

_SHOWN = re.compile(r'"logprobs"\s*:\s*(?=\{)')
"""Where log-probabilities begin in an event. Inside a JSON string its quotes would be escaped."""

_MORE_THAN_CONTENT = re.compile(r'"(?:reasoning|reasoning_content|tool_calls)"\s*:\s*["\[]')
"""Tokens that went into something else than the answer's text."""

_DECODER = json.JSONDecoder()


def why_text(config: Config, speaks_vllm: bool, same_vocabulary: bool) -> str | None:
    """Why the original's answers can only teach as text, or None where they can teach by log-probabilities."""
    if config.lora.objective != "kd":
        return f"lora.objective is {config.lora.objective}"
    if Candidate.ADAPTER not in config.adaptation.candidates:
        return "adaptation.candidates has no adapter"
    if not speaks_vllm:
        return "the original is not known to be a vLLM (original.api)"
    if config.original.top_logprobs == 0:
        return "original.top_logprobs is 0"
    return None if same_vocabulary else "the original's tokenizer is not the surrogate's"


def can_be_added_to(body: Mapping[str, Any]) -> bool:
    """Whether a request may carry the teaching fields without the client's noticing."""
    return all(
        name in PLAIN_FIELDS or value is None or (name in ABSENT and value == ABSENT[name])
        for name, value in body.items()
    )


class LogprobCapture:
    """One reply's log-probabilities, taken off as it passes."""

    def __init__(self) -> None:
        self._parts: list[Teacher] = []
        self._usable = True

    def whole(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A reply in one piece, without its log-probabilities."""
        choices = []
        for choice in body.get("choices") or ():
            self._keep(choice.get("logprobs"))
            if _is_more_than_content(choice.get("message") or {}):
                self._usable = False
            choices.append({**choice, "logprobs": None})
        return {**body, "choices": choices}

    def event(self, event: str) -> str | None:
        """An event without its log-probabilities; None for one that carried nothing else."""
        found = _SHOWN.search(event)
        if found is None:
            return event
        try:
            shown, end = _DECODER.raw_decode(event, found.end())
        except ValueError:
            self._usable = False
            return event
        self._keep(shown)
        bare = f"{event[: found.end()]}null{event[end:]}"
        if _MORE_THAN_CONTENT.search(bare):
            self._usable = False
        # vLLM sends such an event for the sake of its log-probabilities alone.
        return None if '"delta":{},' in bare and '"finish_reason":null' in bare else bare

    def teacher(self, heard: ParsedReply, spelling: Spelling) -> Teacher | None:
        """What was heard with an answer, once it is over; None unless it is all of it and spells it."""
        if not (self._usable and self._parts and heard.complete):
            return None
        tokens = tuple(token for part in self._parts for token in part.tokens)
        if heard.usage.completion_tokens not in (None, len(tokens)):
            return None
        spelt = spelling(tokens, heard.text)
        if not spelt:
            return None
        shape = (len(tokens), max(part.top.shape[1] for part in self._parts))
        top = np.full(shape, -1, dtype=np.int32)
        logprobs = np.full(shape, -np.inf, dtype=np.float32)
        first = 0
        for part in self._parts:
            rows, width = part.top.shape
            top[first : first + rows, :width] = part.top
            logprobs[first : first + rows, :width] = part.logprobs
            first += rows
        return Teacher(tokens[:spelt], top[:spelt].copy(), logprobs[:spelt].copy())

    def _keep(self, shown: Mapping[str, Any] | None) -> None:
        content = (shown or {}).get("content")
        if not content:
            return
        try:
            self._parts.append(teacher_from_logprobs(content))
        except (EngineError, LookupError, TypeError, ValueError):
            # An endpoint that shows them otherwise than vLLM does: its words still teach.
            self._usable = False


class LogprobEvents:
    """A stream of events without the log-probabilities it came with.

    A class and not an async generator, because closing a generator that nobody began to read runs none of it.
    """

    def __init__(self, events: Events, lesson: LogprobCapture) -> None:
        self._events = events
        self._lesson = lesson

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while True:
            event = self._lesson.event(await anext(self._events))
            if event is not None:
                return event

    async def aclose(self) -> None:
        """Stop the generation."""
        await self._events.aclose()


def without_logprobs(reply: Reply, lesson: LogprobCapture) -> Reply:
    """The reply as the client would have got it; the lesson hears the rest."""
    if reply.events is not None:
        return replace(reply, events=LogprobEvents(reply.events, lesson))
    assert reply.body is not None
    return replace(reply, body=lesson.whole(reply.body))


@dataclass(frozen=True, eq=False)
class Kept:
    """A teacher and the answer it was heard with."""

    answer: str
    teacher: Teacher
    at: float = field(default_factory=time.time)
    """Unix time, seconds."""

    @property
    def size(self) -> int:
        """Bytes, nearly: a Python integer and its place in a tuple take 36."""
        return self.teacher.top.nbytes + self.teacher.logprobs.nbytes + 36 * len(self.teacher.tokens)


class TeacherLogprobs:
    """Decides which turns to hear log-probabilities on, and keeps what was heard. An observer of the events in
    `kinds`, and a cache of text."""

    kinds = OVER | {EventKind.BRANCHED}

    def __init__(
        self,
        config: Config,
        text_only: str | None,
        spelling: Spelling = lambda tokens, text: len(tokens),
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """`text_only` says why answers teach as text; None lets them teach by log-probabilities.

        `spelling` reads the original's tokens; without one they are taken to spell their answer.
        """
        self._config = config
        self._text_only = text_only
        self._spelling = spelling
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[SessionKey, dict[int, Kept]] = OrderedDict()
        self._bytes = 0

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Drop what an event makes useless; hand a branch what was heard with the turns it begins with."""
        if event.kind == EventKind.BRANCHED:
            self._share(SessionKey(key.tenant, event.data["of"]), key, len(event.data["turns"]))
        else:
            self.forget(key)

    def forget(self, key: SessionKey) -> None:
        """Drop what was heard with a session's turns."""
        self._drop(key, 1)

    def forget_before(self, at: float) -> None:
        """Drop what was heard before a Unix time."""
        for key, mine in list(self._kept.items()):
            if any(kept.at < at for kept in mine.values()):
                self.forget(key)

    def fields(self, session: Session, body: Mapping[str, Any]) -> dict[str, Any]:
        """What to add to the request of this turn; empty where its answer teaches as text or not at all."""
        if self._text_only is not None or not _may_be_adapted(session, self._config):
            return {}
        return teaching_fields(self._config.original.top_logprobs) if can_be_added_to(body) else {}

    def keep(self, key: SessionKey, turn: int, heard: ParsedReply, lesson: LogprobCapture | None) -> None:
        """Keep what was heard with a turn that is on record now; whatever it replaced is dropped."""
        self._drop(key, turn)
        teacher = None if lesson is None else lesson.teacher(heard, self._spelling)
        if teacher is None:
            return
        kept = Kept(heard.text, teacher)
        mine = self._kept.setdefault(key, {})
        mine[turn] = kept
        self._kept.move_to_end(key)
        self._bytes += kept.size
        while len(mine) > self._config.warm_window:  # no training looks further back
            self._bytes -= mine.pop(min(mine)).size
        while self._bytes > self._kept_bytes:
            self._drop(next(iter(self._kept)), 1)

    def attach(self, key: SessionKey, examples: Sequence[Example]) -> tuple[Example, ...]:
        """The examples, each with the teacher that was heard with its answer, where there is one."""
        kept = self._kept.get(key, {})
        return tuple(
            replace(example, teacher=found.teacher)
            if (found := kept.get(example.turn)) is not None and found.answer == example.answer
            else example
            for example in examples
        )

    def account(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What these examples teach by, for the event log: `teacher`, and `why` where it is words."""
        by_text = [example.turn for example in examples if example.teacher is None]
        if len(by_text) == len(examples):
            return {"teacher": "text", "why": self._text_only or NOT_HEARD}
        return {"teacher": "logprobs"} | ({"text_turns": by_text, "why": NOT_HEARD} if by_text else {})

    def _share(self, parent: SessionKey, branch: SessionKey, turns: int) -> None:
        for turn, kept in list(self._kept.get(parent, {}).items()):
            if turn <= turns:
                self._kept.setdefault(branch, {})[turn] = kept
                self._bytes += kept.size

    def _drop(self, key: SessionKey, first_turn: int) -> None:
        """Forget a session's teachers from a turn on."""
        kept = self._kept.get(key)
        if kept is None:
            return
        for turn in [turn for turn in kept if turn >= first_turn]:
            self._bytes -= kept.pop(turn).size
        if not kept:
            del self._kept[key]


def _may_be_adapted(session: Session, config: Config) -> bool:
    """Whether the turn that comes may be trained on."""
    if session.phase is Phase.ADAPTING and session.pinned is None:
        return session.trainings < config.adaptation.max_trainings  # if this one comes to nothing
    missing = session.turns_to_adaptation(config)
    return missing is not None and missing <= config.warm_window


def _is_more_than_content(message: Mapping[str, Any]) -> bool:
    """`_MORE_THAN_CONTENT`, of a whole message."""
    return any(message.get(name) for name in ("reasoning", "reasoning_content", "tool_calls"))
