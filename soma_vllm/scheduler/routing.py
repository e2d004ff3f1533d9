"""Who answers a request: the engine that it names, a pinned one, the caller of a tool, or the policy's choice.

Guarantees: the result of a tool goes to the engine that called the tool, or to the original; a policy is not
asked for the route of a pinned session, nor where it could not prepare.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from soma_vllm.adaptation.threaded_encoder import Encoder
from soma_vllm.config import ANY_POLICY, Config
from soma_vllm.engines.engine import Engine, Engines
from soma_vllm.errors import (
    AdapterError,
    BadRequest,
    EngineRefused,
    EngineUnavailable,
    Forbidden,
    MalformedCall,
    NoAdapterSlot,
    NoSuchModel,
)
from soma_vllm.scheduler.policies.base import Policies, Policy, TurnQuery, prepared
from soma_vllm.scheduler.turn_context import ChatRequest, TurnContext
from soma_vllm.sessions.state.gate import gap
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.transcript import TranscriptDigest, query_of, text_of
from soma_vllm.types import Message, Reason, ReasonCode, Role, Route

logger = logging.getLogger(__name__)

DISPATCH_NAME = "soma"
"""The model name that asks for dispatch; `soma:<policy>` under another policy than the configured one. The
engines' own names bypass it."""

SWITCH = "x-soma"
"""The header that opts a request out of dispatch."""

HEADERS = frozenset(
    {SWITCH, "x-soma-policy", "x-soma-force"}
    | {f"x-soma-{name}" for name in ("session", "engine", "adapter", "phase", "reason", "branch", "history")}
)
"""Headers of a request under our prefix: those that it may steer by, and a reply's, which some clients send
back."""

RESULTS = ("tool", "function")
"""Roles of messages that bring what a tool found."""


class Routing:
    """Decides who answers."""

    def __init__(self, config: Config, policies: Policies, engines: Engines, encoder: Encoder) -> None:
        self._config = config
        self._policies = policies
        self._engines = engines
        self._encoder = encoder

    def resolve(self, request: ChatRequest, allowed: Sequence[str]) -> tuple[Policy, Engine | None]:
        """(the policy of a request, the engine that it names to bypass dispatch). `allowed` are the policies
        that need the operator's leave and have it.

        Raises:
            BadRequest: there is no such model, or no such policy.
            Forbidden: the policy trains, or starts a package, and is not allowed.
        """
        original, surrogate = self._engines.original, self._engines.surrogate
        model = request.body.get("model")
        policy = request.headers.get("x-soma-policy")
        _check_headers(request.headers)
        served = (DISPATCH_NAME, original.name, surrogate.name)
        if model is None:
            raise BadRequest(f"model: found none; expected one of {', '.join(served)}", "model")
        if model not in served:
            prefix, colon, policy = str(model).partition(":")
            if prefix != DISPATCH_NAME or not colon:
                raise no_such_model(str(model), served)
        chosen = self._policies.default if policy is None else self._policies.named(policy)
        if (
            policy is not None
            and self._policies.needs_leave(chosen)
            and not {policy, ANY_POLICY} & set(allowed)
        ):
            free = f"{self._config.policy}, one that neither trains nor starts a package"
            named = f", or one of this key's limits.policies ({', '.join(allowed)})" if allowed else ""
            raise Forbidden(f"policy: found {policy!r}, which this key may not use; expected {free}{named}")
        if model == original.name or (
            model != surrogate.name and request.headers.get(SWITCH, "").lower() == "off"
        ):
            return chosen, original
        return chosen, surrogate if model == surrogate.name else None

    async def decide(self, turn: TurnContext) -> None:
        """Set the turn's query, session and route. The adapter it may need begins to load first."""
        session = turn.session
        self._prefetch(session)
        overlap = turn.overlap
        added = turn.digest.messages[overlap.end :]
        distance = await self._distance(session, turn.digest)
        query = TurnQuery(turn.digest, turn.request.body, overlap.turns, added, distance)
        turn.query = await prepared(turn.policy, turn.session, query)
        session = turn.session  # as it is now: encoding and preparing take a while
        turn.routed = session
        turn.route = self._route(session, turn.query, turn.policy)

    def without_surrogate(self, turn: TurnContext, error: Exception) -> Route:
        """The route of a turn that the surrogate failed to answer."""
        malformed = isinstance(error, MalformedCall)
        code = ReasonCode.MALFORMED_CALL if malformed else ReasonCode.SURROGATE_FAILED
        reason = Reason(f"surrogate failed: {_kind(error)}", code)
        return Route(Role.ORIGINAL, None, turn.query.messages, reason)

    def without_original(self, turn: TurnContext) -> Route | None:
        """The route of a turn while the original is down; None where the request is to fail."""
        if self._config.original.when_down != "surrogate":
            return None
        reason = Reason("original unavailable", ReasonCode.ORIGINAL_UNAVAILABLE)
        return Route(Role.SURROGATE, None, turn.query.messages, reason)

    def _prefetch(self, session: Session) -> None:
        """Begin to load the adapter of a session that returns, while its request is read."""
        ref = session.adapter
        if ref is not None and session.phase is Phase.SWITCHED:
            self._engines.adapters.prefetch(ref)

    async def _distance(self, session: Session, digest: TranscriptDigest) -> float | None:
        """Cosine distance of the query to the warm start's centroid; None where the session has none."""
        center = session.centroid_vector()
        if session.phase is not Phase.SWITCHED or center is None:
            return None
        (vector,) = await self._encoder.encode([text_of(query_of(digest.messages))])
        return gap(vector, center)

    def _route(self, session: Session, query: TurnQuery, policy: Policy) -> Route:
        """To the caller of the tool whose result this is, else to the pinned engine, else by the policy."""
        if query.added and query.added[-1].get("role") in RESULTS and query.builds_on:
            return self._to_caller(session, query)
        if session.pinned is not None:
            pinned = Reason("pinned", ReasonCode.PINNED)
            if session.pinned is Role.ORIGINAL:
                return Route(Role.ORIGINAL, None, query.messages, pinned)
            return Route(Role.SURROGATE, session.adapter, self._compressed(query), pinned)
        if query.unprepared is not None:
            logger.warning("the original answers, because the policy cannot decide: %s", query.unprepared)
            reason = Reason("policy not ready", ReasonCode.UNPREPARED)
            return Route(Role.ORIGINAL, None, query.messages, reason)
        return policy.route(session, query)

    def _to_caller(self, session: Session, query: TurnQuery) -> Route:
        to_original = Route(Role.ORIGINAL, None, query.messages, Reason("tool result", ReasonCode.TOOL_RESULT))
        if any(message.get("role") == "assistant" for message in query.added):
            return to_original  # the call is not on record
        caller = session.turns[query.builds_on - 1]
        serving = None if session.adapter is None else session.adapter.name
        if (
            caller.engine is not Role.SURROGATE
            or session.phase is not Phase.SWITCHED
            or caller.adapter != serving
        ):
            return to_original
        reason = Reason("tool result to its caller", ReasonCode.TOOL_RESULT)
        return Route(Role.SURROGATE, session.adapter, self._compressed(query), reason)

    def _compressed(self, query: TurnQuery) -> tuple[Message, ...]:
        """The history as the surrogate is shown it."""
        return compress(query.messages, self._config.prefix, self._config.compressed_prefix_turns)


def _kind(error: Exception) -> str:
    """What failed, in words of our own: a message may hold paths, and line ends. It is logged."""
    if isinstance(error, EngineRefused):
        return f"refused with status {error.status}"
    kinds = (
        (NoAdapterSlot, "no adapter slot"),
        (MalformedCall, "malformed call of a tool"),
        (AdapterError, "adapter"),
        (EngineUnavailable, "unavailable"),
    )
    return next((words for kind, words in kinds if isinstance(error, kind)), "engine error")


def _check_headers(headers: Mapping[str, str]) -> None:
    """Refuse what would be ignored without a word. Raises BadRequest."""
    unknown = sorted(name for name in headers if name.startswith("x-soma-") and name not in HEADERS)
    if unknown:
        raise BadRequest(f"{unknown[0][:100]}: found an unknown header; expected X-SOMA, -Policy or -Force")
    for name, expected in ((SWITCH, ("on", "off")), ("x-soma-force", ("plain", "adapter"))):
        if (found := headers.get(name)) is not None and found.lower() not in expected:
            raise BadRequest(f"{name}: found {found[:100]!r}; expected {' or '.join(expected)}")


def no_such_model(model: str, served: Iterable[str]) -> NoSuchModel:
    """The refusal of a model's name."""
    return NoSuchModel(f"model: found {model[:200]!r}; expected one of {', '.join(served)}", "model")
