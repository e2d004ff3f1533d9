"""What a replay was expected to show: whether it did; if not, what was seen and what to do.

Pure: from records to lines. No query or answer is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

from soma_vllm.tools.replay.replay_view import SessionRecord

SEEN_SESSIONS = 4
"""Sessions that the lines about a missed expectation describe."""


class Expectation(StrEnum):
    """What a replay may be asked to have shown (`--expect`)."""

    SWITCH = "switch"
    ADAPTER = "adapter"
    ROLLBACK = "rollback"


def unmet(expectations: Sequence[Expectation], sessions: Sequence[SessionRecord]) -> list[str]:
    """For each expectation that no session fulfils: that it was missed, what was seen, what to do."""
    lines = []
    for expectation in dict.fromkeys(expectations):
        fulfils, what, describe, advise = _EXPECTED[expectation]
        if any(map(fulfils, sessions)):
            continue
        seen = [f"{s.dialogue}: {found}" for s in sessions if not s.left_out and (found := describe(s))]
        lines.append(f"expected {expectation}: found no session {what}")
        lines += [f"  seen: {line}" for line in seen[:SEEN_SESSIONS] or ["no session came that far"]]
        lines.append(f"  what to do: {advise(sessions)}")
    return lines


def _verdict(session: SessionRecord) -> str:
    """What became of a session's adaptation."""
    if session.given_up or session.error:
        return session.given_up or f"broke off: {session.error}"
    for event in reversed(session.events):
        if event.get("kind") in ("switched", "refused", "training_failed", "adaptation_abandoned"):
            data = event.get("data") or {}
            why = data.get("reason") or data.get("message") or data.get("phase") or ""
            return f"{event['kind']}: {why}".rstrip(": ")
    return f"{len(session.turns)} turns, phase {session.phase or 'unknown'}"


def _adapter(session: SessionRecord) -> str:
    """What became of a session's adapter; empty for one that was not to have any."""
    return _verdict(session) if session.forced or _has(session, "training_submitted") else ""


def _audits(session: SessionRecord) -> str:
    """What the audits of a switched session found; empty for one that never switched."""
    if not session.switched:
        return ""
    kinds = [event.get("kind") for event in session.events]
    gaps = [turn.gap for turn in session.turns if turn.gap is not None]
    largest = f", gaps up to {max(gaps):.2f}" if gaps else ""
    return f"{kinds.count('audited')} audits{largest}, {kinds.count('audit_dropped')} dropped"


def _advise_switch(sessions: Sequence[SessionRecord]) -> str:
    if any(session.given_up for session in sessions):
        return _MORE_TIME
    return "let the gate accept more (--set gate.accept_threshold=0.2), or play more dialogues"


def _advise_adapter(sessions: Sequence[SessionRecord]) -> str:
    if any(_has(session, "training_failed") for session in sessions):
        return "see surrogate.log in the folder that the server named in its line `logs`"
    if any(session.given_up for session in sessions if _adapter(session)):
        return _MORE_TIME
    if any(session.forced for session in sessions):
        return "play the forced dialogue on beyond its warm start, alone: --only NAME --first NAME"
    return "force one to its adapter: --force-adapter NAME"


def _advise_rollback(sessions: Sequence[SessionRecord]) -> str:
    if not any(session.switched for session in sessions):
        return "see that a session switches first; only then is there anything to roll back"
    if any(_has(session, "audit_dropped") for session in sessions):
        return "give audits time: --set gate.audit_wait_s=600"
    return "audit every turn: --set gate.audit_rate=1"


def _has(session: SessionRecord, kind: str) -> bool:
    return any(event.get("kind") == kind for event in session.events)


_MORE_TIME = "give it more time, with nothing else on the machine: --minutes 40, or fewer dialogues by --only"

_Describe = Callable[[SessionRecord], str]
_Advise = Callable[[Sequence[SessionRecord]], str]
_Row = tuple[Callable[[SessionRecord], object], str, _Describe, _Advise]
_EXPECTED: dict[Expectation, _Row] = {
    Expectation.SWITCH: (
        lambda session: session.switched,
        "with a turn answered by the surrogate",
        _verdict,
        _advise_switch,
    ),
    Expectation.ADAPTER: (
        lambda session: session.adapters,
        "with a turn answered with an adapter",
        _adapter,
        _advise_adapter,
    ),
    Expectation.ROLLBACK: (
        lambda session: session.rolled_back,
        "that was rolled back",
        _audits,
        _advise_rollback,
    ),
}
"""Whether a session shows it, in words, what to say of a session that does not, and what to do."""
