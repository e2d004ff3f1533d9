"""A session, as the events in its log describe it.

Guarantees: a `Session` is a value, made only by folding events in order (`sessions/state/fold.py`); the adapter
is set only while the phase is SWITCHED; text is needed to learn from, and for nothing else: a session whose
text was erased is recognised, served and rolled back as before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import numpy as np

from soma_vllm.config import Config
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.dialogue import Dialogue
from soma_vllm.sessions.state.gate import Drift, Vector
from soma_vllm.sessions.state.phases import COOLING_DOWN, Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import AdapterRef, Candidate, Example, Role, SessionKey


@dataclass(frozen=True)
class Session(Dialogue):
    """Everything the server knows of one dialogue."""

    why: str = ""
    """Why it branched off another one; "" for one that did not."""
    serving: Candidate = Candidate.ORIGINAL
    """Who serves it in phase SWITCHED."""
    adapter: AdapterRef | None = None
    centroid: tuple[float, ...] | None = None
    """Mean embedding of the warm start's queries, filled by the switch."""
    tools: tuple[str, ...] = ()
    """Digests of the tools (`tool_turn.tools_print`) that the surrogate was found to call as the original
    does."""
    drift: Drift = field(default_factory=Drift)
    warm_from: int = 0
    """Turns before the present warm start; 0 until the first rollback."""
    trainings: int = 0
    switches: int = 0
    rollbacks: int = 0
    refusals: int = 0
    """Verdicts that found every candidate wanting."""
    cool_downs: int = 0
    """How often it was left with the original for a while: rolled back, refused for whatever reason, or not
    trained because that failed. An administrator who asks for an adaptation has them forgotten."""
    adapting: AdaptationRules | None = None
    """By which rules the present or latest adaptation goes; None before the first."""
    attempts: int = 0
    """Beginnings of the present adaptation; more than one where servers ended during it."""
    forced: Candidate | None = None
    pinned: Role | None = None
    """The engine that an administrator bound it to."""

    def is_served_by(self, adapter: str) -> bool:
        """Whether this adapter serves it."""
        return self.adapter is not None and self.adapter.name == adapter

    def learned_under_another(self, guard: str) -> bool:
        """Whether all turns that were learned from stood under the same system messages, but for times and
        numbers, and this request stands under others."""
        under = {turn.guard for turn in self.turns[self.warm_from : self.learned]}
        return len(under) == 1 and None not in under and guard not in under

    def skipping(self, number: int, why: str) -> Session:
        """The same session, where a turn does not teach."""
        turns = (replace(turn, skip=why) if turn.number == number else turn for turn in self.turns)
        return replace(self, turns=tuple(turns))

    def warm_turns(self) -> tuple[Turn, ...]:
        """Turns of the present warm start that can be learned from."""
        return tuple(turn for turn in self.turns[self.warm_from :] if turn.teaches())

    @property
    def setbacks(self) -> int:
        """How often the surrogate was found wanting, before it served or while it did: for that, not for a
        trainer that broke down, must it be better the next time."""
        return self.rollbacks + self.refusals

    def wants_adaptation(self, config: Config) -> bool:
        """True once the warm start, or a cool-down, is complete, with text to learn from."""
        missing = self.turns_to_adaptation(config)
        return missing is not None and missing <= 0

    def turns_to_adaptation(self, config: Config) -> int | None:
        """Turns that teach, and that are missing until the session is to be adapted; None: it is not to be.

        After a rollback the surrogate is judged on what came since; after a refusal on the latest turns, once
        enough of them are new. Each cool-down is twice as long as the last, so that a session that comes and
        goes, or never passes, is tried ever more rarely, and after `max_looks` setbacks no more; so are its
        branches.
        """
        looks = min(self.setbacks, self.cool_downs)  # an administrator's request grants new ones
        if self.pinned is not None or not self.kept() or looks >= config.adaptation.max_looks:
            return None
        warm = len(self.warm_turns())
        since = sum(turn.teaches() for turn in self.turns[max(self.warm_from, self.learned) :])
        cool_down: int = config.adaptation.cool_down_turns * 2 ** max(0, self.cool_downs - 1)
        if self.phase is Phase.WARM_START:
            return max(config.warm_window - warm, cool_down - since if self.cool_downs else 0)
        if self.phase not in COOLING_DOWN or self.trainings >= config.adaptation.max_trainings:
            return None
        return max(cool_down - since, config.acceptance_min_turns + 1 - warm)

    def warm_examples(self, config: Config) -> tuple[Example, ...]:
        """The latest warm turns, `warm_window` at most. Each one's messages are what the surrogate would have
        been shown under the configured prefix."""
        return tuple(
            Example(
                turn.number,
                compress(
                    (*self.seen_before(turn), *turn.messages),
                    config.prefix,
                    config.compressed_prefix_turns,
                ),
                turn.answer,
                length=turn.length,
                fields=turn.fields,
            )
            for turn in self.warm_turns()[-config.warm_window :]
        )

    def examples(self, config: Config) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """(to train on, held out to judge on): the last `acceptance_min_turns` warm turns are never trained on,
        where there is a gate to judge on them."""
        examples = self.warm_examples(config)
        if self.adapting is not None and not self.adapting.gate:
            return examples, ()
        held_out = config.acceptance_min_turns
        return examples[:-held_out], examples[-held_out:]

    def centroid_vector(self) -> Vector | None:
        """The centroid as an array, shape (d,)."""
        return None if self.centroid is None else np.asarray(self.centroid, dtype=np.float32)


RECOGNISED = "auto-"
"""Beginning of the ids of sessions that are known by their transcript."""

_RECOGNISED = re.compile(r"auto-[0-9a-f]{32}(~[0-9a-f]{12})?")


def fresh(key: SessionKey) -> Session:
    """A session without turns."""
    return Session(key, "" if _RECOGNISED.fullmatch(key.session) else key.session)
