"""The tables of `dispatch.py`, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROWS = {
    "dispatch": "dispatch",
    "dispatch_processor": "its processor time",
    "turn": "a turn",
    "turn_processor": "its processor time",
}


def markdown(document: Mapping[str, Any]) -> str:
    """The figures as tables."""
    place, databases = document["machine"], document["databases"].items()
    lines = [
        f"By `{document['command']}`, {document['date']} (UTC), on {place['processor']}, one process; "
        f"{place['cores']} cores shared with other work (load average {place['load_average'][0]}). In brackets "
        "processor time.",
        "",
        "| database | live sessions | requests/s | dispatch, median ms | p99 ms | a turn, median ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for database, found in databases:
        for one in found["populations"]:
            cells = [_told(one["dispatch_ms"], "median"), _told(one["dispatch_ms"], "p99")]
            cells += [_told(one["turn_ms"], "median")]
            lines.append(
                f"| {database} | {one['sessions']:,} | {one['requests_per_s']} | {' | '.join(cells)} |"
            )
    lines += ["", f"| growth, [95 %] | {' | '.join(GROWS.values())} |", "|---|" + "---|" * len(GROWS)]
    for database, found in databases:
        told = [f"{one['ratio']} [{one['ci95'][0]}, {one['ci95'][1]}]" for one in found["growth"].values()]
        lines.append(f"| {database} | {' | '.join(told)} |")
    heads = ("streams", "requests/s", "dispatch, median ms", "p99 ms", "loop's pause, p99 ms")
    lines += ["", f"| under load | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for database, found in databases:
        one = found["load"]
        cells = [
            _told(one["dispatch_ms"], "median"),
            _told(one["dispatch_ms"], "p99"),
            _told(one["pause_ms"], "p99"),
        ]
        lines.append(f"| {database} | {one['in_flight']} | {one['requests_per_s']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _told(found: Mapping[str, float], name: str) -> str:
    return f"{found[name]} [{found[f'{name}_processor']}]"
