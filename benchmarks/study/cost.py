"""From seconds and tokens to money, and from a block's total to its turns. Pure.

An engine's seconds are divided between reading and writing as vLLM's own prefill and decode times are, and
within each by tokens: prompt tokens that were not cached, and generated ones. So every turn gets its share;
what is left is what the engine computed for nobody's turn: audits on the original; on the surrogate held-out
answers, shadows of audits, and the prefill after a switch. Errors of measuring are in there too: the arms
without a background show how much.

A session's bill by turn: its turns as they come; what adaptations took, when the warm start is over, those
of refused sessions that were judged again too; audits, with the turns that the surrogate answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from pydantic import ValidationError

from soma_vllm.config import Prices
from soma_vllm.errors import ConfigError
from study.client import Answered, Played
from study.meter import ENGINES, Numbers, Reading


def load_prices(path: Path) -> dict[str, Prices]:
    """The tariffs of a file, `{name: {original_second: …}}`, with the keys of the configuration's `prices`.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(str(path), [f"cannot be read as YAML: {error}"]) from error
    if not isinstance(document, dict) or not document:
        raise ConfigError(str(path), [f"found {type(document).__name__}; expected {{tariff: {{key: price}}}}"])
    tariffs: dict[str, Prices] = {}
    problems = []
    for name, keys in document.items():
        try:
            tariffs[str(name)] = Prices.model_validate_json(json.dumps(keys))
        except ValidationError as error:
            problems += [f"{name}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    if problems:
        raise ConfigError(str(path), problems)
    return tariffs


@dataclass(frozen=True)
class Spent:
    """What a block took, divided."""

    turns: tuple[tuple[float, ...], ...]
    """Engine seconds of every turn, session by session."""
    background_s: Numbers
    """Seconds of each engine that belong to no turn."""
    trainer_s: float
    server_s: float
    """soma-serve itself and third-party methods: part of serving."""
    background_tokens: Numbers
    """Tokens the original read (`prompt`) and wrote (`generated`) for no turn."""

    @property
    def seconds(self) -> Numbers:
        """By what they went for."""
        return {
            "turns": sum(map(sum, self.turns)),
            "audits": self.background_s["original"],
            "acceptance": self.background_s["surrogate"],
            "training": self.trainer_s,
            "server": self.server_s,
        }


@dataclass(frozen=True)
class Counting:
    """Which seconds count."""

    busy: bool = True
    """Of engines: the time they had a request running; False: their processor seconds."""
    trainers_report: bool = False
    """Of trainers: what they say of themselves, where they compute on a GPU; False: processor seconds."""
    cores: Mapping[str, int] = field(default_factory=dict)
    """Of each engine: a second in which it was busy is one of every core it has. Processor seconds know."""


def divided(played: Sequence[Played], reading: Reading, how: Counting) -> Spent:
    """A block's seconds, given to its turns and to the background."""
    engines = reading.busy_s if how.busy else reading.cpu_s
    cores = how.cores if how.busy else {}
    seconds = {name: engines.get(name, 0.0) * cores.get(name, 1) for name in ENGINES}
    seconds |= {name: reading.cpu_s.get(name, 0.0) for name in ("server", "trainer", "baseline")}
    if how.trainers_report:
        seconds["trainer"] = sum(map(trained_s, played))
    rates = {name: _Rates.of(seconds[name], reading.engines.get(name, {})) for name in ENGINES}
    turns = tuple(tuple(rates[turn.engine].cost(turn) for turn in one.turns) for one in played)
    of_turns = dict.fromkeys(ENGINES, 0.0)
    tokens = {"prompt": 0.0, "generated": 0.0}
    for one, costs in zip(played, turns, strict=True):
        for turn, cost in zip(one.turns, costs, strict=True):
            of_turns[turn.engine] += cost
            if turn.engine == "original":
                tokens["prompt"] += turn.prompt_tokens
                tokens["generated"] += turn.completion_tokens
    counted = reading.engines.get("original", tokens)
    return Spent(
        turns,
        {name: max(0.0, seconds[name] - of_turns[name]) for name in ENGINES},
        seconds["trainer"],
        seconds["server"] + seconds["baseline"],
        {name: max(0.0, counted[name] - tokens[name]) for name in tokens},
    )


def trained_s(played: Played) -> float:
    """Seconds that trainings of a session took, as the trainer says."""
    return sum(
        sum(float(event["data"].get(f"{stage}_s") or 0.0) for stage in ("mining", "finetune", "scoring"))
        for event in played.events
        if event["kind"] == "trained"
    )


@dataclass(frozen=True)
class _Rates:
    """Seconds per token of one engine in one block."""

    read_s: float
    write_s: float
    cached: float
    """Share of prompt tokens that the cache had, for turns of which the server does not say."""

    @classmethod
    def of(cls, seconds: float, counted: Numbers) -> _Rates:
        prefill, decode = counted.get("prefill_s", 0.0), counted.get("decode_s", 0.0)
        share = prefill / (prefill + decode) if prefill + decode > 0 else 0.5
        prompt, written = counted.get("prompt", 0.0), counted.get("generated", 0.0)
        read = prompt - counted.get("cached", 0.0)
        return cls(
            seconds * share / read if read > 0 else 0.0,
            seconds * (1.0 - share) / written if written > 0 else 0.0,
            counted.get("cached", 0.0) / prompt if prompt > 0 else 0.0,
        )

    def cost(self, turn: Answered) -> float:
        cached = turn.cached_tokens
        fresh = turn.prompt_tokens * (1.0 - self.cached) if cached is None else turn.prompt_tokens - cached
        return fresh * self.read_s + turn.completion_tokens * self.write_s


def bill(played: Sequence[Played], spent: Spent, prices: Prices, warm: int) -> list[float]:
    """Mean cost of a session's n-th turn, first turn first, with all that the block took.

    `warm` is the turn after which adaptation is billed.
    """
    longest = max(len(one.turns) for one in played)
    turn_cost = [
        [_turn_price(turn, cost, prices) for turn, cost in zip(one.turns, costs, strict=True)]
        for one, costs in zip(played, spent.turns, strict=True)
    ]
    sums = [sum(costs[n] for costs in turn_cost if n < len(costs)) for n in range(longest)]
    alive = [sum(n < len(costs) for costs in turn_cost) for n in range(longest)]
    served = [
        sum(n < len(one.turns) and one.turns[n].engine == "surrogate" for one in played) for n in range(longest)
    ]
    audits = _audit_price(spent, prices)
    at = min(warm, longest) - 1
    if not sum(served):
        sums[at] += audits
    else:
        sums = [cost + audits * here / sum(served) for cost, here in zip(sums, served, strict=True)]
    sums[at] += spent.trainer_s * prices.trainer_second
    sums[at] += spent.background_s["surrogate"] * prices.surrogate_second
    standing = spent.server_s * prices.surrogate_second / sum(alive)
    return [cost / here + standing for cost, here in zip(sums, alive, strict=True)]


def _by_the_token(prices: Prices) -> bool:
    return prices.original_prompt_thousand is not None or prices.original_completion_thousand is not None


def _tokens_price(prompt: float, written: float, prices: Prices) -> float:
    read = prompt * (prices.original_prompt_thousand or 0.0)
    return (read + written * (prices.original_completion_thousand or 0.0)) / 1000.0


def _turn_price(turn: Answered, seconds: float, prices: Prices) -> float:
    if turn.engine == "surrogate":
        return seconds * prices.surrogate_second
    if _by_the_token(prices):
        return _tokens_price(turn.prompt_tokens, turn.completion_tokens, prices)
    return seconds * prices.original_second


def _audit_price(spent: Spent, prices: Prices) -> float:
    if _by_the_token(prices):
        tokens = spent.background_tokens
        return _tokens_price(tokens["prompt"], tokens["generated"], prices)
    return spent.background_s["original"] * prices.original_second


def mean_bill(bills: Sequence[Sequence[float]]) -> list[float]:
    """Turn by turn over the repeats that have it."""
    return [fmean(cost for cost in column if cost is not None) for column in zip_longest(*bills)]


def session_costs(played: Sequence[Played], spent: Spent, prices: Prices) -> list[float]:
    """What each session of a block cost. They add up to all that the block took: the background, trainers and
    the server in equal parts, since the meter cannot tell whose a second of them was."""
    common = _audit_price(spent, prices) + spent.background_s["surrogate"] * prices.surrogate_second
    common += spent.trainer_s * prices.trainer_second + spent.server_s * prices.surrogate_second
    return [
        sum(_turn_price(turn, cost, prices) for turn, cost in zip(one.turns, costs, strict=True))
        + common / len(played)
        for one, costs in zip(played, spent.turns, strict=True)
    ]


def break_even(theirs: Sequence[float], originals: Sequence[float], warm: int, earliest: int) -> dict[str, Any]:
    """From which turn on a session has cost less in an arm than with the original; N*.

    The first turn, from `earliest` on, from which the sum stays at or below the original's. Where the sessions
    played end before that, the mean of the later turns is carried on: `extrapolated`. None where later turns
    save nothing.
    """
    mine, reference = list(accumulate(theirs)), list(accumulate(originals))
    behind = [n for n in range(len(mine)) if mine[n] > reference[n]]
    last = behind[-1] + 1 if behind else 0
    if last < len(mine):
        return {"turn": float(max(last + 1, earliest)), "extrapolated": False}
    saving = fmean(originals[warm:]) - fmean(theirs[warm:])
    if saving <= 0:
        return {"turn": None, "extrapolated": True}
    return {"turn": round(len(mine) + (mine[-1] - reference[-1]) / saving, 1), "extrapolated": True}
