"""One adaptation from a session's warm start to an adapter on disk, top to bottom.

    render -> mine -> weigh -> attach -> train, judged at checkpoints -> score -> save -> detach

Guarantees: the surrogate is the same before and after, bit by bit, also when an adaptation fails; held-out
turns are scored and never learnt from; equal inputs and seeds give equal adapters on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from soma_vllm.config import Lora, Mining
from soma_vllm.errors import ModelError, TrainingError
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.finetune import attached, first_adapted_layer, save, train, turn_weights
from soma_vllm.method.mining import mine
from soma_vllm.method.packing import pack
from soma_vllm.method.rendering import Rendered, render
from soma_vllm.method.scoring import Probe, TurnScore, pooled, score_turns
from soma_vllm.method.signature import signature_of
from soma_vllm.method.stopping import Checkpoint
from soma_vllm.types import Agreement, Example, Signature

_T = TypeVar("_T")


@dataclass(frozen=True)
class Surrogate:
    """A loaded, frozen surrogate. One adaptation at a time may use it."""

    decoder: Decoder
    tokenizer: Any

    @property
    def model(self) -> Any:
        """The whole model, as transformers loaded it."""
        return self.decoder.model


@dataclass(frozen=True)
class Learnt:
    """The result of an adaptation, while its adapter is still in the surrogate. Plain values but for `peft`."""

    peft: Any
    """peft's view of the adapted model, for `finetune.save`."""
    plain: Agreement
    """The surrogate without the adapter, on the held-out turns."""
    adapted: Agreement
    """The surrogate with it, on the same turns."""
    checkpoints: tuple[Checkpoint, ...]
    """Agreement on the held-out turns after 0 steps and at each checkpoint."""
    steps: int
    """Steps behind the adapter: those of the best checkpoint; 0: none was better than the start."""
    losses: tuple[float, ...]
    """Training loss before each step taken, nats per answer token."""
    stopped_early: bool
    distilled: bool
    """Whether the original's distribution was the target, on every turn."""
    hardness: dict[int, float]
    """r_t by turn; empty where nothing was mined."""
    weights: dict[int, float]
    """omega_t by turn, mean 1."""
    objective: float | None
    """J(P) of the mined prompt; None where nothing was mined."""
    mined_text_ids: tuple[int, ...]
    """V(P), token ids of the surrogate; empty where nothing was mined."""
    probe: Probe
    """Log-probabilities of the first held-out turn under the adapted surrogate, to check the engine that
    serves it; empty without one."""
    flops: float
    """Floating-point operations of mining and training, estimated from shapes (2 per weight and token)."""
    mining_s: float
    finetune_s: float
    """Training, with the judging of checkpoints."""
    scoring_s: float
    signature: Signature | None = None
    """What the adapter does to a fixed text, to check the engine that serves it. Filled in by `adapt`."""


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
    return Surrogate(Decoder(model.to(device).eval().requires_grad_(False)), tokenizer)


def score_plain(surrogate: Surrogate, held_out: tuple[Example, ...]) -> Agreement:
    """Agreement of the surrogate without any adapter.

    Raises:
        TrainingError: nothing to score.
    """
    return pooled(score_turns(surrogate.decoder, rendered(surrogate, held_out)))


@contextmanager
def adapting(
    surrogate: Surrogate,
    examples: tuple[Example, ...],
    held_out: tuple[Example, ...],
    mining: Mining,
    lora: Lora,
    seed: int,
) -> Iterator[Learnt]:
    """Mine and train one session's adapter; inside the block the surrogate runs with it.

    Without held-out turns the last step is kept and nothing is judged.

    Raises:
        TrainingError: nothing to learn from, a held-out turn among the examples, a turn beyond
            the surrogate's context, or a number that is not finite. The surrogate is pristine again.
    """
    _check_disjoint(examples, held_out)
    decoder = surrogate.decoder
    learnt = rendered(surrogate, examples)
    judged = rendered(surrogate, held_out) if held_out else ()

    mined = mine(decoder, surrogate.tokenizer, learnt, mining, seed) if mines(mining) else None
    hardness = mined.hardness if mined else {}
    weights = turn_weights(hardness or dict.fromkeys((turn.turn for turn in learnt), 1.0))

    # A fresh adapter of 0 steps is the plain surrogate; one that starts from another adapter is not.
    plain = pooled(_scores(decoder, judged)) if lora.init_from is not None else None
    with attached(decoder, lora, seed) as peft:
        training, finetune_s = _timed(lambda: train(decoder, learnt, judged, weights, lora, seed))
        scores, scoring_s = _timed(lambda: _scores(decoder, judged))
        yield Learnt(
            peft=peft,
            plain=plain or (training.checkpoints[0].agreement if judged else pooled(())),
            adapted=pooled(scores),
            checkpoints=training.checkpoints,
            steps=training.steps,
            losses=training.losses,
            stopped_early=training.stopped_early,
            distilled=lora.objective == "kd" and all(turn.teacher is not None for turn in learnt),
            hardness=hardness,
            weights=weights,
            objective=min(mined.objectives) if mined else None,
            mined_text_ids=mined.verbalized if mined else (),
            probe=scores[0].probe if scores else Probe((), (), ()),
            flops=estimated_flops(decoder, learnt, judged, mining, lora, len(training.losses)),
            mining_s=mined.seconds if mined else 0.0,
            finetune_s=finetune_s,
            scoring_s=scoring_s,
        )


def adapt(
    surrogate: Surrogate,
    examples: tuple[Example, ...],
    held_out: tuple[Example, ...],
    mining: Mining,
    lora: Lora,
    seed: int,
    out_dir: str | Path,
) -> Learnt:
    """`adapting`, with the adapter saved to `out_dir`, its signature taken, and taken off again.

    Raises:
        TrainingError: as `adapting`; `out_dir` may hold part of an adapter.
    """
    with adapting(surrogate, examples, held_out, mining, lora, seed) as learnt:
        save(learnt.peft, Path(out_dir))
        signature = signature_of(surrogate.decoder, surrogate.tokenizer, learnt.peft)
    return replace(learnt, peft=None, signature=signature)


def mines(mining: Mining) -> bool:
    """Whether stage 1 runs. On `auto` it does not: nothing it finds helped later turns (docs/experiments)."""
    return mining.enabled is True


def rendered(surrogate: Surrogate, examples: tuple[Example, ...]) -> tuple[Rendered, ...]:
    """Examples as token ids that fit the surrogate's context.

    Raises:
        TrainingError: no examples, an empty answer, or a turn that does not fit.
    """
    turns = render(surrogate.tokenizer, examples)
    limit = surrogate.model.config.max_position_embeddings
    for turn in turns:
        if len(turn.inputs) > limit:
            raise TrainingError(
                f"turn {turn.turn}: found {len(turn.inputs)} tokens; the surrogate's context holds {limit}"
            )
    return turns


def estimated_flops(
    decoder: Decoder,
    learnt: tuple[Rendered, ...],
    judged: tuple[Rendered, ...],
    mining: Mining,
    lora: Lora,
    steps: int,
) -> float:
    """Operations of one adaptation: 2 per weight and token forward, as many backward to the inputs."""
    read = sum(len(strand.ids) for strand in pack([turn.within(lora.max_seq_length) for turn in learnt]))
    judging = sum(len(strand.ids) for strand in pack(judged))
    answers, judged_answers = (sum(len(turn.answer) for turn in turns) for turns in (learnt, judged))
    layer = 2.0 * decoder.layer_parameters()
    head = 2.0 * decoder.embedding.numel()
    below = first_adapted_layer(decoder, lora)
    above = decoder.depth - below
    looks = 1 + sum(1 for checkpoint in lora.checkpoints if checkpoint <= steps)
    flops = layer * below * (read + judging)
    flops += steps * 2 * (layer * above * read + head * answers)
    flops += looks * (layer * above * judging + head * judged_answers)
    if mines(mining):
        passes = mining.n_candidates * (2 * mining.iters + 1)
        flops += passes * (layer * decoder.depth * read + head * answers)
    return flops


def _scores(decoder: Decoder, judged: tuple[Rendered, ...]) -> list[TurnScore]:
    """Each held-out turn's agreement; empty where none was held out."""
    return score_turns(decoder, judged) if judged else []


def _check_disjoint(examples: tuple[Example, ...], held_out: tuple[Example, ...]) -> None:
    """An adapter judged on its own training turns looks better than it is."""
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
