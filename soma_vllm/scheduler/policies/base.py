"""What a policy is: an object with one method, and a second one where deciding takes time.

To add one, write a class with `adapting` and `route` and name it in the entry-point group `soma_vllm.policies`
of your own package; docs/policies.md shows how. It is constructed with the configuration, and raises
ConfigError where that does not suffice. `route` is pure and fast: it is on the path of every request. A policy
that must compute something first has `prepare` too, which the dispatcher awaits, and which must not block.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any, Protocol, cast, runtime_checkable

from soma_vllm.config import Config
from soma_vllm.errors import BadRequest, ConfigError, PolicyUnavailable, Unprocessable
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn_query import TurnQuery
from soma_vllm.types import Route

__all__ = ["AdaptationRules", "Policies", "Policy", "PreparingPolicy", "TurnQuery", "prepared"]

GROUP = "soma_vllm.policies"


class Policy(Protocol):
    """Decides who answers a turn."""

    adapting: AdaptationRules | None
    """How sessions under this policy are adapted in the background; None: not at all."""

    def route(self, session: Session, query: TurnQuery) -> Route:
        """Who answers this turn, with which messages, and why."""
        ...


@runtime_checkable
class PreparingPolicy(Policy, Protocol):
    """A policy that computes something before it decides."""

    async def open(self) -> None:
        """Start what `prepare` needs, where this policy is the configured one; else the first `prepare` does.

        Raises:
            PolicyUnavailable: it does not start.
        """
        ...

    async def prepare(self, session: Session, query: TurnQuery) -> Any:
        """What `route` will find in `query.prepared`. Runs concurrently with other requests; must not block.

        Raises:
            PolicyUnavailable: it cannot decide now.
        """
        ...

    async def close(self) -> None:
        """End what was started."""
        ...


async def prepared(policy: Policy, session: Session, query: TurnQuery) -> TurnQuery:
    """The turn with what its policy needs to decide."""
    if not isinstance(policy, PreparingPolicy):
        return query
    try:
        return replace(query, prepared=await policy.prepare(session, query))
    except PolicyUnavailable as error:
        return replace(query, unprepared=str(error))


class Policies:
    """The installed policies by name, each made when it is first asked for."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError: no installed package has the configured policy, or it is not configured."""
        self._config = config
        self._known = {entry.name: entry for entry in entry_points(group=GROUP)}
        self._made: dict[str, Policy] = {}
        if config.policy not in self._known:
            raise ConfigError(
                "config", [f"policy: found {config.policy!r}; expected one of {', '.join(self.names())}"]
            )
        self.default = self._make(config.policy)

    def names(self) -> list[str]:
        """Every policy that may be asked for."""
        return sorted(self._known)

    def named(self, name: str) -> Policy:
        """A policy.

        Raises:
            BadRequest: there is none of that name.
            Unprocessable: the configuration does not suffice for it.
        """
        if name not in self._known:
            raise BadRequest(f"policy: found {name!r}; expected one of {', '.join(self.names())}", "policy")
        if name not in self._made:
            try:
                self._make(name)
            except ConfigError as error:
                why = "; ".join(error.problems)
                raise Unprocessable(f"policy {name!r} is not set up here: {why}", "policy") from error
        return self._made[name]

    def needs_leave(self, policy: Policy) -> bool:
        """Whether requests may choose a policy only where the operator lets them: it trains, or starts
        something to decide, and is not the configured one."""
        costs = policy.adapting is not None or isinstance(policy, PreparingPolicy)
        return costs and policy is not self.default

    def _make(self, name: str) -> Policy:
        self._made[name] = cast(Policy, self._known[name].load()(self._config))
        return self._made[name]

    async def open(self) -> None:
        """Start what the configured policy needs. Raises PolicyUnavailable."""
        if isinstance(self.default, PreparingPolicy):
            await self.default.open()

    async def close(self) -> None:
        """End what any policy started."""
        for policy in self._made.values():
            if isinstance(policy, PreparingPolicy):
                await policy.close()
