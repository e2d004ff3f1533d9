"""One session through every variant: train where the variant trains, measure on later turns only.

Guarantees: the surrogate is the same for every variant and every session; a training that fails is told, and
the session counts as plain there, as it would be served; nothing is measured on a turn that anything was
trained or judged on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soma_vllm.config import Config
from soma_vllm.errors import TrainingError
from soma_vllm.method.generation import generate
from soma_vllm.method.recipe import Surrogate, adapting, score_plain
from soma_vllm.method.rendering import Rendered, render
from soma_vllm.method.scoring import score_turns
from soma_vllm.sessions.state.gate import gap, judge
from soma_vllm.tools.evaluate.dataset import Material, material, understood
from soma_vllm.tools.evaluate.statistics import rouge_l
from soma_vllm.tools.evaluate.trajectory import Told, Trajectory
from soma_vllm.tools.evaluate.variants import PLAIN, Variant, as_configured
from soma_vllm.types import Agreement, Candidate, Evidence, Example

Encode = Callable[[Sequence[str]], NDArray[np.float32]]


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


class Bench:
    """A surrogate and an encoder, and how to measure with them."""

    def __init__(self, config: Config, surrogate: Surrogate, encode: Encode, generates: bool) -> None:
        """`generates` False leaves out free-running answers on later turns, with gap and ROUGE-L."""
        self._config = config
        self._surrogate = surrogate
        self._encode = encode
        self._generates = generates

    def measure(self, trajectory: Trajectory, variants: Sequence[Variant], tell: Told) -> SessionResult:
        """Every variant on one session.

        The plain variants under each prefix of the others come first (`variants.choose` sees to it).

        Raises:
            TrainingError: there is nothing to measure, or the plain surrogate cannot read the session.
        """
        numbers: dict[str, Numbers] = {}
        evidence: list[Evidence] = []
        for variant, laid in self._laid_out(trajectory, variants):
            tell(variant.name)
            if variant.method == PLAIN:
                numbers[variant.name] = self._numbers(laid)
                judged = variant.prefix == self._config.prefix.mode
                if judged:
                    evidence.append(self._plain_evidence(laid))
            else:
                baseline = numbers[Variant(PLAIN, variant.prefix).name]
                numbers[variant.name], found = self._trained(variant, laid, baseline)
                evidence += found
        return SessionResult(numbers, self._choose(evidence, numbers))

    def _laid_out(self, trajectory: Trajectory, variants: Sequence[Variant]) -> Iterator[tuple[Variant, _Laid]]:
        """Each variant with the session under its prefix."""
        by_prefix: dict[str, _Laid] = {}
        for variant in variants:
            if variant.prefix not in by_prefix:
                by_prefix[variant.prefix] = self._lay(material(trajectory, variant.config(self._config)))
            yield variant, by_prefix[variant.prefix]

    def _lay(self, found: Material) -> _Laid:
        kept = replace(
            found,
            examples=understood(found.examples, self._surrogate.tokenizer),
            held_out=understood(found.held_out, self._surrogate.tokenizer),
            later=understood(found.later, self._surrogate.tokenizer),
        )
        rendered = []
        for example, turn in zip(kept.later, render(self._surrogate.tokenizer, kept.later), strict=True):
            ends_falsely = example.teacher is None and example.turn in found.cut and len(turn.answer) > 1
            # Text does not show that it was cut off: the end of turn after it is not the original's.
            rendered.append(turn.shortened(len(turn.prompt), len(turn.answer) - 1) if ends_falsely else turn)
        limit = min(self._config.surrogate.max_model_len, self._surrogate.model.config.max_position_embeddings)
        within = tuple(turn.within(limit) for turn in rendered)
        shortened = sum(len(a.prompt) < len(b.prompt) for a, b in zip(within, rendered, strict=True))
        return _Laid(kept, within, shortened)

    def _trained(self, variant: Variant, laid: _Laid, plain: Numbers) -> tuple[Numbers, tuple[Evidence, ...]]:
        """A trained variant's numbers, and the gate's evidence where a server would train just so."""
        config, surrogate, found = self._config, self._surrogate, laid.material
        mining, lora = variant.mining(config.mining), variant.lora(config.lora)
        seed = config.training.seed
        try:
            with adapting(surrogate, found.examples, found.held_out, mining, lora, seed) as learnt:
                numbers = self._numbers(laid)
                served = variant == as_configured(config)
                gaps = self._gaps(found.held_out) if served else ()
                evidence = self._evidence(Candidate.ADAPTER, gaps, laid, learnt.adapted)
        except TrainingError as error:
            return replace(plain, failed=str(error)), ()
        measured = replace(
            numbers,
            train_s=learnt.mining_s + learnt.finetune_s,
            train_flops=learnt.flops,
            steps=learnt.steps,
            distilled=learnt.distilled,
        )
        return measured, (evidence,) if served else ()

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
        """(gap, ROUGE-L) of each greedy answer to the original's."""
        answers = self._answers(examples)
        rouges = (rouge_l(said, example.answer) for said, example in zip(answers, examples, strict=True))
        return self._between(answers, examples), tuple(rouges)

    def _gaps(self, examples: Sequence[Example]) -> tuple[float, ...]:
        return self._between(self._answers(examples), examples)

    def _answers(self, examples: Sequence[Example]) -> list[str]:
        """Greedy answers of the surrogate, with the adapter that it carries at the moment, if any."""
        prompts = [example.messages for example in examples]
        surrogate = self._surrogate
        return generate(surrogate.decoder, surrogate.tokenizer, prompts, self._config.max_new_tokens)

    def _between(self, answers: Sequence[str], examples: Sequence[Example]) -> tuple[float, ...]:
        vectors = self._encode([*answers, *(example.answer for example in examples)])
        half = len(answers)
        return tuple(gap(a, b) for a, b in zip(vectors[:half], vectors[half:], strict=True))

    def _plain_evidence(self, laid: _Laid) -> Evidence:
        held_out = laid.material.held_out
        agreement = score_plain(self._surrogate, held_out)
        return self._evidence(Candidate.PLAIN, self._gaps(held_out), laid, agreement)

    def _evidence(
        self, candidate: Candidate, gaps: tuple[float, ...], laid: _Laid, agreement: Agreement
    ) -> Evidence:
        return Evidence(candidate, gaps, tuple(e.turn for e in laid.material.held_out), agreement)

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
