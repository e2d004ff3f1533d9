"""What a policy is: an object with one method.

To add one, write a class with `adapts` and `route`, and name it in the entry-point group `soma_vllm.policies`
of your own package. It is constructed with the configuration. `route` is pure and fast: it is on the path of
every request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

from soma_vllm.config import Config
from soma_vllm.errors import BadRequest, ConfigError
from soma_vllm.session.session import Session
from soma_vllm.session.transcript import Reading
from soma_vllm.types import Message, Route

GROUP = "soma_vllm.policies"


@dataclass(frozen=True)
class Asked:
    """The turn to be routed."""

    reading: Reading
    """The client's messages, whole, and their digests."""
    body: Mapping[str, Any]
    """The client's whole request."""
    builds_on: int
    """Recorded turns that the client's history repeats."""
    added: tuple[Message, ...]
    """The messages that follow those turns."""
    distance: float | None
    """Cosine distance of the query to the warm start's centroid; None where the session has none."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The client's messages, whole."""
        return self.reading.messages


class Policy(Protocol):
    """Decides who answers a turn."""

    adapts: bool
    """Whether sessions under this policy are adapted in the background."""

    def route(self, session: Session, asked: Asked) -> Route:
        """Who answers this turn, with which messages, and why."""
        ...


class Policies:
    """The installed policies by name, each made when it is first asked for."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError: no installed package has the configured policy."""
        self._config = config
        self._known = {entry.name: entry for entry in entry_points(group=GROUP)}
        self._made: dict[str, Policy] = {}
        if config.policy not in self._known:
            raise ConfigError(
                "config", [f"policy: found {config.policy!r}; expected one of {', '.join(self.names())}"]
            )
        self.default = self.named(config.policy)

    def names(self) -> list[str]:
        """Every policy that may be asked for."""
        return sorted(self._known)

    def named(self, name: str) -> Policy:
        """A policy.

        Raises:
            BadRequest: there is none of that name.
        """
        if name not in self._known:
            raise BadRequest(f"policy: found {name!r}; expected one of {', '.join(self.names())}", "policy")
        if name not in self._made:
            self._made[name] = cast(Policy, self._known[name].load()(self._config))
        return self._made[name]
