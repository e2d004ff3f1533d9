"""Tables of what sessions got and cost, from the JSON: accuracy, whole sessions, capacity, bins, drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Grid = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""(title, heads, rows)."""


def grids(document: Mapping[str, Any]) -> list[Grid]:
    """Every table that the document has the numbers for; none of a document from before they were taken."""
    arms = document["arms"]
    if not all("sessions_told" in arm for arm in arms.values()):
        return []
    found: list[Grid] = [_sessions(document)]
    workloads = sorted({name for arm in arms.values() for name in arm["by_workload"]})
    if any(arm["sessions_told"]["graded_turns"] for arm in arms.values()):
        rows = [
            [name, *(number(arm["by_workload"].get(name, {}).get("task_accuracy")) for arm in arms.values())]
            for name in workloads
        ]
        found.append(("task accuracy by workload", ["workload", *arms], rows))
    bins = sorted({row["turns"] for arm in arms.values() for row in arm["bins"]}, key=lambda name: int(
        name.rstrip("+").partition("-")[0]
    ))  # fmt: skip
    rows = [[f"{name}", *(_bin(arm, name) for arm in arms.values())] for name in bins]
    found.append(("latency / generated tokens over the original's, by turn", ["turns", *arms], rows))
    if document["capacity"]:
        rows = [[arm, *_capacity(one)] for arm, one in document["capacity"].items()]
        found.append(("sessions an hour within the target", ["arm", "capacity", "rates played: strain"], rows))
    if document["drift"]:
        keys = (
            "served_before",
            "recall",
            "turns_to_the_original",
            "switched_without_change",
            "false_rollbacks",
        )
        rows = [[arm, *(number(one[key]) for key in keys)] for arm, one in document["drift"].items()]
        heads = [
            "arm",
            "served before",
            "recall",
            "turns to the original",
            "switched, no change",
            "false rollbacks",
        ]
        found.append(("sessions whose topic changes", heads, rows))
    return found


def _sessions(document: Mapping[str, Any]) -> Grid:
    arms, hardware = document["arms"], document["settings"]["hardware"]
    over = document["over_original"]

    def pair(found: Mapping[str, Any]) -> str:
        return f"{number(found['mean'])} / {number(found['median'])}"

    def ratio(arm: str, name: str) -> str:
        found = over[arm][name]
        return number(found["value"]) + spread(found["interval"])

    def accuracy(arm: str, name: str) -> str:
        found = arms[arm]["sessions_told"]
        return number(found[name], 3) + spread(found["intervals"][name])

    rows = [
        ["cores: original, surrogate", *(_cores(hardware[arm]) for arm in arms)],
        ["task accuracy, turns", *(accuracy(arm, "task_accuracy") for arm in arms)],
        ["task accuracy, sessions", *(accuracy(arm, "session_accuracy") for arm in arms)],
        [
            "whole session, s, mean / median",
            *(pair(arm["sessions_told"]["whole_session_s"]) for arm in arms.values()),
        ],
        [
            "later turn, s, mean / median",
            *(pair(arm["sessions_told"]["later_turn_s"]) for arm in arms.values()),
        ],
        ["cost of a session", *(number(arm["sessions_told"]["cost"]) for arm in arms.values())],
        [
            "token agreement, later turns",
            *(number(arm["agreement"]["token_agreement"], 3) for arm in arms.values()),
        ],
        *(
            [f"{label} over the original's", *(ratio(arm, name) for arm in arms)]
            for label, name in (
                ("whole session", "whole_session_time_soma_over_original"),
                ("cost", "net_cost_soma_over_original"),
                ("task accuracy", "task_accuracy_soma_over_original"),
            )
        ),
    ]
    return "means over sessions, 95 % intervals by a bootstrap over dialogues", ["", *arms], rows


def _cores(found: Any) -> str:
    return found if isinstance(found, str) else f"{found['original']}, {found['surrogate']}"


def _bin(arm: Mapping[str, Any], name: str) -> str:
    row = next((row for row in arm["bins"] if row["turns"] == name), None)
    return "-" if row is None else f"{number(row['latency'])} / {number(row['completion_tokens'])}"


def _capacity(found: Mapping[str, Any]) -> list[str]:
    value, least, most = found["sessions_per_hour"], found["at_least"], found["less_than"]
    if value is not None:
        told = number(value, 1)
    elif least is not None:
        told = f"at least {number(least, 1)}"
    else:
        told = f"less than {number(most, 1)}"
    rungs = ", ".join(f"{one['sessions_per_hour']:.0f}: {one['strain']:.2f}" for one in found["rungs"])
    return [told, rungs]


def number(value: float | None, digits: int = 2) -> str:
    """For people; a dash for nothing."""
    return "-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def spread(interval: Sequence[float] | None) -> str:
    """An interval, or nothing."""
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
