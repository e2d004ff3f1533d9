"""Baseline: uniform fine-tuning on the warm start, without mining and without a gate.

The original answers W turns, an adapter learns from all of them with equal weights, and the surrogate serves
with it from the moment it is loaded: no held-out turns, no locality, no audits, no rollback.
"""

from __future__ import annotations

from soma_vllm.config import Config
from soma_vllm.scheduler.policies.base import TurnQuery
from soma_vllm.scheduler.policies.soma import others_turn
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Role, Route


class HistoryFineTuningPolicy:
    """Warm start, fine-tune, switch."""

    adapting: AdaptationRules | None = AdaptationRules("history_ft", gate=False, mining=False)

    def __init__(self, config: Config) -> None:
        self._config = config

    def route(self, session: Session, asked: TurnQuery) -> Route:
        """The surrogate with the session's adapter once there is one, else the original."""
        objection = others_turn(self._config, self.adapting, session, asked)
        if objection is not None:
            return Route(Role.ORIGINAL, None, asked.messages, objection)
        messages = compress(asked.messages, self._config.prefix, self._config.compressed_prefix_turns)
        return Route(Role.SURROGATE, session.adapter, messages, "fine-tuned on the warm start")
