"""Which turns the original is asked to show its log-probabilities on, and where these are kept for training.

On a turn that may be trained on, a vLLM original is asked for its likeliest tokens in the user's own request;
`engines/logprob_capture.py` takes them off the reply.

Guarantees: what is kept stays in this process's memory, within a bound, and is never logged or recorded: after
a restart answers teach as text. A teacher is handed out only with the very answer that it was captured with.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from soma_vllm.config import Config
from soma_vllm.engines.logprob_capture import LogprobCapture, Spelling, can_be_added_to
from soma_vllm.engines.logprobs import teaching_fields
from soma_vllm.engines.reply_parser import ParsedReply
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Candidate, Event, Example, SessionKey, Teacher

MIB = 1024 * 1024

OVER = frozenset({EventKind.SWITCHED, EventKind.ADAPTATION_ABANDONED, EventKind.CLOSED})
"""Events after which a session's teachers are not needed any more."""

NOT_CAPTURED = "the original's log-probabilities were not heard with these answers"


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


@dataclass(frozen=True, eq=False)
class CapturedAnswer:
    """A teacher and the answer that it was captured with."""

    answer: str
    teacher: Teacher
    at: float = field(default_factory=time.time)
    """Unix time, seconds."""

    @property
    def size(self) -> int:
        """Bytes, nearly: a Python integer and its place in a tuple take 36."""
        return self.teacher.top.nbytes + self.teacher.logprobs.nbytes + 36 * len(self.teacher.tokens)


class TeacherLogprobs:
    """Decides which turns to capture log-probabilities on, and keeps them. An observer of the events in
    `kinds`, and a cache of text."""

    kinds = OVER | {EventKind.BRANCHED}

    def __init__(
        self,
        config: Config,
        text_only: str | None,
        spelling: Spelling = lambda tokens, text: len(tokens),
        kept_bytes: int | None = None,
    ) -> None:
        """`text_only` says why answers teach as text; None lets them teach by log-probabilities. `kept_bytes`
        is instead of `adaptation.teachers_mib`.

        `spelling` reads the original's tokens; without one they are taken to spell their answer.
        """
        self._config = config
        self._text_only = text_only
        self._spelling = spelling
        self._kept_bytes = config.adaptation.teachers_mib * MIB if kept_bytes is None else kept_bytes
        self._kept: OrderedDict[SessionKey, dict[int, CapturedAnswer]] = OrderedDict()
        self._bytes = 0

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Drop what an event makes useless; share teachers with a branch that begins with the same turns."""
        if event.kind == EventKind.BRANCHED:
            self._share(SessionKey(key.tenant, event.data["of"]), key, len(event.data["turns"]))
        else:
            self.forget(key)

    def forget(self, key: SessionKey) -> None:
        """Drop what was captured with a session's turns."""
        self._drop(key, 1)

    def forget_before(self, at: float) -> None:
        """Drop what was captured before a Unix time."""
        for key, mine in list(self._kept.items()):
            if any(kept.at < at for kept in mine.values()):
                self.forget(key)

    def fields(self, session: Session, body: Mapping[str, Any]) -> dict[str, Any]:
        """What to add to this turn's request; empty where its answer teaches as text or not at all."""
        if self._text_only is not None or not _may_be_adapted(session, self._config):
            return {}
        return teaching_fields(self._config.original.top_logprobs) if can_be_added_to(body) else {}

    def keep(self, key: SessionKey, turn: int, reply: ParsedReply, capture: LogprobCapture | None) -> None:
        """Keep what was captured with a recorded turn; what belongs to turns that it replaced is dropped."""
        self._drop(key, turn)
        teacher = None if capture is None else capture.teacher(reply, self._spelling)
        if teacher is None:
            return
        kept = CapturedAnswer(reply.text, teacher)
        mine = self._kept.setdefault(key, {})
        mine[turn] = kept
        self._kept.move_to_end(key)
        self._bytes += kept.size
        while len(mine) > self._config.warm_window:  # no training looks further back
            self._bytes -= mine.pop(min(mine)).size
        while self._bytes > self._kept_bytes:
            self._drop(next(iter(self._kept)), 1)

    def attach(self, key: SessionKey, examples: Sequence[Example]) -> tuple[Example, ...]:
        """The examples, each with the teacher that was captured with its answer, where there is one."""
        kept = self._kept.get(key, {})
        return tuple(
            replace(example, teacher=found.teacher)
            if (found := kept.get(example.turn)) is not None and found.answer == example.answer
            else example
            for example in examples
        )

    def account(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What these examples teach by, for the event log: `teacher`, and `why` where it is text."""
        by_text = [example.turn for example in examples if example.teacher is None]
        if len(by_text) == len(examples):
            return {"teacher": "text", "why": self._text_only or NOT_CAPTURED}
        return {"teacher": "logprobs"} | ({"text_turns": by_text, "why": NOT_CAPTURED} if by_text else {})

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
    """Whether the session's next turn may be trained on."""
    if session.phase is Phase.ADAPTING and session.pinned is None:
        return session.trainings < config.adaptation.max_trainings  # another one, if this one fails
    missing = session.turns_to_adaptation(config)
    return missing is not None and missing <= config.warm_window
