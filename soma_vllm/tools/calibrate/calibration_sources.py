"""Judged cases from what was logged: `soma_log.json` of a replay, `evaluation.json` of an evaluation, and the
session database of a server.

Guarantees: everything wrong with a source is reported at once, with found and expected; a judgement that lies
in two sources counts once; nothing is written to a source; no conversation text is kept. A further kind of
source is one more function that returns a `Reading`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel, ValidationError

from soma_vllm.config import Gate, parse_config
from soma_vllm.errors import ConfigError
from soma_vllm.sessions.sql.store import reading
from soma_vllm.sessions.state.gate import COST_ORDER, judge
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.tools.calibrate.calibration_shapes import (
    AnsweredTurn,
    Audit,
    Evaluation,
    GateNumbers,
    Judgement,
    ReplayLog,
    Switch,
    problem_lines,
)
from soma_vllm.tools.calibrate.thresholds import Case, Missing, Outcome
from soma_vllm.tools.evaluate.variants import PLAIN, Variant, as_configured
from soma_vllm.types import Agreement, Candidate, Event, Evidence, Role

SHOWN = 20
"""Problems of one source that are told one by one."""


@dataclass(frozen=True)
class Judged:
    """A case, and by what it is recognised in another source."""

    session: str
    """The session's id, without tenant or file."""
    at: float
    """Unix time of the judgement, seconds."""
    case: Case


@dataclass(frozen=True)
class Reading:
    """What one source holds."""

    judged: tuple[Judged, ...]
    drift_threshold: float | None = None
    """Of the configuration that is kept with it, where one is."""
    void: int = 0
    """Candidates judged on no number, or on one that is not finite: they are no cases."""


_KINDS: Mapping[str, type[BaseModel]] = {
    "judged": Judgement,
    "switched": Switch,
    "turn": AnsweredTurn,
    "audited": Audit,
}
"""Events that a case is made of."""


def read_file(path: Path) -> Reading:
    """The cases of a `soma_log.json` or an `evaluation.json`; which of them it is, its keys tell.

    Raises:
        ConfigError: with everything that is wrong with the file.
    """
    source = str(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(source, [f"cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError(source, [f"is not JSON: {error}"]) from error
    evaluated = isinstance(document, dict) and "variants" in document
    try:
        if evaluated:
            return _evaluated(source, Evaluation.model_validate(document))
        return _logged(source, ReplayLog.model_validate(document))
    except ValidationError as error:
        expected = "an evaluation.json" if evaluated else "a soma_log.json or an evaluation.json"
        lines = _at_most(problem_lines("", error))
        raise ConfigError(source, [*lines, f"expected {expected}, as soma writes it"]) from None


def _logged(source: str, log: ReplayLog) -> Reading:
    reader = _Reader()
    for name, session in log.sessions.items():
        events = [Event(event.kind, event.at, event.data) for event in session.events]
        reader.read(f"{source}: {name}", session.session, events)
    return reader.reading(source, log.config.gate.drift_threshold)


def _evaluated(source: str, evaluation: Evaluation) -> Reading:
    """Every candidate that was judged has an outcome here, whatever the gate decided."""
    config = parse_config(evaluation.settings.config, f"{source}: settings.config")
    standing = {
        Candidate.PLAIN: Variant(PLAIN, config.prefix.mode).name,
        Candidate.ADAPTER: as_configured(config).name,
    }
    judged, problems, void = [], [], 0
    for name, choice in evaluation.chosen.items():
        label = f"{source}: {name}"
        cases = _cases(label, 1, choice.candidate, "", choice.held_out)
        void += len(choice.held_out.candidates) - len(cases)
        for case in cases:
            variant = standing[case.candidate]
            measured = evaluation.variants.get(variant)
            if measured is None or name not in measured.sessions:
                problems.append(f"variants.{variant}.sessions.{name}: found nothing; expected its later turns")
                continue
            later = measured.sessions[name]
            outcome = Missing.UNSPOKEN if later.gap is None else Outcome(later.gap, later.turns, later.top1)
            judged.append(Judged(label, 0.0, replace(case, outcome=outcome, free=True)))
    if problems:
        raise ConfigError(source, _at_most(problems))
    return Reading(tuple(judged), config.gate.drift_threshold, void)


async def read_store(url: str, tenant: str | None = None) -> Reading:
    """The cases of a session database, of one tenant or of all.

    Raises:
        ConfigError: there is no session store at `url`, no such tenant, or an event is not as expected.
    """
    reader = _Reader()
    async with reading(url) as store:
        keys = await store.keys(tenant)
        if tenant is not None and not keys:
            others = len({key.tenant for key in await store.keys()})
            raise ConfigError("--tenant", [f"found no session of {tenant!r}; {others} other tenants have some"])
        for key in keys:  # one at a time: events hold whole conversations
            reader.read(f"{key.tenant}/{key.session}", key.session, await store.events(key))
    return reader.reading("--storage")


def merged(readings: Iterable[Reading]) -> tuple[tuple[Case, ...], int]:
    """(all cases, how many were in more than one source and count once)."""
    found: dict[tuple[str, float, Candidate], Case] = {}
    repeated = 0
    for item in (item for one in readings for item in one.judged):
        key = (item.session, item.at, item.case.candidate)
        repeated += key in found
        # A log that was written early may lack the outcome that a later source has.
        if key not in found or isinstance(found[key].outcome, Missing):
            found[key] = item.case
    return tuple(found.values()), repeated


@dataclass
class _Draft:
    """A candidate whose later turns are still being read."""

    session: str
    at: float
    case: Case
    served: bool = False
    scored: bool = False
    gaps: list[float] = field(default_factory=list)

    def done(self) -> Judged:
        outcome: Outcome | Missing = self.case.outcome
        if self.gaps:
            outcome = Outcome(fmean(self.gaps), len(self.gaps))
        elif self.served:
            outcome = Missing.SCORED if self.scored else Missing.UNAUDITED
        return Judged(self.session, self.at, replace(self.case, outcome=outcome))


class _Reader:
    """Collects cases and problems over the sessions of one source."""

    def __init__(self) -> None:
        self._drafts: list[_Draft] = []
        self._problems: list[str] = []
        self._void = 0

    def read(self, label: str, session: str, events: Sequence[Event]) -> None:
        """Take the cases of one session."""
        adaptations = 0
        judged: list[_Draft] = []
        serving: _Draft | None = None
        adapter: str | None = None
        owners: dict[int, _Draft] = {}
        for number, event in enumerate(events):
            data = self._parsed(f"{label}: events.{number} ({event.kind})", event)
            if isinstance(data, Judgement):
                adaptations += 1
                judged = self._judged(label, session, adaptations, event.at, data)
            elif isinstance(data, Switch):
                serving = next((d for d in judged if d.case.candidate is data.candidate), None)
                adapter = data.name
                if serving is not None:
                    serving.served = True
            elif isinstance(data, AnsweredTurn):
                answered = data.engine is Role.SURROGATE and data.phase is Phase.SWITCHED
                owners.pop(data.builds_on + 1, None)
                # While the original is down the plain surrogate may stand in for it: not this candidate.
                if answered and serving is not None and data.adapter == adapter:
                    owners[data.builds_on + 1] = serving
            elif isinstance(data, Audit) and data.served_by is Role.SURROGATE and data.turn in owners:
                owner = owners[data.turn]
                owner.scored |= data.gap is None
                owner.gaps += [] if data.gap is None or not isfinite(data.gap) else [data.gap]

    def reading(self, source: str, drift_threshold: float | None = None) -> Reading:
        """What was found.

        Raises:
            ConfigError: with every event that is not as expected.
        """
        if self._problems:
            raise ConfigError(source, _at_most(self._problems))
        return Reading(tuple(draft.done() for draft in self._drafts), drift_threshold, self._void)

    def _parsed(self, where: str, event: Event) -> BaseModel | None:
        model = _KINDS.get(event.kind)
        if model is None:
            return None
        try:
            return model.model_validate(dict(event.data))
        except ValidationError as error:
            self._problems += problem_lines(f"{where}: ", error)
            return None

    def _judged(self, label: str, session: str, adaptation: int, at: float, data: Judgement) -> list[_Draft]:
        cases = _cases(label, adaptation, data.candidate, data.reason, data.numbers)
        self._void += len(data.numbers.candidates) - len(cases)
        drafts = [_Draft(session, at, case) for case in cases]
        self._drafts += drafts
        return drafts


def _cases(
    label: str, adaptation: int, chosen: Candidate, reason: str, numbers: GateNumbers
) -> tuple[Case, ...]:
    """The candidates of one judgement, without outcomes yet; none for a gap that is not a number."""
    bars = _barred(numbers)
    cases = []
    for candidate, scored in numbers.candidates.items():
        if candidate not in COST_ORDER or scored.mean_gap is None or not isfinite(scored.mean_gap):
            continue
        gap = round(scored.mean_gap + numbers.accept_margin, 6)
        top1 = scored.top1 if scored.top1 is not None and isfinite(scored.top1) else None
        if scored.passes:  # logged numbers are rounded; what passed in force passes here too
            gap = min(gap, numbers.accept_threshold)
            top1 = None if top1 is None else max(top1, numbers.min_agreement)
        missing = Missing.OTHER
        if chosen is Candidate.ORIGINAL:
            missing = Missing.REFUSED
        elif chosen is candidate:
            missing = Missing.ENDED  # until its switch is read
        cases.append(
            Case(
                session=label,
                adaptation=adaptation,
                candidate=candidate,
                gap=gap,
                top1=top1,
                accept_threshold=numbers.accept_threshold,
                min_agreement=numbers.min_agreement,
                outcome=missing,
                barred=bars[candidate],
                free=chosen is candidate and reason.startswith("forced"),
            )
        )
    return tuple(cases)


def _barred(numbers: GateNumbers) -> Mapping[Candidate, bool]:
    """Whom the gate would refuse under the loosest thresholds: it is asked again, with those."""
    loosest = Gate(accept_threshold=2.0, min_agreement=0.0, min_gain=numbers.min_gain)
    evidence = []
    for candidate, scored in numbers.candidates.items():
        scores = scored.nll is not None and scored.top1 is not None
        agreement = Agreement(scored.nll or 0.0, scored.top1 or 0.0, 0) if scores else None
        evidence.append(Evidence(candidate, scored.gaps, tuple(range(len(scored.gaps))), agreement))
    again = judge(evidence, loosest, numbers.min_turns).numbers["candidates"]
    return {Candidate(name): not scored["passes"] for name, scored in again.items()}


def _at_most(lines: Sequence[str]) -> list[str]:
    if len(lines) <= SHOWN:
        return list(lines)
    return [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]
