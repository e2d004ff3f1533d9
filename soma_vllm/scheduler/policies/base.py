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
from soma_vllm.errors import ConfigError
from soma_vllm.session.session import Session
from soma_vllm.types import Message, Route

GROUP = "soma_vllm.policies"


@dataclass(frozen=True)
class Asked:
    """The turn to be routed."""

    messages: tuple[Message, ...]
    """The client's messages, whole."""
    body: Mapping[str, Any]
    """The client's whole request."""
    builds_on: int
    """Recorded turns that the client's history repeats."""
    added: tuple[Message, ...]
    """The messages that follow those turns."""
    distance: float | None
    """Cosine distance of the query to the warm start's centroid; None where the session has none."""


class Policy(Protocol):
    """Decides who answers a turn."""

    adapts: bool
    """Whether sessions under this policy are adapted in the background."""

    def route(self, session: Session, asked: Asked) -> Route:
        """Who answers this turn, with which messages, and why."""
        ...


def load_policy(config: Config) -> Policy:
    """The policy that the configuration names.

    Raises:
        ConfigError: no installed package has a policy of that name.
    """
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if config.policy not in known:
        names = ", ".join(sorted(known)) or "none installed"
        raise ConfigError("config", [f"policy: found {config.policy!r}; expected one of {names}"])
    return cast(Policy, known[config.policy].load()(config))
