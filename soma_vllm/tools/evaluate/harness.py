"""One session through every variant: train where the variant trains, measure on later turns only.

Guarantees: the surrogate is the same for every variant and every session; a training that fails is reported,
and the session counts as plain there, as it would be served; nothing is measured on a turn that anything was
trained or judged on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from soma_vllm.config import Config
from soma_vllm.errors import TrainingError
from soma_vllm.machine import training_dtype
from soma_vllm.method.encoder import SentenceEncoder
from soma_vllm.method.generation import generate
from soma_vllm.method.recipe import Surrogate, adapting, load_surrogate, score_plain
from soma_vllm.method.rendering import Rendered, render
from soma_vllm.method.scoring import score_turns
from soma_vllm.models.hub import local_path
from soma_vllm.models.quiet import quiet
from soma_vllm.sessions.state.gate import gap, judge
from soma_vllm.tools.evaluate.dataset import Material, drop_foreign_teachers, material
from soma_vllm.tools.evaluate.statistics import rouge_l
from soma_vllm.tools.evaluate.trajectory import Say, Trajectory
from soma_vllm.tools.evaluate.variants import PLAIN, Variant, as_configured
from soma_vllm.types import Agreement, Candidate, Evidence, Example


@dataclass(frozen=True)
class Numbers:
    """One variant on the later turns of one session."""

    nll: float
    """Mean negative log-likelihood of the original's answer tokens, nats."""
    top1: float
    """Share of them that are the variant's own first choice."""
    kl: float | None
    """Mean KL to the original's head per token, nats; None where the original shows only its words, or the
    surrogate has another vocabulary."""
    gap: float | None
    """Mean encoder gap of free-running answers; None where none were generated."""
    rouge_l: float | None
    prompt_tokens: float
    """Mean prompt tokens of a turn."""
    tokens: int
    """Answer tokens measured."""
    turns: int
    shortened: int = 0
    """Turns whose prompt lost its beginning to `surrogate.max_model_len`."""
    train_s: float = 0.0
    """Mining, fine-tuning and choosing among checkpoints."""
    train_flops: float = 0.0
    steps: int = 0
    """Steps behind the adapter; 0 where held-out turns said that every checkpoint was worse than none."""
    distilled: bool = False
    """Whether the original's own distribution was the target, on every turn."""
    failed: str | None = None
    """Why the training failed; the numbers are then the plain surrogate's."""


@dataclass(frozen=True)
class Choice:
    """What the gate makes of one session."""

    candidate: Candidate
    variant: str | None
    """The measured variant that the candidate stands for; None for the original."""
    reason: str
    held_out: Mapping[str, Any]
    """What each candidate scored on held-out warm turns."""
    later: Numbers | None
    """The chosen variant on later turns; None for the original."""


@dataclass(frozen=True)
class SessionResult:
    """One session under every variant, by the variant's name."""

    numbers: Mapping[str, Numbers]
    choice: Choice


def load_trainable(config: Config) -> Surrogate:
    """The configured surrogate, as trainers load it. Raises ModelError: it is not on this machine."""
    training = config.training
    assert config.surrogate_model is not None, "for_serving has checked"
    dtype = training_dtype(training.dtype, training.device)
    with quiet():
        return load_surrogate(local_path(config.surrogate_model), dtype, training.device, training.threads)


class Bench:
    """A surrogate and an encoder, and how to measure with them."""

    def __init__(self, config: Config, generates: bool) -> None:
        """Load both models; `generates` False leaves out free-running answers, with gap and ROUGE-L."""
        self._config = config
        self._generates = generates
        with quiet():
            encoder = SentenceEncoder(
                local_path(config.encoder.model), config.gate.encoder_max_tokens, config.encoder.threads
            )
        self._encode = encoder.encode
        self._surrogate = load_trainable(config)

    def measure(self, trajectory: Trajectory, variants: Sequence[Variant], say: Say) -> SessionResult:
        """Every variant on one session.

        The plain variants under each prefix of the others come first (`variants.choose` sees to it).

        Raises:
            TrainingError: there is nothing to measure, or the plain surrogate cannot read the session.
        """
        numbers: dict[str, Numbers] = {}
        evidence: list[Evidence] = []
        by_prefix: dict[str, _Laid] = {}
        for variant in variants:
            if variant.prefix not in by_prefix:
                by_prefix[variant.prefix] = self._lay(material(trajectory, variant.config(self._config)))
            laid = by_prefix[variant.prefix]
            say(variant.name)
            if variant.method == PLAIN:
                numbers[variant.name] = self._numbers(laid)
                if variant.prefix == self._config.prefix.mode:
                    agreement = score_plain(self._surrogate, laid.material.held_out)
                    evidence.append(self._evidence(Candidate.PLAIN, laid, agreement))
            else:
                baseline = numbers[Variant(PLAIN, variant.prefix).name]
                numbers[variant.name], found = self._train(variant, laid, baseline)
                evidence += [] if found is None else [found]
        return SessionResult(numbers, self._choose(evidence, numbers))

    def _lay(self, found: Material) -> _Laid:
        tokenizer = self._surrogate.tokenizer
        kept = replace(
            found,
            examples=drop_foreign_teachers(found.examples, tokenizer),
            held_out=drop_foreign_teachers(found.held_out, tokenizer),
            later=drop_foreign_teachers(found.later, tokenizer),
        )
        rendered = []
        for example, turn in zip(kept.later, render(tokenizer, kept.later), strict=True):
            ends_falsely = example.teacher is None and example.turn in found.cut and len(turn.answer) > 1
            # Text does not show that it was cut off: the end of turn after it is not the original's.
            rendered.append(turn.shortened(len(turn.prompt), len(turn.answer) - 1) if ends_falsely else turn)
        limit = min(self._config.surrogate.max_model_len, self._surrogate.model.config.max_position_embeddings)
        within = tuple(turn.within(limit) for turn in rendered)
        return _Laid(
            kept, within, sum(len(a.prompt) < len(b.prompt) for a, b in zip(within, rendered, strict=True))
        )

    def _train(self, variant: Variant, laid: _Laid, plain: Numbers) -> tuple[Numbers, Evidence | None]:
        """A trained variant's numbers, and the gate's evidence if a server would train in this way."""
        config, found = self._config, laid.material
        mining, lora, evidence = variant.mining(config.mining), variant.lora(config.lora), None
        turns = found.examples, found.held_out
        try:
            with adapting(self._surrogate, *turns, mining, lora, config.training.seed) as learnt:
                numbers = self._numbers(laid)
                if variant == as_configured(config):
                    evidence = self._evidence(Candidate.ADAPTER, laid, learnt.adapted)
        except TrainingError as error:
            return replace(plain, failed=str(error)), None
        measured = replace(
            numbers,
            train_s=learnt.mining_s + learnt.finetune_s,
            train_flops=learnt.flops,
            steps=learnt.steps,
            distilled=learnt.distilled,
        )
        return measured, evidence

    def _numbers(self, laid: _Laid) -> Numbers:
        scores = score_turns(self._surrogate.decoder, laid.rendered)
        tokens = sum(score.tokens for score in scores)
        known = [(score.kl, score.tokens) for score in scores if score.kl is not None]
        gaps, rouges = self._free_running(laid.material.later) if self._generates else ((), ())
        return Numbers(
            nll=sum(score.nll for score in scores) / tokens,
            top1=sum(score.hits for score in scores) / tokens,
            kl=sum(kl for kl, _ in known) / sum(count for _, count in known) if known else None,
            gap=_mean(gaps),
            rouge_l=_mean(rouges),
            prompt_tokens=sum(len(turn.prompt) for turn in laid.rendered) / len(laid.rendered),
            tokens=tokens,
            turns=len(scores),
            shortened=laid.shortened,
        )

    def _free_running(self, examples: Sequence[Example]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(gap, ROUGE-L) of each greedy answer to the original's, with the adapter that is attached, if any."""
        prompts, surrogate = [example.messages for example in examples], self._surrogate
        answers = generate(surrogate.decoder, surrogate.tokenizer, prompts, self._config.max_new_tokens)
        references = [example.answer for example in examples]
        vectors = self._encode([*answers, *references])
        half = len(answers)
        gaps = (gap(a, b) for a, b in zip(vectors[:half], vectors[half:], strict=True))
        return tuple(gaps), tuple(rouge_l(a, b) for a, b in zip(answers, references, strict=True))

    def _evidence(self, candidate: Candidate, laid: _Laid, agreement: Agreement) -> Evidence:
        """What the gate would know of a candidate, from held-out warm turns."""
        held_out = laid.material.held_out
        gaps, _ = self._free_running(held_out)
        return Evidence(candidate, gaps, tuple(e.turn for e in held_out), agreement)

    def _choose(self, evidence: Sequence[Evidence], numbers: Mapping[str, Numbers]) -> Choice:
        config = self._config
        verdict = judge(evidence, config.gate, config.acceptance_min_turns, config.adaptation.candidates)
        served = {
            Candidate.PLAIN: Variant(PLAIN, config.prefix.mode).name,
            Candidate.ADAPTER: as_configured(config).name,
        }.get(verdict.candidate)
        later = None if served is None else numbers[served]
        return Choice(verdict.candidate, served, verdict.reason, verdict.numbers, later)


@dataclass(frozen=True)
class _Laid:
    """A session under one prefix, ready to be measured."""

    material: Material
    rendered: tuple[Rendered, ...]
    """Of the later turns."""
    shortened: int


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
