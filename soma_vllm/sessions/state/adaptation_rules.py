"""How sessions under a policy are adapted in the background: a value that a policy states once.

Guarantee: it is recorded with every adaptation (`adaptation_started`), so that a session's record says by
which rules it came to be served, and a restart takes it up by the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AdaptationRules:
    """The rules of an adaptation."""

    policy: str = "soma"
    """Name of the policy. A switch serves requests under this policy only."""
    gate: bool = True
    """Candidates are judged on turns held out of training, audited while they serve, and rolled back on drift.
    False: the adapter learns from the whole warm start and serves as soon as it is loaded, for good."""
    mining: bool = True
    """Soft prompts are mined where `mining.enabled` says so. False: never, and every turn weighs the same."""


def adapting_of(data: Mapping[str, Any]) -> AdaptationRules:
    """The rules in an event's data; those of the default policy where it names none."""
    found = data.get("adapting")
    return AdaptationRules() if found is None else AdaptationRules(**found)
