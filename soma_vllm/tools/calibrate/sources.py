"""Judged cases from what was logged: `soma_log.json` of a replay, `evaluation.json` of an evaluation, and the
session database of a server.

Guarantees: everything wrong with a source is reported at once, with found and expected; a judgement that is
in two sources counts once; nothing is written to a source; no conversation text is retained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import AliasPath, BaseModel, Field, ValidationError

from soma_vllm.config import Gate, parse_config
from soma_vllm.errors import ConfigError
from soma_vllm.sessions.sql.store import reading
from soma_vllm.sessions.state.gate import COST_ORDER, judge
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.tools.calibrate.thresholds import Case, Missing, Outcome
from soma_vllm.tools.command_line import read_json
from soma_vllm.tools.evaluate.variants import PLAIN, Variant, as_configured
from soma_vllm.types import Agreement, Candidate, Event, Evidence, Role

SHOWN = 20
"""Problems of one source that are listed."""


@dataclass(frozen=True)
class Source:
    """What one source holds."""

    cases: tuple[Case, ...]
    drift_threshold: float | None = None
    """From the configuration stored with it, if there is one."""


# The fields that are read; a document may hold more.


class _Scored(BaseModel):
    gaps: tuple[float, ...]
    mean_gap: float | None
    passes: bool
    nll: float | None = None
    top1: float | None = None


class _Numbers(BaseModel):
    candidates: dict[Candidate, _Scored]
    accept_threshold: float
    accept_margin: float = 0.0
    min_agreement: float = 0.0
    min_gain: float = 0.0  # as in logs older than the key: any gain was enough
    min_turns: int = 1
    warm: _Scored | None = None
    """The plain surrogate on the whole warm start, where the held-out turns' numbers are beside it."""


class _Judgement(BaseModel):
    candidate: Candidate
    reason: str = ""
    numbers: _Numbers


class _Switch(BaseModel):
    candidate: Candidate
    adapter: str | dict[str, Any] | None = None  # a store keeps more than the name


class _Turn(BaseModel):
    builds_on: int
    engine: Role
    adapter: str | None
    phase: Phase


class _Audit(BaseModel):
    turn: int
    served_by: Role
    gap: float | None = None  # None where the original only scored


_KINDS: Mapping[str, type[BaseModel]] = {
    "judged": _Judgement,
    "switched": _Switch,
    "turn": _Turn,
    "audited": _Audit,
}


class _Session(BaseModel):
    session: str
    events: tuple[Event, ...]


class _Log(BaseModel):
    drift_threshold: float = Field(validation_alias=AliasPath("config", "gate", "drift_threshold"))
    sessions: dict[str, _Session] = Field(min_length=1)


class _Later(BaseModel):
    gap: float | None
    top1: float
    turns: int


class _Variant(BaseModel):
    sessions: dict[str, _Later]


class _Choice(_Judgement):
    numbers: _Numbers = Field(validation_alias="held_out")


class _Evaluation(BaseModel):
    config: dict[str, Any] = Field(validation_alias=AliasPath("settings", "config"))
    variants: dict[str, _Variant]
    chosen: dict[str, _Choice] = Field(min_length=1)


def read_file(path: Path) -> Source:
    """The cases of a `soma_log.json` or an `evaluation.json`; only the latter has a key `variants`.

    Raises:
        ConfigError: with everything that is wrong with the file.
    """
    source, document = str(path), read_json(path)
    evaluated = isinstance(document, dict) and "variants" in document
    try:
        if evaluated:
            return _read_evaluation(source, _Evaluation.model_validate(document))
        log = _Log.model_validate(document)
    except ValidationError as error:
        expected = "an evaluation.json" if evaluated else "a soma_log.json or an evaluation.json"
        more = f"expected {expected}, as soma writes it"
        raise _wrong(source, _problem_lines("", error), more) from None
    cases, problems = list[Case](), list[str]()
    for name, session in log.sessions.items():
        cases += _session_cases(f"{source}: {name}", session.session, session.events, problems)
    if problems:
        raise _wrong(source, problems)
    return Source(tuple(cases), log.drift_threshold)


async def read_store(url: str, tenant: str | None = None) -> Source:
    """The cases of a session database, of one tenant or of all.

    Raises:
        ConfigError: there is no session store at `url`, no such tenant, or an event is not as expected.
    """
    cases, problems = list[Case](), list[str]()
    async with reading(url) as store:
        keys = await store.keys(tenant)
        if tenant is not None and not keys:
            others = len({key.tenant for key in await store.keys()})
            raise ConfigError("--tenant", [f"found no session of {tenant!r}; {others} other tenants have some"])
        for key in keys:  # one at a time: events hold whole conversations
            events = await store.events(key)
            cases += _session_cases(f"{key.tenant}/{key.session}", key.session, events, problems)
    if problems:
        raise _wrong("--storage", problems)
    return Source(tuple(cases))


def merge(sources: Iterable[Source]) -> tuple[tuple[Case, ...], int]:
    """(all cases, how many were in more than one source and count once)."""
    found: dict[tuple[str, float, Candidate], Case] = {}
    repeated = 0
    for case in (case for source in sources for case in source.cases):
        key = (*case.judgement, case.candidate)
        repeated += key in found
        # A log that was written early may lack the outcome that a later source has.
        if key not in found or isinstance(found[key].outcome, Missing):
            found[key] = case
    return tuple(found.values()), repeated


def _read_evaluation(source: str, evaluation: _Evaluation) -> Source:
    """Every candidate that was judged has an outcome here, whatever the gate decided."""
    config = parse_config(evaluation.config, f"{source}: settings.config")
    names = {
        Candidate.PLAIN: Variant(PLAIN, config.prefix.mode).name,
        Candidate.ADAPTER: as_configured(config).name,
    }
    cases, problems = [], []
    for name, choice in evaluation.chosen.items():
        label = f"{source}: {name}"
        for case in _cases(label, 1, (label, 0.0), choice):
            variant = names[case.candidate]
            measured = evaluation.variants.get(variant)
            if measured is None or name not in measured.sessions:
                problems.append(f"variants.{variant}.sessions.{name}: found nothing; expected its later turns")
                continue
            later = measured.sessions[name]
            outcome = Missing.UNSPOKEN if later.gap is None else Outcome(later.gap, later.turns, later.top1)
            cases.append(case if case.outcome is Missing.VOID else replace(case, outcome=outcome, free=True))
    if problems:
        raise _wrong(source, problems)
    return Source(tuple(cases), config.gate.drift_threshold)


def _session_cases(label: str, session: str, events: Sequence[Event], problems: list[str]) -> list[Case]:
    """The cases of one session, with what audits found of the turns that each of them answered."""
    cases, adaptations, latest = list[Case](), 0, range(0)
    gaps: dict[int, list[float | None]] = {}  # of cases that served, by their index
    serving, adapter = None, None
    owners: dict[int, int | None] = {}
    for number, event in enumerate(events):
        try:
            data = _KINDS[event.kind].model_validate(dict(event.data)) if event.kind in _KINDS else None
        except ValidationError as error:
            problems += _problem_lines(f"{label}: events.{number} ({event.kind}): ", error)
            continue
        match data:
            case _Judgement():
                adaptations += 1
                found = _cases(label, adaptations, (session, event.at), data)
                latest = range(len(cases), len(cases) + len(found))
                cases += found
            case _Switch():
                serving = next((index for index in latest if cases[index].candidate is data.candidate), None)
                adapter = data.adapter["name"] if isinstance(data.adapter, dict) else data.adapter
                if serving is not None:
                    gaps.setdefault(serving, [])
            case _Turn():
                answered = data.engine is Role.SURROGATE and data.phase is Phase.SWITCHED
                # While the original is down the plain surrogate may stand in for it: not this candidate.
                own = answered and data.adapter == adapter
                owners[data.builds_on + 1] = serving if own else None
            case _Audit(served_by=Role.SURROGATE):
                owner = owners.get(data.turn)
                if owner is not None:
                    gaps[owner].append(data.gap)
    for index, found_gaps in gaps.items():
        cases[index] = replace(cases[index], outcome=_outcome(found_gaps))
    return cases


def _outcome(gaps: Sequence[float | None]) -> Outcome | Missing:
    """What the audits of a candidate that served amount to."""
    measured = [gap for gap in gaps if gap is not None and math.isfinite(gap)]
    if measured:
        return Outcome(fmean(measured), len(measured))
    return Missing.SCORED if None in gaps else Missing.UNAUDITED


def _cases(session: str, adaptation: int, judgement: tuple[str, float], data: _Judgement) -> list[Case]:
    """The candidates of one judgement; outcomes are filled in by later events."""
    numbers, chosen = data.numbers, data.candidate
    barred = _barred(numbers)
    cases = []
    for candidate, scored in numbers.candidates.items():
        if candidate not in COST_ORDER:
            continue
        if candidate is Candidate.PLAIN and numbers.warm is not None:
            scored = numbers.warm  # what the server judges it on
        mean = math.nan if scored.mean_gap is None else scored.mean_gap
        gap = round(mean + numbers.accept_margin, 6)
        top1 = scored.top1 if scored.top1 is not None and math.isfinite(scored.top1) else None
        if scored.passes:  # logged numbers are rounded; what passed in force passes here too
            gap = min(gap, numbers.accept_threshold)
            top1 = None if top1 is None else max(top1, numbers.min_agreement)
        if not math.isfinite(mean):
            missing = Missing.VOID
        elif chosen is Candidate.ORIGINAL:
            missing = Missing.REFUSED
        else:  # until its switch is read
            missing = Missing.ENDED if chosen is candidate else Missing.OTHER
        cases.append(
            Case(
                session=session,
                adaptation=adaptation,
                candidate=candidate,
                gap=gap,
                top1=top1,
                accept_threshold=numbers.accept_threshold,
                min_agreement=numbers.min_agreement,
                outcome=missing,
                barred=candidate in barred,
                free=chosen is candidate and data.reason.startswith("forced"),
                judgement=judgement,
            )
        )
    return cases


def _barred(numbers: _Numbers) -> set[Candidate]:
    """The candidates that the gate refuses even under the loosest thresholds."""
    loosest = Gate(accept_threshold=2.0, min_agreement=0.0, min_gain=numbers.min_gain)
    evidence = []
    for candidate, scored in numbers.candidates.items():
        scores = scored.nll is not None and scored.top1 is not None
        agreement = Agreement(scored.nll or 0.0, scored.top1 or 0.0, 0) if scores else None
        evidence.append(Evidence(candidate, scored.gaps, tuple(range(len(scored.gaps))), agreement))
    again = judge(evidence, loosest, numbers.min_turns).numbers["candidates"]
    return {Candidate(name) for name, scored in again.items() if not scored["passes"]}


def _problem_lines(where: str, error: ValidationError) -> list[str]:
    """One line for each thing that is wrong."""
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"]) or "the document"
        found = "nothing" if item["type"] == "missing" else _brief(item["input"])
        lines.append(f"{where}{place}: found {found}; expected: {item['msg']}")
    return lines


def _brief(value: object) -> str:
    """A value as an error quotes it: a long one by its type alone, since it may hold a conversation."""
    if isinstance(value, dict | list | str) and len(value) > 40:
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"


def _wrong(source: str, problems: Sequence[str], *more: str) -> ConfigError:
    left = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return ConfigError(source, [*problems[:SHOWN], *left, *more])
