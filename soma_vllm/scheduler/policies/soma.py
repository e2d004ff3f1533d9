"""The default policy: the original answers the warm start, the surrogate once the gate has admitted it.

Guarantee: the surrogate answers only in phase SWITCHED, only inside the locality, and requests with tools only
where its calls were checked, or the configuration lets it; everything else goes to the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soma_vllm.config import Config
from soma_vllm.scheduler.policies.base import TurnQuery
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.tool_turn import may_call, tools_print
from soma_vllm.types import Reason, ReasonCode, Role, Route


class SomaPolicy:
    """Warm start, switch, locality."""

    adapting: AdaptationRules | None = AdaptationRules("soma")

    def __init__(self, config: Config) -> None:
        self._config = config

    def route(self, session: Session, query: TurnQuery) -> Route:
        """The surrogate where there is no objection, else the original and the objection."""
        objection = self._objection(session, query)
        if objection is not None:
            return Route(Role.ORIGINAL, None, query.messages, objection)
        messages = compress(query.messages, self._config.prefix, self._config.compressed_prefix_turns)
        near = "" if query.distance is None else f", distance {query.distance:.2f}"
        reason = Reason(f"switched to {session.serving}{near}", ReasonCode.SWITCHED)
        return Route(Role.SURROGATE, session.adapter, messages, reason)

    def _objection(self, session: Session, query: TurnQuery) -> Reason | None:
        if (objection := others_turn(self._config, self.adapting, session, query)) is not None:
            return objection
        threshold = self._config.gate.locality_threshold
        if query.distance is not None and not query.distance <= threshold:
            return Reason(f"locality {query.distance:.2f} above {threshold:g}", ReasonCode.LOCALITY)
        return None


def others_turn(
    config: Config, adapting: AdaptationRules | None, session: Session, query: TurnQuery
) -> Reason | None:
    """Why the surrogate may not answer a session that is adapted under these rules; None where it may.

    A session that was switched under other rules is served under those alone.
    """
    if session.phase is Phase.WARM_START:
        teaching = sum(turn.teaches() for turn in session.turns[session.warm_from : query.builds_on])
        number = min(teaching + 1, config.warm_window)  # a branch may wait out a cool-down with more
        return Reason(f"warm start {number} of {config.warm_window}", ReasonCode.WARM_START)
    if session.phase is not Phase.SWITCHED:
        return Reason(session.phase.lower().replace("_", " "), ReasonCode.PHASE)
    theirs = session.adapting
    if theirs is not None and adapting is not None and theirs.policy != adapting.policy:
        return Reason(f"adapted under {theirs.policy}", ReasonCode.OTHER_POLICY)
    if session.learned_under_another(query.reading.guard):
        return Reason("other system messages than it was adapted under", ReasonCode.PREAMBLE)
    return tools_objection(config, session, query.body)


def tools_objection(config: Config, session: Session, body: Mapping[str, Any]) -> Reason | None:
    """Why the surrogate may not answer a request because of its tools; None where it may."""
    tools, allowed = body.get("tools"), config.surrogate.tools
    if not tools or allowed is True:
        return None
    if allowed is False:
        return Reason("tools", ReasonCode.TOOLS)
    if not may_call(body) or tools_print(tools) in session.tools:
        return None
    why = "other tools than were checked" if session.tools else "tools not checked"
    return Reason(why, ReasonCode.TOOLS_UNCHECKED)
