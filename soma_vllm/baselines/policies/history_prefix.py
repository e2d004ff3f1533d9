"""Baseline: the plain surrogate, with the original's warm-start turns kept verbatim as its prefix.

The original answers W turns; then the surrogate sees those turns, the last K turns and the query. Nothing is
trained, judged or audited.
"""

from __future__ import annotations

from soma_vllm.config import Config
from soma_vllm.scheduler.policies.base import TurnQuery
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.prefix import split_turns
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Message, Role, Route


class HistoryPrefixPolicy:
    """Warm start, then the surrogate under it."""

    adapting: AdaptationRules | None = None

    def __init__(self, config: Config) -> None:
        self._config = config

    def route(self, session: Session, asked: TurnQuery) -> Route:
        """The original for W turns, then the surrogate."""
        window = self._config.warm_window
        if asked.builds_on < window:
            return Route(Role.ORIGINAL, None, asked.messages, f"warm start {asked.builds_on + 1} of {window}")
        if asked.body.get("tools") and self._config.surrogate.tools is not True:  # no gate checks them
            return Route(Role.ORIGINAL, None, asked.messages, "tools")
        shown = self._shown(session, asked)
        return Route(Role.SURROGATE, None, shown, f"warm start of {window} turns as prefix")

    def _shown(self, session: Session, asked: TurnQuery) -> tuple[Message, ...]:
        """The client's messages up to the end of the warm start, then the last K turns and the query."""
        last = session.turns[self._config.warm_window - 1]
        end = next((mark.end for mark in asked.reading.marks if mark.chain == last.chain), None)
        if end is None:  # the record and this history agree only later: nothing can be left out
            return asked.messages
        _, later = split_turns(asked.messages[end:])
        kept = later[-(self._config.compressed_prefix_turns + 1) :]
        if len(kept) == len(later):
            return asked.messages
        return (*asked.messages[:end], *(message for turn in kept for message in turn))
