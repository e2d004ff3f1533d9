"""What `soma calibrate` needs of the documents it reads, and how it tells what is wrong with them.

Only the fields that are read are named here; a document may hold more.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, ValidationError

from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import Candidate, Role


class Scored(BaseModel):
    """One candidate on held-out turns."""

    gaps: tuple[float, ...]
    mean_gap: float | None
    passes: bool
    nll: float | None = None
    top1: float | None = None


class GateNumbers(BaseModel):
    """What the gate noted of a judgement."""

    candidates: dict[Candidate, Scored]
    accept_threshold: float
    accept_margin: float = 0.0
    min_agreement: float = 0.0
    min_gain: float = 0.0
    """0 in logs older than the key: any gain was enough."""
    min_turns: int = 1


class Judgement(BaseModel):
    """A `judged` event."""

    candidate: Candidate
    reason: str = ""
    numbers: GateNumbers


class Switch(BaseModel):
    """A `switched` event."""

    candidate: Candidate
    adapter: str | dict[str, Any] | None = None

    @property
    def name(self) -> str | None:
        """The adapter's name; a store keeps more of it than a log."""
        return self.adapter["name"] if isinstance(self.adapter, dict) else self.adapter


class AnsweredTurn(BaseModel):
    """A `turn` event."""

    builds_on: int
    engine: Role
    adapter: str | None
    phase: Phase


class Audit(BaseModel):
    """An `audited` event; without a gap where the original only scored."""

    turn: int
    served_by: Role
    gap: float | None = None


class LoggedEvent(BaseModel):
    """An event as a log holds it."""

    kind: str
    at: float
    data: dict[str, Any]


class LoggedSession(BaseModel):
    """A session of a replay."""

    session: str
    events: tuple[LoggedEvent, ...]


class LoggedGate(BaseModel):
    """Section `gate` of the configuration kept in a log."""

    drift_threshold: float


class LoggedConfig(BaseModel):
    """The configuration kept in a log."""

    gate: LoggedGate


class ReplayLog(BaseModel):
    """`soma_log.json`."""

    config: LoggedConfig
    sessions: dict[str, LoggedSession] = Field(min_length=1)


class LaterTurns(BaseModel):
    """One variant on the later turns of one session."""

    gap: float | None
    top1: float
    turns: int


class MeasuredVariant(BaseModel):
    """One variant, by session."""

    sessions: dict[str, LaterTurns]


class Choice(BaseModel):
    """What the gate made of one session."""

    candidate: Candidate
    held_out: GateNumbers


class Settings(BaseModel):
    """What an evaluation rests on."""

    config: dict[str, Any]


class Evaluation(BaseModel):
    """`evaluation.json`."""

    settings: Settings
    variants: dict[str, MeasuredVariant]
    chosen: dict[str, Choice] = Field(min_length=1)


def problem_lines(where: str, error: ValidationError) -> list[str]:
    """One line for each thing that is wrong."""
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"]) or "the document"
        found = "nothing" if item["type"] == "missing" else _brief(item["input"])
        lines.append(f"{where}{place}: found {found}; expected: {item['msg']}")
    return lines


def _brief(value: object) -> str:
    """A value as an error quotes it: a container by its type, since it may hold a conversation."""
    if isinstance(value, dict | list | str) and len(value) > 40:
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
