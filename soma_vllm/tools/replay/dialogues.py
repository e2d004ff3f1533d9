"""Dialogue files, and the choice of what a replay plays from them.

Guarantees: everything that is wrong with a file, or with a choice, is reported at once, with found and
expected; a script made here plays at least one dialogue, and at least one turn of each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soma_vllm.config import Config
from soma_vllm.documents import is_unicode
from soma_vllm.errors import ConfigError
from soma_vllm.tools.command_line import read_json

Dialogues = Mapping[str, tuple[str, ...]]
"""The user's turns of each dialogue, by its id."""


def load_dialogues(path: str | Path) -> Dialogues:
    """Read `{"id": ["user turn 1", ...]}`.

    Raises:
        ConfigError: with everything that is wrong with the file.
    """
    source = str(path)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    document = read_json(Path(path), unique)
    if not isinstance(document, dict) or not document:
        found = "an empty object" if document == {} else f"a {type(document).__name__}"
        raise ConfigError(source, [f'found {found}; expected {{"id": ["user turn 1", ...]}}'])
    problems = [f"{name}: found twice; expected each id once" for name in repeated]
    for name, turns in document.items():
        problems += _dialogue_problems(name, turns)
    if problems:
        raise ConfigError(source, problems)
    return {name: tuple(turns) for name, turns in document.items()}


def _dialogue_problems(name: str, turns: object) -> list[str]:
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        problems.append(f"id {name!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else f"a {type(turns).__name__}"
        return [*problems, f"{name}: found {found}; expected a list of user turns"]
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, str):
            problems.append(f"{name}[{number}]: found a {type(turn).__name__}; expected a string")
        elif not is_unicode(turn):
            problems.append(f"{name}[{number}]: found half a surrogate pair; expected Unicode text")
        elif not turn.strip():
            problems.append(f"{name}[{number}]: found an empty turn; expected text")
    return problems


@dataclass(frozen=True)
class Script:
    """What to play, and how the simulated users behave."""

    dialogues: Dialogues
    forced: frozenset[str] = frozenset()
    """Dialogues whose requests carry `X-SOMA-Force: adapter`."""
    warm_window: int = 4
    max_tokens: int = 200
    concurrency: int = 1
    """Dialogues under way at once."""
    think_s: float = 0.0
    """Seconds a user waits before each turn but the first."""
    spare: frozenset[str] = frozenset()
    """Dialogues that are played only if the others leave time for them."""
    awaits_verdicts: bool = False
    """Whether a user reads after the warm start until the session has a verdict."""
    poll_s: float = 1.0
    """Seconds between two looks at a session's report."""


def make_script(
    source: str,
    dialogues: Dialogues,
    config: Config,
    *,
    only: Sequence[str] = (),
    limit_turns: int | None = None,
    force_adapter: Sequence[str] = (),
    concurrency: int = 1,
    think_s: float = 0.0,
    awaits_verdicts: bool = False,
    first: Sequence[str] = (),
) -> Script:
    """Choose dialogues and turns; those of `first` come first, in its order.

    Raises:
        ConfigError: a chosen dialogue does not exist, or the configuration forbids forcing.
    """
    chosen = {name: turns[:limit_turns] for name, turns in dialogues.items() if not only or name in only}
    problems = [
        f"--only {name}: no such dialogue; expected one of {', '.join(dialogues)}"
        for name in only
        if name not in dialogues
    ]
    problems += [
        f"{option} {name}: not among the dialogues to play; expected one of {', '.join(chosen)}"
        for option, names in (("--force-adapter", force_adapter), ("--first", first))
        for name in names
        if name not in chosen
    ]
    if force_adapter and not config.adaptation.allow_force_header:
        problems.append("--force-adapter: found adaptation.allow_force_header: false; expected true")
    if problems:
        raise ConfigError(source, problems)
    return Script(
        dialogues={name: chosen[name] for name in dict.fromkeys((*first, *chosen))},
        forced=frozenset(force_adapter),
        warm_window=config.warm_window,
        max_tokens=config.max_new_tokens,
        concurrency=concurrency,
        think_s=think_s,
        awaits_verdicts=awaits_verdicts,
    )
