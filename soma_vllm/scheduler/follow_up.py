"""Starts what follows from a recorded turn, in the background: adaptation, or an audit."""

from __future__ import annotations

from soma_vllm.adaptation.drift import DriftWatch
from soma_vllm.adaptation.pipeline import Adaptation
from soma_vllm.config import Config
from soma_vllm.scheduler.turn_context import ChatRequest, TurnContext
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import Candidate, Role


class FollowUp:
    """Decides what a recorded turn leads to. No request waits for it."""

    def __init__(
        self,
        config: Config,
        registry: SessionRegistry,
        background: BackgroundTasks,
        adaptation: Adaptation,
        drift: DriftWatch,
    ) -> None:
        self._config = config
        self._registry = registry
        self._background = background
        self._adaptation = adaptation
        self._drift = drift

    def begin(self, turn: TurnContext, session: Session, recorded: Turn) -> None:
        """Adapt the session if it is due, else audit the turn if it is sampled. `session` holds the turn."""
        rules = turn.policy.adapting
        if rules is None:
            return
        key = turn.key
        may_teach = session.turns_to_adaptation(self._config) is not None
        if may_teach and (why := recorded.unteachable()):
            self._registry.note(key, EventKind.TURN_SKIPPED, turn=recorded.number, why=why)
        interrupted = session.phase is Phase.ADAPTING and session.kept() and self._background.idle(key)
        if interrupted or session.wants_adaptation(self._config):
            if self._background.idle(key):
                theirs = session.adapting if interrupted else None
                forced = self._forced(turn.request)
                self._adaptation.start(key, forced, theirs or rules)
        elif rules.gate and self._drift.wants(recorded, turn.route.code):
            self._audit(turn, recorded)

    def _audit(self, turn: TurnContext, recorded: Turn) -> None:
        query, config = turn.query, self._config
        shown = compress(query.messages, config.prefix, config.compressed_prefix_turns)
        if recorded.engine is Role.ORIGINAL:
            self._registry.note(
                turn.key, EventKind.LOCALITY_MISS, turn=recorded.number, distance=query.distance
            )
        self._background.spawn(turn.key, self._drift.audit(turn.key, recorded, query.messages, shown))

    def _forced(self, request: ChatRequest) -> Candidate | None:
        """The candidate that a study forces on this session, where the configuration lets it."""
        wish = request.headers.get("x-soma-force", "")
        allowed = self._config.adaptation.allow_force_header
        return Candidate(wish) if allowed and wish in (Candidate.PLAIN, Candidate.ADAPTER) else None
