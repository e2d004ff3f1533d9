"""One adaptation from a session's warm start to an adapter on disk, top to bottom.

    render -> score plain -> mine -> weigh -> attach -> train -> score adapted -> save -> detach

Guarantees: the surrogate is the same before and after, bit by bit, also when an adaptation fails; held-out
turns are scored and never learnt from; equal inputs and seeds give equal adapters on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from soma_vllm.config import Lora, Mining
from soma_vllm.errors import ModelError, TrainingError
from soma_vllm.method.finetune import attached, save, train, turn_weights
from soma_vllm.method.mining import mine
from soma_vllm.method.rendering import render
from soma_vllm.method.scoring import Probe, score, score_rendered
from soma_vllm.types import Agreement, Example

_T = TypeVar("_T")


@dataclass(frozen=True)
class Surrogate:
    """A loaded, frozen surrogate. One adaptation at a time may use it."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Adaptation:
    """A finished adaptation: plain values only, picklable."""

    directory: str
    """Holds adapter_config.json and adapter_model.safetensors."""
    plain: Agreement
    """The surrogate without the adapter, on the held-out turns."""
    adapted: Agreement
    """The surrogate with it, on the same turns."""
    hardness: dict[int, float]
    """r_t by turn; empty where mining is off."""
    weights: dict[int, float]
    """omega_t by turn, mean 1."""
    objective: float | None
    """J(P) of the mined prompt; None where mining is off."""
    mined_text_ids: tuple[int, ...]
    """V(P), token ids of the surrogate; empty where mining is off."""
    losses: tuple[float, ...]
    """Training loss before each step, nats per answer token."""
    steps: int
    stopped_early: bool
    probe: Probe
    """What the adapted surrogate said of the first held-out turn, to check the engine that serves it."""
    mining_s: float
    finetune_s: float
    scoring_s: float


def load_surrogate(path: str | Path, dtype: str, device: str, threads: int) -> Surrogate:
    """Load a local folder, frozen and in evaluation mode.

    `dtype` is a name such as "bfloat16"; `threads` sets torch's threads for the whole process.

    Raises:
        ModelError: the folder holds no causal language model with a chat template.
    """
    torch.set_num_threads(threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), local_files_only=True, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: found no surrogate that can be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise ModelError(f"{path}: found no chat template; expected the tokenizer of a chat model")
    return Surrogate(model.to(device).eval().requires_grad_(False), tokenizer)


def score_plain(surrogate: Surrogate, held_out: tuple[Example, ...]) -> Agreement:
    """Agreement of the surrogate without any adapter.

    Raises:
        TrainingError: nothing to score.
    """
    return score(surrogate.model, surrogate.tokenizer, held_out)


def adapt(
    surrogate: Surrogate,
    examples: tuple[Example, ...],
    held_out: tuple[Example, ...],
    mining: Mining,
    lora: Lora,
    seed: int,
    out_dir: str | Path,
) -> Adaptation:
    """Mine, train and save one session's adapter, and score it on turns it was not trained on.

    Raises:
        TrainingError: nothing to learn from or to score, a held-out turn among the examples, or a number
            that is not finite. The surrogate is pristine again, `out_dir` may hold part of an adapter.
    """
    _check_disjoint(examples, held_out)
    model, tokenizer = surrogate.model, surrogate.tokenizer
    learnt, judged = render(tokenizer, examples), render(tokenizer, held_out)
    (plain, _), plain_s = _timed(lambda: score_rendered(model, judged))

    mined = mine(model, tokenizer, learnt, mining, seed) if mining.enabled is True else None
    hardness = mined.hardness if mined else {}
    weights = turn_weights(hardness or dict.fromkeys((turn.turn for turn in learnt), 1.0))

    with attached(model, lora, seed) as adapted_model:
        training, finetune_s = _timed(lambda: train(adapted_model, learnt, weights, lora, seed))
        (adapted, probe), adapted_s = _timed(lambda: score_rendered(adapted_model, judged))
        save(adapted_model, Path(out_dir))

    return Adaptation(
        directory=str(out_dir),
        plain=plain,
        adapted=adapted,
        hardness=hardness,
        weights=weights,
        objective=min(mined.objectives) if mined else None,
        mined_text_ids=mined.verbalized if mined else (),
        losses=training.losses,
        steps=len(training.losses),
        stopped_early=training.stopped_early,
        probe=probe,
        mining_s=mined.seconds if mined else 0.0,
        finetune_s=finetune_s,
        scoring_s=plain_s + adapted_s,
    )


def _check_disjoint(examples: tuple[Example, ...], held_out: tuple[Example, ...]) -> None:
    """Judging an adapter on its own training turns sees nothing."""
    turns = [example.turn for example in examples]
    both = sorted(set(turns) & {example.turn for example in held_out})
    if both:
        raise TrainingError(f"turns {both} are both trained on and held out; expected one or the other")
    if len(set(turns)) != len(turns):
        raise TrainingError(f"found turns {turns}; expected each turn once")


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """The result and the wall seconds it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began
