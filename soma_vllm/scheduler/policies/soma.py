"""The default policy: the original warms a session up, the surrogate takes over once the gate has let it.

Guarantee: the surrogate answers only in phase SWITCHED, only inside the locality, and requests with tools only
if the configuration lets it; everything else goes to the original.
"""

from __future__ import annotations

from soma_vllm.config import Config
from soma_vllm.scheduler.policies.base import TurnQuery
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Role, Route


class SomaPolicy:
    """Warm start, switch, locality."""

    adapting: AdaptationRules | None = AdaptationRules("soma")

    def __init__(self, config: Config) -> None:
        self._config = config

    def route(self, session: Session, asked: TurnQuery) -> Route:
        """The surrogate where nothing speaks against it, else the original and what spoke against it."""
        objection = self._objection(session, asked)
        if objection is not None:
            return Route(Role.ORIGINAL, None, asked.messages, objection)
        messages = compress(asked.messages, self._config.prefix, self._config.compressed_prefix_turns)
        near = "" if asked.distance is None else f", distance {asked.distance:.2f}"
        return Route(Role.SURROGATE, session.adapter, messages, f"switched to {session.serving}{near}")

    def _objection(self, session: Session, asked: TurnQuery) -> str | None:
        if (objection := others_turn(self._config, self.adapting, session, asked)) is not None:
            return objection
        threshold = self._config.gate.locality_threshold
        if asked.distance is not None and not asked.distance <= threshold:
            return f"locality {asked.distance:.2f} above {threshold:g}"
        return None


def others_turn(
    config: Config, adapting: AdaptationRules | None, session: Session, asked: TurnQuery
) -> str | None:
    """Why a session that is adapted under these rules is not the surrogate's to answer; None where it is.

    A session that was switched under other rules is served under those alone.
    """
    if session.phase is Phase.WARM_START:
        return f"warm start {len(session.warm_turns()) + 1} of {config.warm_window}"
    if session.phase is not Phase.SWITCHED:
        return session.phase.lower().replace("_", " ")
    theirs = session.adapting
    if theirs is not None and adapting is not None and theirs.policy != adapting.policy:
        return f"adapted under {theirs.policy}"
    return "tools" if asked.body.get("tools") and not config.surrogate.tools else None
