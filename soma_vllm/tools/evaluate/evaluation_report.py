"""What an evaluation found, as one JSON document. Holds no conversation text.

A variant's number is the mean over sessions, each session counting alike, so that it fits the interval of its
differences.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any

from soma_vllm.config import Config
from soma_vllm.tools.evaluate.harness import Numbers, SessionResult
from soma_vllm.tools.evaluate.statistics import RESAMPLES, interval
from soma_vllm.tools.evaluate.variants import PLAIN, Variant

MEASURES = ("nll", "kl", "top1", "gap", "rouge_l", "prompt_tokens", "train_s", "train_flops")
SHARES = ("top1", "prompt_tokens")
"""Measures that are compared with those of the full history."""
DIGITS = 6


def report(
    results: Mapping[str, SessionResult], variants: Sequence[Variant], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The document `evaluation.json`, from the sessions measured so far."""
    found = {
        variant: {name: result.numbers[variant.name] for name, result in results.items()}
        for variant in variants
    }
    return {
        "settings": dict(settings),
        "variants": {variant.name: _variant(variant, found) for variant in variants},
        "chosen": {name: _choice(result) for name, result in results.items()},
        "chosen_summary": _summary(results),
    }


def settings(
    config: Config, dialogues: Mapping[str, Sequence[str]], skipped: Sequence[str], source: str
) -> dict[str, Any]:
    """What the numbers rest on: configuration, models, machine, date, ids and counts of the dialogues."""
    return {
        "config": config.model_dump(mode="json"),
        "original": config.original_model or config.original.name,
        "surrogate": config.surrogate_model,
        "prefix": config.prefix.mode,
        "warm_window": config.warm_window,
        "dialogues": {"source": source, "turns": {name: len(turns) for name, turns in dialogues.items()}},
        "skipped": list(skipped),
        "bootstrap": {"resamples": RESAMPLES, "seed": 0, "over": "sessions"},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "device": config.training.device,
            "threads": config.training.threads,
            **{name: _version(name) for name in ("torch", "transformers", "peft")},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _variant(variant: Variant, found: Mapping[Variant, Mapping[str, Numbers]]) -> dict[str, Any]:
    sessions = found[variant]
    baseline, full = variant.baseline, _means(found[Variant(PLAIN, "full")])
    means = _means(sessions)
    shares = {key: means[key] / full[key] if means[key] is not None and full[key] else None for key in SHARES}
    return {
        "method": variant.method,
        "prefix": variant.prefix,
        **means,
        "against": None if baseline is None else baseline.name,
        **_differences(sessions, None if baseline is None else found[baseline]),
        "share_of_full": {key: _round(share) for key, share in shares.items()},
        "failed": sorted(name for name, numbers in sessions.items() if numbers.failed is not None),
        "sessions": {name: _numbers(numbers) for name, numbers in sessions.items()},
    }


def _summary(results: Mapping[str, SessionResult]) -> dict[str, Any]:
    """Means over the sessions the gate gives to the surrogate, and over the same ones under full history."""
    choices = {name: result.choice for name, result in results.items()}
    served = {name: choice.later for name, choice in choices.items() if choice.later is not None}
    plain_full = Variant(PLAIN, "full").name
    full = {name: results[name].numbers[plain_full] for name in served}
    candidates = [str(choice.candidate) for choice in choices.values()]
    return {
        "sessions": {name: candidates.count(name) for name in sorted(set(candidates))},
        **_means(served),
        "against": plain_full,
        **_differences(served, full),
        "full_history": {key: _means(full)[key] for key in ("nll", *SHARES)},
    }


def _differences(these: Mapping[str, Numbers], those: Mapping[str, Numbers] | None) -> dict[str, Any]:
    """The mean paired difference of the NLL, with its interval; None without a baseline."""
    pairs = [] if those is None else [numbers.nll - those[name].nll for name, numbers in these.items()]
    ci95 = interval(pairs)
    return {
        "diff_nll": _round(fmean(pairs)) if pairs else None,
        "ci95_nll": None if ci95 is None else [_round(bound) for bound in ci95],
    }


def _means(sessions: Mapping[str, Numbers]) -> dict[str, Any]:
    """Over the sessions that have the number; None where none has."""
    means = {}
    for name in MEASURES:
        known = [value for one in sessions.values() if (value := getattr(one, name)) is not None]
        means[name] = _round(fmean(known)) if known else None
    return means


def _choice(result: SessionResult) -> dict[str, Any]:
    choice = result.choice
    return {
        "candidate": str(choice.candidate),
        "variant": choice.variant,
        "reason": choice.reason,
        "held_out": dict(choice.held_out),
        "later": None if choice.later is None else _numbers(choice.later),
    }


def _numbers(numbers: Numbers) -> dict[str, Any]:
    return {name: _round(value) for name, value in asdict(numbers).items()}


def _round(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
