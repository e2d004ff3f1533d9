"""Stage 2: a LoRA adapter from the original's answers, harder turns counting more (Eq. 4).

Guarantees: whatever happens inside `attached`, the model leaves it as it entered: no adapter, the same
weights bit by bit, the same flags. An adapter therefore never starts from another session's. Only LoRA
weights learn, in float32 also over a bfloat16 base. The global random state is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from soma_vllm.config import Lora
from soma_vllm.documents import read_json
from soma_vllm.errors import TrainingError
from soma_vllm.method.activation_cache import Trunk
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.losses import answer_kl, token_nll
from soma_vllm.method.rendering import Rendered
from soma_vllm.method.stopping import Best, Checkpoint, Judge, Patience


@dataclass(frozen=True)
class Training:
    """What a training did."""

    losses: tuple[float, ...]
    """Weighted training loss before each step, nats per answer token."""
    checkpoints: tuple[Checkpoint, ...]
    """In the order of their steps; the first, of 0 steps, is the adapter as it started: the plain surrogate, or
    what `lora.init_from` makes of it. Empty without held-out turns."""
    steps: int
    """Steps behind the weights that were kept."""
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
def attached(decoder: Decoder, lora: Lora, seed: int) -> Iterator[Any]:
    """The decoder's model with a fresh adapter in it, in evaluation mode, inside the block.

    The adapter starts from nothing (its product is 0), or from the files in `lora.init_from`. Yields peft's
    model, for `save`; inside the block the decoder runs with the adapter.

    Raises:
        TrainingError: the model already carries an adapter, lacks a target module, or `lora.init_from` holds
            an adapter of another shape.
    """
    model = decoder.model
    _check_pristine(model)
    _check_targets(model, lora.target_modules)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    with _seeded(seed, model.device):
        adapted = get_peft_model(model, _peft_config(decoder, lora))
    try:
        if lora.init_from is not None:
            _start_from(adapted, lora, Path(lora.init_from))
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
    decoder: Decoder,
    learnt: Sequence[Rendered],
    held_out: Sequence[Rendered],
    weights: Mapping[int, float],
    lora: Lora,
    seed: int,
) -> Training:
    """Fit the adapter in `decoder` to the turns of `learnt`; keep the checkpoint that is best on `held_out`.

    A step's loss is sum over its turns of omega_t * (sum of token losses), over its answer tokens: the NLL of
    Eq. 4, or with objective "kd" the KL to the original's distribution where a turn has one. Training stops
    early once the mean loss of one pass over the turns has not improved by `early_stop_min_delta` for
    `early_stop_patience` steps, or once a checkpoint is no better on `held_out` than the best before it, the
    start among them.
    `weights` holds omega_t by turn. Without `lora.checkpoints`, or without held-out turns, the last step is
    kept; with both, no step is taken after the last checkpoint.

    Raises:
        TrainingError: the loss is not finite, or there is nothing to learn from.
    """
    if not learnt:
        raise TrainingError("found no turns to learn from; expected at least one")
    cut = first_adapted_layer(decoder, lora)
    turns = [turn.within(lora.max_seq_length) for turn in learnt]
    trunk = Trunk.grow(decoder, turns, cut)
    judge = Judge(Trunk.grow(decoder, held_out, cut), held_out) if held_out else None
    parameters = [parameter for parameter in decoder.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lora.lr, weight_decay=lora.weight_decay)
    size = lora.batch_size or len(turns)
    patience = Patience(
        lora.early_stop_patience, lora.early_stop_min_delta, window=math.ceil(len(turns) / size)
    )
    best = Best(parameters, judge)
    checkpoints = lora.checkpoints if judge else ()
    most = checkpoints[-1] if checkpoints else lora.steps
    drawn = _batches([turn.turn for turn in turns], size, seed)
    losses: list[float] = []
    with _seeded(seed, decoder.device):
        while len(losses) < most and not patience.exhausted:
            optimizer.zero_grad(set_to_none=True)
            losses.append(_accumulate(trunk, next(drawn), weights, lora.objective))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"step {len(losses)}: found a training loss of {losses[-1]}; expected a finite number"
                )
            nn.utils.clip_grad_norm_(parameters, lora.grad_clip)
            optimizer.step()
            patience.observe(losses[-1])
            if len(losses) in checkpoints and not best.improves(len(losses)):
                break
    stopped = len(losses) < most
    if not checkpoints or (stopped and patience.exhausted):
        best.improves(len(losses))
    kept = best.restore(last=not checkpoints)
    return Training(tuple(losses), tuple(best.seen), kept, stopped)


def first_adapted_layer(decoder: Decoder, lora: Lora) -> int:
    """Index of the lowest layer with LoRA in it."""
    return 0 if lora.top_layers is None else max(0, decoder.depth - lora.top_layers)


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


def _accumulate(trunk: Trunk, drawn: Collection[int], weights: Mapping[int, float], objective: str) -> float:
    """Add the gradients of some turns, batch by batch; their loss."""
    tokens = sum(
        len(turn.answer) for batch, _ in trunk.batches for turn, _, _ in batch.rows() if turn.turn in drawn
    )
    total = 0.0
    trunk.decoder.model.train()
    for read in trunk.read(drawn):
        losses = [weights[turn.turn] * _turn_loss(turn, logits, objective) for turn, logits in read]
        share = torch.stack(losses).sum() / tokens
        share.backward()  # type: ignore[no-untyped-call]
        total += float(share.detach())
    trunk.decoder.model.eval()
    return total


def _turn_loss(turn: Rendered, logits: torch.Tensor, objective: str) -> torch.Tensor:
    """The sum of a turn's token losses."""
    if objective == "kd" and turn.teacher is not None:
        return answer_kl(logits, turn).sum()
    return token_nll(logits, torch.tensor(turn.answer, device=logits.device)).sum()


def _batches(turns: Sequence[int], size: int, seed: int) -> Iterator[frozenset[int]]:
    """Endless passes over the turn numbers, each in a fresh seeded order, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(turns), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield frozenset(turns[index] for index in order[start : start + size])


def _start_from(adapted: Any, lora: Lora, directory: Path) -> None:
    """Fill the fresh adapter with a saved one's weights."""
    try:
        saved = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
        told = dict(read_json(directory / CONFIG_NAME))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise TrainingError(
            f"lora.init_from: {directory}: found no adapter that can be read: {error}"
        ) from error
    # The same weights would weigh more or less.
    if (alpha := told.get("lora_alpha")) != lora.alpha:
        raise TrainingError(f"lora.init_from: {directory}: found alpha {alpha}; expected {lora.alpha}")
    if scaled := [name for name in ("use_rslora", "alpha_pattern", "rank_pattern") if told.get(name)]:
        keys = ", ".join(scaled)
        raise TrainingError(
            f"lora.init_from: {directory}: found {keys}; expected one alpha / rank for all weights"
        )
    expected = {name: list(value.shape) for name, value in _weights(adapted).items()}
    found = {name: list(value.shape) for name, value in saved.items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise TrainingError(
            f"lora.init_from: {directory}: {len(differing)} weights do not fit, such as {name}: found "
            f"{found.get(name, 'none')}; expected {expected.get(name, 'none')} "
            "(same rank, targets and layers as lora.*)"
        )
    set_peft_model_state_dict(adapted, saved)


def _weights(adapted: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights under the names they are saved by."""
    # "auto" would ask a model hub whether the vocabulary was resized.
    weights: dict[str, torch.Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return weights


def _peft_config(decoder: Decoder, lora: Lora) -> LoraConfig:
    first = first_adapted_layer(decoder, lora)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        # vLLM declares an int; JSON keeps the difference.
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        layers_to_transform=list(range(first, decoder.depth)) if first else None,
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
