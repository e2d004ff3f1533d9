"""Stage 2: a LoRA adapter from the original's answers, harder turns counting more (Eq. 4).

Guarantees: whatever happens inside `attached`, the model leaves it as it entered: no adapter, the same
weights bit by bit, the same flags. An adapter therefore never starts from another session's. Only LoRA
weights learn, in float32 also over a bfloat16 base. The global random state is left alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from soma_vllm.config import Lora
from soma_vllm.errors import TrainingError
from soma_vllm.method.rendering import Rendered, answer_ids, answer_logits
from soma_vllm.method.soft_prompt import at_least_float32


@dataclass(frozen=True)
class Training:
    """How a training went."""

    losses: tuple[float, ...]
    """Weighted training loss before each step, nats per answer token."""
    stopped_early: bool


def turn_weights(hardness: Mapping[int, float]) -> dict[int, float]:
    """omega_t proportional to r_t with mean 1 (Eq. 4); all 1 where every r_t is 0.

    Raises:
        TrainingError: a hardness is negative or not finite.
    """
    wrong = {turn: value for turn, value in hardness.items() if not (math.isfinite(value) and value >= 0)}
    if wrong:
        raise TrainingError(f"found hardness by turn {wrong}; expected finite numbers of at least 0")
    total = sum(hardness.values())
    if total == 0:
        return dict.fromkeys(hardness, 1.0)
    return {turn: value * len(hardness) / total for turn, value in hardness.items()}


@contextmanager
def attached(model: Any, lora: Lora, seed: int) -> Iterator[Any]:
    """The model with a fresh adapter, in evaluation mode, for the length of the block.

    Raises:
        TrainingError: the model already carries an adapter, or lacks a target module.
    """
    _check_pristine(model)
    _check_targets(model, lora.target_modules)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    with _seeded(seed, model.device):
        adapted = get_peft_model(model, _peft_config(lora))
    try:
        adapted.eval()
        yield adapted
    finally:
        adapted.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        for name, module in model.named_modules():
            module.training = modes[name]


def train(
    adapted: Any, rendered: Sequence[Rendered], weights: Mapping[int, float], lora: Lora, seed: int
) -> Training:
    """Minimise the weighted token NLL of the answers (Eq. 4); prompts are read and never scored.

    A step's loss is sum over its turns of omega_t * (sum of token NLLs), over its answer tokens. Training
    stops early once the mean loss of one pass over the turns has not improved by `early_stop_min_delta` for
    `early_stop_patience` steps. `weights` holds omega_t by turn.

    Raises:
        TrainingError: the loss is not finite, or there is nothing to learn from.
    """
    if not rendered:
        raise TrainingError("found no turns to learn from; expected at least one")
    turns = [turn.within(lora.max_seq_length) for turn in rendered]
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lora.lr, weight_decay=lora.weight_decay)
    patience = _Patience(
        lora.early_stop_patience, lora.early_stop_min_delta, window=math.ceil(len(turns) / lora.batch_size)
    )
    batches = _batches(turns, lora.batch_size, seed)
    losses: list[float] = []
    adapted.train()
    with _seeded(seed, adapted.device):
        while len(losses) < lora.steps and not patience.exhausted:
            optimizer.zero_grad(set_to_none=True)
            losses.append(_accumulate(adapted, next(batches), weights))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"step {len(losses)}: found a training loss of {losses[-1]}; expected a finite number"
                )
            nn.utils.clip_grad_norm_(parameters, lora.grad_clip)
            optimizer.step()
            patience.observe(losses[-1])
    adapted.eval()
    return Training(tuple(losses), stopped_early=len(losses) < lora.steps)


def save(adapted: Any, directory: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as vLLM and peft load them, and nothing else.

    Raises:
        TrainingError: a weight is not finite.
    """
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise TrainingError(f"adapter weight {name} is not finite")
    # "auto" would ask a model hub whether the vocabulary was resized.
    adapted.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's model card


def _accumulate(adapted: Any, batch: Sequence[Rendered], weights: Mapping[int, float]) -> float:
    """Add one batch's gradients, turn by turn (no padding, one turn's activations alive); its loss."""
    tokens = sum(len(turn.answer) for turn in batch)
    total = 0.0
    for turn in batch:
        logits = at_least_float32(answer_logits(adapted, turn))
        nll = functional.cross_entropy(logits, answer_ids(adapted, turn), reduction="sum")
        share = weights[turn.turn] * nll / tokens
        share.backward()  # type: ignore[no-untyped-call]
        total += float(share.detach())
    return total


def _batches(turns: Sequence[Rendered], size: int, seed: int) -> Iterator[list[Rendered]]:
    """Endless passes over the turns, each in a fresh seeded order, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(turns), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [turns[index] for index in order[start : start + size]]


class _Patience:
    """Early stopping on a moving mean: batches differ in their turns, a pass over all of them does not."""

    def __init__(self, patience: int, min_delta: float, window: int) -> None:
        self._patience = patience
        self._min_delta = min_delta
        self._recent: deque[float] = deque(maxlen=window)
        self._best = math.inf
        self._steps_without = 0

    @property
    def exhausted(self) -> bool:
        return self._steps_without >= self._patience

    def observe(self, loss: float) -> None:
        self._recent.append(loss)
        if len(self._recent) < (self._recent.maxlen or 1):
            return
        mean = sum(self._recent) / len(self._recent)
        if mean < self._best - self._min_delta:
            self._best = mean
            self._steps_without = 0
        else:
            self._steps_without += 1


def _peft_config(lora: Lora) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        # vLLM declares an int; JSON keeps the difference.
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
    )


def _check_pristine(model: Any) -> None:
    carried = [name for name, _ in model.named_parameters() if "lora_" in name]
    if carried or hasattr(model, "peft_config"):
        raise TrainingError(
            f"the surrogate already carries an adapter ({len(carried)} LoRA weights); expected a pristine model"
        )


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """Refuse a target before peft has touched the model."""
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    missing = [target for target in targets if target.rpartition(".")[2] not in linear]
    if missing or not targets:
        raise TrainingError(
            f"lora.target_modules: found {missing or 'none'}; expected names among {sorted(linear)}"
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of its own for the block."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
