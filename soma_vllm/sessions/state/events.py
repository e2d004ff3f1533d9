"""The kinds of events in a session's log, and the payloads that several rooms read.

Kinds and keys are on disk and on the wire: never renamed. Guarantee: `from_data(data).to_data()` is `data`
for what this version writes; what an older version left out has the default. A turn's payload is in
`sessions/state/turn.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal, Self

from soma_vllm.types import AdapterRef, Candidate, Role

AuditKind = Literal["gap", "surprise"]
"""What an audit measured: the gap of two answers, or the original's surprise at one, in nats per token."""

_READ: Mapping[str, Callable[[Any], object]] = {
    "candidate": Candidate,
    "adapter": lambda ref: AdapterRef(**ref),
    "centroid": tuple,
    "tools": tuple,
    "served_by": Role,
}
"""Fields whose JSON stands for another type."""


class EventKind(StrEnum):
    """What happened to a session. `types.Event` carries the numbers."""

    TURN = "turn"
    """A turn was answered."""
    VARIANT = "variant"
    """An answer beside the one that counts: of several choices (OpenAI's `n`), or to a request aside."""
    RESUMED = "resumed"
    """The dialogue goes on from another answer than the one that counted last."""
    TURN_SKIPPED = "turn_skipped"
    """A turn cannot teach."""
    ADAPTATION_STARTED = "adaptation_started"
    """Judging and training began."""
    TRAINING_SUBMITTED = "training_submitted"
    """A training was handed to a trainer."""
    TRAINED = "trained"
    """A training ended; its costs."""
    ADAPTER_PUBLISHED = "adapter_published"
    """An adapter's files are in the store."""
    ADAPTER_LOADED = "adapter_loaded"
    """The engine serves the adapter as it was trained."""
    ADAPTER_REJECTED = "adapter_rejected"
    """The engine does not serve it as it was trained."""
    JUDGED = "judged"
    """The gate's verdict, with its numbers."""
    PAYBACK_JUDGED = "payback_judged"
    """Whether an adapter pays for itself."""
    SWITCHED = "switched"
    """The surrogate serves the session from now on."""
    REFUSED = "refused"
    """The gate keeps the session with the original."""
    TRAINING_FAILED = "training_failed"
    """The adaptation ended in an error."""
    ADAPTATION_ABANDONED = "adaptation_abandoned"
    """The session was closed or rewritten during its adaptation."""
    AUDITED = "audited"
    """A turn of the surrogate was compared with the original."""
    AUDIT_DROPPED = "audit_dropped"
    """An audit found no idle engine in time."""
    LOCALITY_MISS = "locality_miss"
    """A query was too far from the warm start."""
    ROLLED_BACK = "rolled_back"
    """The original serves the session again."""
    ADAPTER_DRAINING = "adapter_draining"
    """No new request uses the adapter."""
    ADAPTER_RETIRED = "adapter_retired"
    """The adapter's files are deleted."""
    ADAPTER_EVICTED = "adapter_evicted"
    """The session lost its adapter to a budget."""
    BRANCHED = "branched"
    """The session begins with turns of another one."""
    INHERITED = "inherited"
    """A branch is served as its parent is."""
    RESTARTED = "restarted"
    """The session is adapted anew."""
    PINNED = "pinned"
    """An administrator bound the session to an engine, or released it."""
    CLOSED = "closed"
    """The session is being removed."""


@dataclass(frozen=True)
class Payload:
    """What an event of one kind says, as stored: a JSON object with the fields' names as keys."""

    def to_data(self) -> dict[str, Any]:
        """The event's data."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """The payload of stored data; keys of later versions are ignored."""
        given = ((name, data[name]) for name in cls.__dataclass_fields__ if data.get(name) is not None)
        return cls(**{name: _READ[name](value) if name in _READ else value for name, value in given})


@dataclass(frozen=True)
class Judged(Payload):
    """The gate's verdict."""

    candidate: Candidate
    reason: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The evidence and the thresholds in force, as `Verdict.numbers`."""


@dataclass(frozen=True)
class Switched(Payload):
    """Who serves the session from now on, and why."""

    candidate: Candidate
    reason: str = ""
    adapter: AdapterRef | None = None
    centroid: tuple[float, ...] | None = None
    """Mean embedding of the warm start's queries, shape (d,)."""
    tools: tuple[str, ...] = ()
    """`Session.tools`; left out where there are none."""

    def to_data(self) -> dict[str, Any]:
        """The event's data."""
        data = super().to_data()
        return data if self.tools else {name: value for name, value in data.items() if name != "tools"}


@dataclass(frozen=True)
class Trained(Payload):
    """What a training cost, and what it reached."""

    mining_s: float
    finetune_s: float
    scoring_s: float
    """Seconds of each stage."""
    steps: int = 0
    distilled: bool = False
    flops: float = 0.0
    losses: list[float] | None = None
    hardness: Mapping[str, float] | None = None
    """By the turn's number."""
    checkpoints: list[Mapping[str, float]] | None = None
    """Steps, and NLL and top-1 agreement on held-out turns after them."""
    plain: Mapping[str, float] | None = None
    adapted: Mapping[str, float] | None = None
    """Agreement on held-out turns; None where nothing was held out."""

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage."""
        return {"mining": self.mining_s, "finetune": self.finetune_s, "scoring": self.scoring_s}


@dataclass(frozen=True)
class Audited(Payload):
    """What the comparison of one turn found."""

    turn: int
    kind: AuditKind = "gap"
    gap: float | None = None
    """Where `kind` is "gap"."""
    surprise: float | None = None
    """Where `kind` is "surprise": nats per token."""
    top1: float | None = None
    served_by: Role = Role.SURROGATE

    @property
    def value(self) -> float:
        """What `kind` names."""
        found = self.gap if self.kind == "gap" else self.surprise
        assert found is not None, f"an audit of kind {self.kind} without its value"
        return found
