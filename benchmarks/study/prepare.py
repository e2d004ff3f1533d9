"""From options to a study: everything read and checked, with all that is wrong told at once."""

from __future__ import annotations

import argparse
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

from soma_vllm.config import Config, Prices, load_config
from soma_vllm.errors import ConfigError, SomaError
from soma_vllm.models.hub import local_path
from soma_vllm.tools.replay.dialogues import load_dialogues
from study import arms
from study.checks import Check
from study.cost import load_prices
from study.plan import Block, Dialogues, Load, plan, synthetic
from study.planned import Stage, Study
from study.report import OURS, REFERENCE
from study.workloads import Session, frozen, load_workloads

FREE = "free"
"""What stands before the names of dialogues without a truth, where they are played beside workloads."""


@dataclass
class Material:
    """What there is to play."""

    dialogues: dict[str, tuple[str, ...]]
    checks: dict[str, tuple[Check | None, ...]] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    """Of all parts."""


def prepared(options: argparse.Namespace) -> Study:
    """One pair's study.

    Raises:
        ConfigError: something does not fit, with all that is wrong with one source.
    """
    config = load_config(options.config, options.overrides).for_serving(str(options.config))
    if options.all_arms and not _may_draft(config):
        options.arms = tuple(arm for arm in options.arms if arm != "speculative")
    tariffs = load_prices(options.prices)
    material = _material(options)
    problems = _problems(options, config, tariffs)
    if options.tariff in tariffs:
        tariffs = {options.tariff: tariffs[options.tariff], **tariffs}
    held = None
    if options.workloads and options.part == "test":
        # As the file itself says it: a threshold set on the command line is another than the frozen one too.
        held = frozen(options.workloads, material.sessions, options.config.stem, config)
    least = config.warm_window + 2
    long = {name: turns for name, turns in material.dialogues.items() if len(turns) >= least}
    if not long:
        problems.append(f"found no dialogue of {least} turns or more; expected later turns to measure")
    if problems:
        raise ConfigError("throughput", problems)
    in_turn = bool(options.workloads) and not options.quick
    repeats = options.repeats * (ceil(len(long) / options.sessions) if in_turn else 1)
    load = Load(options.sessions, options.arrival, options.think)
    names = secrets.token_hex(3)
    blocks = plan(long, options.arms, repeats, load, options.seed, names, in_turn)
    stages = _stages(blocks, options, config)
    injected, changes = _injected(long, options, config.warm_window)
    if injected:
        stages = _with_drift(stages, injected, load, options, names)
    return Study(options, config, tariffs, long, tuple(stages), material.checks, changes, held)


def _may_draft(config: Config) -> bool:
    """Whether both models have as many tokens, as vLLM wants of a draft model."""
    sizes = set()
    for model in (config.original_model, config.surrogate_model):
        try:
            path = local_path(model or "") / "config.json"
            sizes.add(json.loads(path.read_text(encoding="utf-8")).get("vocab_size"))
        except (SomaError, OSError, ValueError):
            return True  # the server's own checks will tell
    return len(sizes) == 1


def _problems(options: argparse.Namespace, config: Config, tariffs: dict[str, Prices]) -> list[str]:
    problems = []
    if options.tariff is not None and options.tariff not in tariffs:
        problems.append(f"--tariff {options.tariff}: expected one of {', '.join(tariffs)}")
    told = ",".join(options.arms)
    if REFERENCE not in options.arms or len(set(options.arms)) != len(options.arms):
        problems.append(f"--arms {told}: expected {REFERENCE} among arms that all differ")
    if "random" in options.arms and OURS not in options.arms:
        problems.append(f"--arms {told}: expected {OURS} beside random, which switches as many sessions")
    if options.url:
        own = [arm for arm in options.arms if arms.arm(arm).overrides and arm != "speculative"]
        if "speculative" in options.arms and set(options.arms) != {REFERENCE, "speculative"}:
            problems.append(
                "--arms: a server that drafts does so in every arm; expected original,speculative alone"
            )
        if own:
            problems.append(f"--url: found {', '.join(own)} among --arms; expected servers of our own for them")
    if config.access.mode == "keys":
        problems.append("access.mode: found keys; expected open: every session is a tenant of its own")
    if config.original.url is not None and next(iter(tariffs.values())).original_prompt_thousand is None:
        problems.append(
            "original.url: a remote original's seconds are not ours; expected a tariff by the token"
        )
    return problems


def _material(options: argparse.Namespace) -> Material:
    if options.synthetic:
        turns, _, words = options.synthetic.partition(":")
        if not (turns.isdecimal() and words.isdecimal()):
            raise ConfigError(
                "--synthetic", [f"found {options.synthetic!r}; expected TURNS:WORDS, such as 12:40"]
            )
        found = Material(synthetic(options.sessions, int(turns), int(words), options.seed))
    elif options.workloads:
        sessions = load_workloads(options.workloads)
        played = [one for one in sessions if one.part == options.part]
        found = Material(
            {one.id: one.turns for one in played}, {one.id: one.checks for one in played}, sessions
        )
        if options.dialogues:
            free = load_dialogues(options.dialogues)
            found.dialogues |= {f"{FREE}.{name}": turns for name, turns in free.items()}
    else:
        found = Material(dict(load_dialogues(options.dialogues)))
    unknown = [name for name in options.only or () if name not in found.dialogues]
    if unknown:
        told = ", ".join(found.dialogues)
        raise ConfigError("--only", [f"found {', '.join(unknown)}; expected of {told}"])
    found.dialogues = {
        name: turns[: options.limit_turns]
        for name, turns in found.dialogues.items()
        if not options.only or name in options.only
    }
    return found


def _stages(blocks: Sequence[Block], options: argparse.Namespace, config: Config) -> list[Stage]:
    """Blocks by repeat and server; capacities are looked for in the last repeat, while its servers run."""
    stages = []
    last = max(block.repeat for block in blocks)
    for repeat in range(last + 1):
        here = {block.arm: block for block in blocks if block.repeat == repeat}
        for names in [list(here)] if options.url else arms.together(list(here), config):
            ladders = [here[arm] for arm in names if options.capacity and arm in (OURS, REFERENCE)]
            given = () if options.url else arms.overrides(names[0], config)
            own = tuple(here[arm] for arm in names)
            stages.append(Stage(given, own, tuple(ladders) if repeat == last else ()))
    return stages


def _injected(
    dialogues: Dialogues, options: argparse.Namespace, warm: int
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """(dialogues that go over to another one three turns after the warm start, the turn that begins it)."""
    named: dict[str, list[str]] = {}
    for name in dialogues:
        named.setdefault(name.partition(".")[0], []).append(name)
    found: dict[str, tuple[str, ...]] = {}
    topics = sorted(named)
    if len(topics) < 2:
        return {}, {}
    for number in range(options.drift):
        first = named[topics[number % len(topics)]]
        then = named[topics[(number + 1) % len(topics)]]
        draw = random.Random(f"{options.seed}/drift/{number}")
        one, other = draw.choice(first), draw.choice(then)
        found[f"drift-{number}.{one}"] = (*dialogues[one][: warm + 3], *dialogues[other])
    return found, dict.fromkeys(found, warm + 4)


def _with_drift(
    stages: Sequence[Stage], injected: Dialogues, load: Load, options: argparse.Namespace, run: str
) -> list[Stage]:
    """Every gated arm's sessions with a change, in the last stage that has the arm."""
    found = list(stages)
    for name in options.arms:
        if arms.arm(name).gated:
            place = max(n for n, stage in enumerate(found) if any(b.arm == name for b in stage.blocks))
            sessions = replace(load, sessions=len(injected))
            blocks = plan(injected, (name,), 1, sessions, options.seed, f"{run}-drift")
            found[place] = replace(found[place], drift=(*found[place].drift, *blocks))
    return found


def pairs(options: argparse.Namespace) -> list[argparse.Namespace]:
    """The options once for each --config."""
    return [argparse.Namespace(**{**vars(options), "config": Path(path)}) for path in options.config]
