"""The last lines of a replay: where to look; for each missed expectation, what was seen and what to do.

Pure: from records to lines. No query or answer is ever told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soma_vllm.tools.replay.replay_view import Expectation, SessionRecord, met

SEEN_SESSIONS = 4
"""Sessions that a line about a missed expectation tells of."""


def where_to_look(out: Path, figure: bool) -> str:
    """The line that names what a replay has left."""
    log = out / "soma_log.json"
    return f"look at {out / 'timeline.png'} and {log}" if figure else f"look at {log}"


def missed(expectations: Sequence[Expectation], sessions: Sequence[SessionRecord]) -> list[str]:
    """For each expectation that no session fulfils: that it was missed, what was seen, what to do."""
    lines = []
    for expectation in dict.fromkeys(expectations):
        if not met(expectation, sessions):
            what, tell, advise = _MISSED[expectation]
            told = [f"{s.dialogue}: {seen}" for s in sessions if not s.left_out and (seen := tell(s))]
            lines.append(f"expected {expectation}: found no session {what}")
            lines += [f"  seen: {line}" for line in told[:SEEN_SESSIONS] or ["no session came that far"]]
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
    trained = any(event.get("kind") == "training_submitted" for event in session.events)
    return _verdict(session) if trained or session.forced else ""


def _audits(session: SessionRecord) -> str:
    """What the audits of a switched session found; empty for one that never switched."""
    if not session.switched:
        return ""
    kinds = [event.get("kind") for event in session.events]
    gaps = [turn.gap for turn in session.turns if turn.gap is not None]
    largest = f", gaps up to {max(gaps):.2f}" if gaps else ""
    return f"{kinds.count('audited')} audits{largest}, {kinds.count('audit_dropped')} dropped"


def _if_it_switches(sessions: Sequence[SessionRecord]) -> str:
    if any(session.given_up for session in sessions):
        return _MORE_TIME
    return "let the gate accept more (--set gate.accept_threshold=0.2), or play more dialogues"


def _if_it_trains(sessions: Sequence[SessionRecord]) -> str:
    if any(_failures(session.events) for session in sessions):
        return "see surrogate.log in the folder that the server named in its line `logs`"
    if any(session.given_up for session in sessions if _adapter(session)):
        return _MORE_TIME
    if any(session.forced for session in sessions):
        return "play the forced dialogue on beyond its warm start, alone: --only NAME --first NAME"
    return "force one to its adapter: --force-adapter NAME"


def _if_it_rolls_back(sessions: Sequence[SessionRecord]) -> str:
    if not any(session.switched for session in sessions):
        return "see that a session switches first; only then is there anything to roll back"
    if any(event.get("kind") == "audit_dropped" for session in sessions for event in session.events):
        return "give audits time: --set gate.audit_wait_s=600"
    return "audit every turn: --set gate.audit_rate=1"


_MORE_TIME = "give it more time, with nothing else on the machine: --minutes 40, or fewer dialogues by --only"


def _failures(events: Sequence[Mapping[str, Any]]) -> bool:
    return any(event.get("kind") == "training_failed" for event in events)


_MISSED = {
    Expectation.SWITCH: ("with a turn answered by the surrogate", _verdict, _if_it_switches),
    Expectation.ADAPTER: ("with a turn answered with an adapter", _adapter, _if_it_trains),
    Expectation.ROLLBACK: ("that was rolled back", _audits, _if_it_rolls_back),
}
