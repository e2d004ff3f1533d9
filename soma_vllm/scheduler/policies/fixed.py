"""The two baselines that need no decision: always the original, always the plain surrogate."""

from __future__ import annotations

from soma_vllm.config import Config
from soma_vllm.scheduler.policies.base import TurnQuery
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Role, Route


class OriginalPolicy:
    """The original answers every turn under the full history."""

    adapting: AdaptationRules | None = None
    reason = "policy original"

    def __init__(self, config: Config) -> None:
        pass

    def route(self, session: Session, query: TurnQuery) -> Route:
        """Always the original."""
        return Route(Role.ORIGINAL, None, query.messages, self.reason)


class SurrogatePolicy:
    """The plain surrogate answers every turn under the full history."""

    adapting: AdaptationRules | None = None

    def __init__(self, config: Config) -> None:
        pass

    def route(self, session: Session, query: TurnQuery) -> Route:
        """Always the plain surrogate."""
        return Route(Role.SURROGATE, None, query.messages, "policy surrogate")
