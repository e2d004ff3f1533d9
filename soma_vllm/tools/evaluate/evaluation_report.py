"""What an evaluation found, as one JSON document, and the two figures drawn from it. No conversation text.

A variant's number is the mean over sessions, each session counting alike, so that it fits the interval of its
differences.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from soma_vllm.config import Config
from soma_vllm.tools.evaluate.harness import Numbers, SessionResult
from soma_vllm.tools.evaluate.statistics import LEAST_PAIRS, RESAMPLES, interval
from soma_vllm.tools.evaluate.variants import METHODS, PLAIN, Variant
from soma_vllm.tools.figures import BLUE, GREEN, PALE_INK, YELLOW, draw_frame, figure_file

COLORS = {"full": BLUE, "anchored": GREEN, "sliding": YELLOW}
"""By prefix."""
MARKERS = dict(zip(METHODS, "osD^vP*", strict=True))
"""By method."""

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
        "later": None if choice.later is None else _numbers(replace(choice.later, per_turn=())),
    }


def _numbers(numbers: Numbers) -> dict[str, Any]:
    found: dict[str, Any] = _round(asdict(numbers))
    return found


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _round(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_round(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def draw(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the figures that the document has numbers for; their paths."""
    paths = []
    rows = [(name, row) for name, row in document["variants"].items() if row["diff_nll"] is not None]
    if rows:
        paths.append(out / "nll.png")
        title = f"Change on later turns (bar: 95 % interval, from {LEAST_PAIRS} sessions on; ticks: sessions)"
        with figure_file(paths[-1], (8.5, 1.6 + 0.42 * len(rows)), title) as figure:
            _draw_differences(figure.add_subplot(), rows, document["variants"])
    variants = document["variants"]
    if variants and all(row["top1"] is not None for row in variants.values()):
        paths.append(out / "top1.png")
        with figure_file(paths[-1], (8.5, 5.2), "Agreement, and the prompt it takes") as figure:
            _draw_agreement(figure.add_subplot(), variants)
            figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return paths


def _draw_differences(axes: Any, rows: list[tuple[str, Any]], variants: Mapping[str, Any]) -> None:
    """NLL of each variant minus its baseline's, with the interval over sessions."""
    axes.axvline(0.0, color=PALE_INK, linewidth=1)
    for lane, (_, row) in enumerate(rows):
        color = COLORS[row["prefix"]]
        axes.plot(row["ci95_nll"] or [row["diff_nll"]] * 2, [lane] * 2, color=color, linewidth=3)
        axes.plot(row["diff_nll"], lane, marker="o", color=color, markeredgecolor="white", markersize=8)
        baseline = variants[row["against"]]["sessions"]
        each = [numbers["nll"] - baseline[session]["nll"] for session, numbers in row["sessions"].items()]
        axes.plot(each, [lane + 0.22] * len(each), marker="|", linestyle="none", color=color, alpha=0.6)
    axes.set_yticks(range(len(rows)), [f"{name}\nagainst {row['against']}" for name, row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("NLL minus the baseline's, nats per token of the original's later answers; left is better")
    draw_frame(axes, "x")


def _draw_agreement(axes: Any, variants: Mapping[str, Any]) -> None:
    """Agreement against what the surrogate has to read for it."""
    for name, row in sorted(variants.items(), key=lambda pair: -pair[1]["top1"]):
        look = {"marker": MARKERS[row["method"]], "color": COLORS[row["prefix"]], "linestyle": "none"}
        label = f"{row['top1']:.3f}  {name}"
        axes.plot(
            row["prompt_tokens"], row["top1"], markeredgecolor="white", markersize=10, label=label, **look
        )
    full = variants["plain@full"]
    axes.axhline(0.99 * full["top1"], color=PALE_INK, linewidth=0.8, linestyle="--")
    axes.axvline(0.5 * full["prompt_tokens"], color=PALE_INK, linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.1 * max(row["prompt_tokens"] for row in variants.values()))
    axes.set_xlabel("prompt tokens of a later turn (dashed: half of the full history)")
    axes.set_ylabel("top-1 agreement with the original (dashed: 0.99 of full history's)")
    draw_frame(axes, "x")
