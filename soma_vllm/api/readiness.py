"""What `/ready` says: whether this server should get traffic, part by part.

Guarantees: every part is named in every answer; an answer waits for nothing: it tells what each part last knew
of itself. Only what makes requests fail makes a server not ready; a part without which the original still
answers (the store, the trainers) leaves it ready, and degraded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from http import HTTPStatus

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

router = APIRouter()

LATE_S = 30.0
"""Age of the oldest unwritten turn from which the session store counts as not answering."""


class PartState(StrEnum):
    """How one part is."""

    OK = "ok"
    DEGRADED = "degraded"
    """Requests are answered without it."""
    DOWN = "down"
    """Requests fail for want of it."""


@dataclass(frozen=True)
class PartReport:
    """One part's state, and why."""

    state: PartState
    detail: str = ""

    @classmethod
    def ok_if(cls, fine: bool, detail: str, otherwise: PartState = PartState.DOWN) -> PartReport:
        """OK, or `otherwise` with its reason."""
        return cls(PartState.OK) if fine else cls(otherwise, detail)


class Readiness:
    """Parts by name; each is asked at every report."""

    def __init__(self) -> None:
        self._parts: dict[str, Callable[[], PartReport]] = {}

    def add(self, name: str, report: Callable[[], PartReport]) -> None:
        """Ask a part from now on."""
        self._parts[name] = report

    def report(self) -> Mapping[str, PartReport]:
        """Every part as it is now."""
        return {name: report() for name, report in self._parts.items()}


@router.get("/ready")
async def ready(raw_request: Request) -> JSONResponse:
    """200 where this server should get traffic, else 503; both with every part's state. `/health` is alive."""
    readiness: Readiness = raw_request.app.state.soma_readiness
    report = readiness.report()
    worst = max((part.state for part in report.values()), key=list(PartState).index, default=PartState.OK)
    status = HTTPStatus.SERVICE_UNAVAILABLE if worst is PartState.DOWN else HTTPStatus.OK
    parts = {name: asdict(part) for name, part in report.items()}
    return JSONResponse({"status": worst, "parts": parts}, status_code=status)
