"""Workloads: folders of dialogues whose answers have a programmatic truth. docs/workloads.md is their manual.

A workload is a folder with `sessions.json`, `{"id": ["user turn 1", ...]}` as for `soma replay`, and
`checks.json`, `{"id": [check of turn 1, ...]}`, null for a turn without one.

Guarantees: everything that is wrong with all folders is told at once, with found and expected; a session is of
the same part (tuning, development, test) in every run and on every machine, by the digest of its id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from soma_vllm.config import Config
from soma_vllm.errors import ConfigError
from soma_vllm.tools.command_line import read_json, write_json
from soma_vllm.tools.replay.dialogues import load_dialogues
from study.checks import CHECK, Check

PARTS = ("tuning", "development", "test")
FROZEN = "frozen.json"
THRESHOLDS = (
    "warm_window",
    "acceptance_min_turns",
    "compressed_prefix_turns",
    "gate.gap",
    "gate.accept_threshold",
    "gate.accept_margin",
    "gate.min_agreement",
    "gate.min_gain",
    "gate.locality_threshold",
    "gate.drift_window",
    "gate.drift_threshold",
    "gate.consecutive_to_rollback",
    "gate.audit",
    "gate.audit_rate",
    "prefix.mode",
)
"""What is frozen before the test part is played."""


@dataclass(frozen=True)
class Session:
    """One dialogue and its truth."""

    workload: str
    name: str
    turns: tuple[str, ...]
    checks: tuple[Check | None, ...]

    @property
    def id(self) -> str:
        """Unique among all workloads."""
        return f"{self.workload}.{self.name}"

    @property
    def part(self) -> str:
        """tuning, development or test."""
        return part_of(self.id)


def part_of(identifier: str) -> str:
    """The part that a session is of: SHA-256 of its id, modulo 3."""
    return PARTS[int(hashlib.sha256(identifier.encode()).hexdigest(), 16) % len(PARTS)]


def load_workloads(folder: Path) -> list[Session]:
    """Every session of every workload in `folder`, in the order of their names.

    Raises:
        ConfigError: with everything that is wrong with any of them.
    """
    if not folder.is_dir():
        raise ConfigError("--workloads", [f"found no folder {folder}; expected one folder per workload in it"])
    places = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))
    if not places:
        raise ConfigError("--workloads", [f"found no workload in {folder}; expected one folder for each"])
    problems: list[str] = []
    sessions: list[Session] = []
    for place in places:
        try:
            sessions += _workload(place)
        except ConfigError as error:
            problems += [f"{error.source}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError("--workloads", problems)
    return sessions


def _workload(place: Path) -> list[Session]:
    problems: list[str] = []
    documents: list[Any] = [{}, {}]
    readers = ((load_dialogues, "sessions.json"), (read_json, "checks.json"))
    for number, (reader, name) in enumerate(readers):
        try:
            documents[number] = reader(place / name)
        except ConfigError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    dialogues, checks = documents
    if not isinstance(checks, dict):
        problems.append(f'checks.json: found a {type(checks).__name__}; expected {{"id": [check, ...]}}')
    if problems:
        raise ConfigError(place.name, problems)
    for name in sorted(checks.keys() - dialogues.keys()):
        problems.append(f"checks.json: {name}: found no such session; expected an id of sessions.json")
    found = []
    for name, turns in dialogues.items():
        read, wrong = _checks(name, checks.get(name), len(turns))
        problems += wrong
        found.append(Session(place.name, name, turns, read))
    if problems:
        raise ConfigError(place.name, problems)
    return found


def _checks(name: str, given: Any, turns: int) -> tuple[tuple[Check | None, ...], list[str]]:
    if not isinstance(given, list) or len(given) != turns:
        what = f"{len(given)} checks" if isinstance(given, list) else f"a {type(given).__name__}"
        return (), [f"checks.json: {name}: found {what}; expected {turns}, one for each turn (null: none)"]
    read: list[Check | None] = []
    problems = []
    for number, check in enumerate(given, start=1):
        try:
            read.append(None if check is None else CHECK.validate_json(json.dumps(check), strict=True))
        except ValidationError as error:
            problems += [f"checks.json: {name}[{number}]: {_told(each)}" for each in error.errors()]
    return tuple(read), problems


def _told(error: Any) -> str:
    where = ".".join(str(step) for step in error["loc"])
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    found = json.dumps(error["input"], default=str)[:80]
    return f"{where + ': ' if where else ''}found {found}; expected {message}"


def digest(sessions: Sequence[Session]) -> str:
    """SHA-256 over ids, turns and checks, in the order of ids."""
    lines = []
    for one in sorted(sessions, key=lambda one: one.id):
        checks = [None if check is None else check.model_dump(mode="json") for check in one.checks]
        lines.append([one.id, list(one.turns), checks])
    return hashlib.sha256(json.dumps(lines, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def thresholds(config: Config) -> dict[str, Any]:
    """The values of `THRESHOLDS` in a configuration."""
    document = config.model_dump(mode="json")
    found = {}
    for key in THRESHOLDS:
        value: Any = document
        for step in key.split("."):
            value = value[step]
        found[key] = value
    return found


def freeze(folder: Path, sessions: Sequence[Session], configs: Mapping[str, Config]) -> Path:
    """Write what the test part will be played with, configurations by the stem of their file."""
    path = folder / FROZEN
    write_json(
        path,
        {
            "test_part": digest([one for one in sessions if one.part == "test"]),
            "thresholds": {name: thresholds(config) for name, config in configs.items()},
        },
    )
    return path


def frozen(folder: Path, sessions: Sequence[Session], pair: str, config: Config) -> dict[str, Any]:
    """What was frozen, once it is what is there now.

    Raises:
        ConfigError: there is no such file; or the test part, or a threshold, is another than what was frozen.
    """
    path = folder / FROZEN
    document: dict[str, Any] = read_json(path)
    now = digest([one for one in sessions if one.part == "test"])
    problems = []
    if document.get("test_part") != now:
        problems.append(f"test_part: found {now}; expected {document.get('test_part')}, which was frozen")
    expected = document.get("thresholds", {}).get(pair)
    if expected is None:
        problems.append(f"thresholds: found none of {pair}; expected those it was frozen with")
    for key, value in thresholds(config).items():
        if expected is not None and (key not in expected or expected[key] != value):
            problems.append(f"{pair}: {key}: found {value!r}; expected {expected.get(key)!r}, which was frozen")
    if problems:
        advice = "the test part is played with what was frozen before; --freeze freezes anew"
        raise ConfigError(str(path), [*problems, advice])
    return document
