"""One session through every variant: train where the variant trains, measure on later turns only.

Guarantees: the surrogate is the same for every variant and every session; a training that fails is reported,
and the session counts as plain there, as it would be served; nothing is measured on a turn that anything was
trained or judged on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from soma_vllm.adaptation.acceptance import Terms, choose, evidence_of
from soma_vllm.config import Config
from soma_vllm.errors import TrainingError
from soma_vllm.machine import training_dtype
from soma_vllm.method.generation import generate
from soma_vllm.method.recipe import Surrogate, adapting, load_surrogate, rendered
from soma_vllm.method.rendering import Rendered, render
from soma_vllm.method.scoring import pooled, score_turns
from soma_vllm.models.hub import local_path
from soma_vllm.models.quiet import quiet
from soma_vllm.sessions.state.gate import Verdict
from soma_vllm.tools.evaluate.dataset import Material, drop_foreign_teachers, material
from soma_vllm.tools.evaluate.statistics import rouge_l
from soma_vllm.tools.evaluate.trajectory import Say, Trajectory
from soma_vllm.tools.evaluate.variants import PLAIN, Variant, as_configured
from soma_vllm.tools.gap_command import open_gap_judge
from soma_vllm.types import Candidate, Evidence, Example


@dataclass(frozen=True)
class TurnNumbers:
    """One variant on one later turn; see `Numbers` for what each measure is."""

    turn: int
    nll: float
    top1: float
    kl: float | None
    gap: float | None
    rouge_l: float | None
    same: bool | None
    """Whether the free-running answer is the original's, word for word; None where none was generated."""
    prompt_tokens: int
    tokens: int


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
    """Steps behind the adapter; 0 where held-out turns said that no checkpoint was better than none."""
    distilled: bool = False
    """Whether the original's own distribution was the target, on every turn."""
    failed: str | None = None
    """Why the training failed; the numbers are then the plain surrogate's."""
    per_turn: tuple[TurnNumbers, ...] = ()
    """In order."""


@dataclass(frozen=True)
class Choice:
    """What the gate makes of one session."""

    candidate: Candidate
    variant: str | None
    """The measured variant that the candidate stands for; None for the original."""
    reason: str
    held_out: Mapping[str, Any]
    """What each candidate scored on held-out warm turns, whether or not the gate came to ask for it; under
    `warm` the plain surrogate on the whole warm start."""
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
        self._judge = open_gap_judge(config)
        self._surrogate = load_trainable(config)

    def measure(self, trajectory: Trajectory, variants: Sequence[Variant], say: Say) -> SessionResult:
        """Every variant on one session.

        The plain variants under each prefix of the others come first (`variants.choose` sees to it).

        Raises:
            TrainingError: there is nothing to measure, or the plain surrogate cannot read the session.
        """
        numbers: dict[str, Numbers] = {}
        trial = MeasuredTrial(self._config.adaptation.payback == "never")
        by_prefix: dict[str, _Laid] = {}
        for variant in variants:
            if variant.prefix not in by_prefix:
                by_prefix[variant.prefix] = self._lay(material(trajectory, variant.config(self._config)))
            laid = by_prefix[variant.prefix]
            say(variant.name)
            if variant.method == PLAIN:
                numbers[variant.name] = self._numbers(laid)
                if variant.prefix == self._config.prefix.mode:
                    found = laid.material
                    trial.warm = self._evidence(Candidate.PLAIN, (*found.examples, *found.held_out))
                    trial.held_out = self._evidence(Candidate.PLAIN, found.held_out)
            else:
                baseline = numbers[Variant(PLAIN, variant.prefix).name]
                numbers[variant.name] = self._train(variant, laid, baseline, trial)
        return SessionResult(numbers, self._choose(trial, numbers))

    def _lay(self, found: Material) -> _Laid:
        tokenizer = self._surrogate.tokenizer
        kept = replace(
            found,
            examples=drop_foreign_teachers(found.examples, tokenizer),
            held_out=drop_foreign_teachers(found.held_out, tokenizer),
            later=drop_foreign_teachers(found.later, tokenizer),
        )
        laid = []
        for example, turn in zip(kept.later, render(tokenizer, kept.later), strict=True):
            ends_falsely = example.teacher is None and example.turn in found.cut and len(turn.answer) > 1
            # Text does not show that it was cut off: the end of turn after it is not the original's.
            laid.append(turn.shortened(len(turn.prompt), len(turn.answer) - 1) if ends_falsely else turn)
        limit = min(self._config.surrogate.max_model_len, self._surrogate.model.config.max_position_embeddings)
        within = tuple(turn.within(limit) for turn in laid)
        return _Laid(
            kept, within, sum(len(a.prompt) < len(b.prompt) for a, b in zip(within, laid, strict=True))
        )

    def _train(self, variant: Variant, laid: _Laid, plain: Numbers, trial: MeasuredTrial) -> Numbers:
        """A trained variant's numbers; the gate's evidence if a server would train in this way."""
        config, found = self._config, laid.material
        mining, lora = variant.mining(config.mining), variant.lora(config.lora)
        turns = found.examples, found.held_out
        try:
            with adapting(self._surrogate, *turns, mining, lora, config.training.seed) as learnt:
                numbers = self._numbers(laid)
                if variant == as_configured(config):
                    trial.adapted = self._evidence(Candidate.ADAPTER, found.held_out)
        except TrainingError as error:
            return replace(plain, failed=str(error))
        return replace(
            numbers,
            train_s=learnt.mining_s + learnt.finetune_s,
            train_flops=learnt.flops,
            steps=learnt.steps,
            distilled=learnt.distilled,
        )

    def _numbers(self, laid: _Laid) -> Numbers:
        scores = score_turns(self._surrogate.decoder, laid.rendered)
        later = laid.material.later
        spoken = self._answers(later) if self._generates else []
        nothing: list[None] = [None] * len(later)
        gaps, answers = (self._gaps(spoken, later), spoken) if spoken else (nothing, nothing)
        turns = tuple(
            TurnNumbers(
                turn=example.turn,
                nll=score.nll / score.tokens,
                top1=score.hits / score.tokens,
                kl=None if score.kl is None else score.kl / score.tokens,
                gap=distance,
                rouge_l=None if answer is None else rouge_l(answer, example.answer),
                same=None if answer is None else answer.strip() == example.answer.strip(),
                prompt_tokens=len(read.prompt),
                tokens=score.tokens,
            )
            for example, score, answer, distance, read in zip(
                later, scores, answers, gaps, laid.rendered, strict=True
            )
        )
        by_token = pooled(scores)
        known = [score for score in scores if score.kl is not None]
        return Numbers(
            nll=by_token.nll,
            top1=by_token.top1,
            kl=sum(s.kl or 0.0 for s in known) / sum(s.tokens for s in known) if known else None,
            gap=_mean([turn.gap for turn in turns]),
            rouge_l=_mean([turn.rouge_l for turn in turns]),
            prompt_tokens=fmean(turn.prompt_tokens for turn in turns),
            tokens=by_token.tokens,
            turns=len(turns),
            shortened=laid.shortened,
            per_turn=turns,
        )

    def _answers(self, examples: Sequence[Example]) -> list[str]:
        """The surrogate's greedy answers, with the adapter that is attached, if any."""
        prompts, surrogate = [example.messages for example in examples], self._surrogate
        return generate(surrogate.decoder, surrogate.tokenizer, prompts, self._config.max_new_tokens)

    def _gaps(self, answers: Sequence[str], examples: Sequence[Example]) -> tuple[float, ...]:
        """The gap of each answer to the original's, by the server's judge.

        Raises:
            TrainingError: the judge could not judge one of them.
        """
        originals = [example.answer for example in examples]
        found = self._judge.gaps(list(zip(answers, originals, strict=True)))
        failure = next((gap.failure for gap in found if gap.failure is not None), None)
        if failure is not None:
            raise TrainingError(f"the gate's judge failed: {failure}")
        return tuple(gap.value for gap in found)

    def _evidence(self, candidate: Candidate, warm: Sequence[Example]) -> Evidence:
        """What the gate would know of a candidate, from warm turns, with the adapter that is attached."""
        agreement = pooled(score_turns(self._surrogate.decoder, rendered(self._surrogate, tuple(warm))))
        return evidence_of(candidate, warm, self._gaps(self._answers(warm), warm), agreement)

    def _choose(self, trial: MeasuredTrial, numbers: Mapping[str, Numbers]) -> Choice:
        config = self._config
        verdict, held_out = judge_measured(trial, config)
        served = {
            Candidate.PLAIN: Variant(PLAIN, config.prefix.mode).name,
            Candidate.ADAPTER: as_configured(config).name,
        }.get(verdict.candidate)
        later = None if served is None else numbers[served]
        return Choice(verdict.candidate, served, verdict.reason, held_out, later)


class MeasuredTrial:
    """`Trial` of a played dialogue: everything was measured before the gate asks."""

    def __init__(self, never_pays: bool = False) -> None:
        self.warm: Evidence | None = None
        """The plain surrogate on the whole warm start."""
        self.held_out: Evidence | None = None
        """The plain surrogate on the held-out turns alone."""
        self.adapted: Evidence | None = None
        """The adapter on them; None where none was trained as a server would."""
        self._never_pays = never_pays

    async def plain(self) -> Evidence:
        """The plain surrogate on the whole warm start."""
        assert self.warm is not None, "plain comes first among the variants"
        return self.warm

    async def objection(self) -> str | None:
        """How long a dialogue goes on is known here: whether an adapter pays is not guessed."""
        if self._never_pays:
            return "adaptation.payback is never"
        return None if self.adapted is not None else "none was trained as a server would"

    async def adapter(self) -> tuple[Evidence, Evidence]:
        """(plain, adapter) on the held-out turns."""
        assert self.held_out is not None
        assert self.adapted is not None
        return self.held_out, self.adapted


def judge_measured(trial: MeasuredTrial, config: Config) -> tuple[Verdict, dict[str, Any]]:
    """(the server's verdict, the numbers of every candidate that was measured)."""
    terms = Terms(config, config.adaptation.candidates)
    verdict = asyncio.run(choose(trial, terms))
    measured = [one for one in (trial.held_out, trial.adapted) if one is not None]
    assert trial.warm is not None
    warm = terms.judge([trial.warm]).numbers["candidates"][Candidate.PLAIN.value]
    return verdict, {**terms.judge(measured).numbers, "warm": warm}


@dataclass(frozen=True)
class _Laid:
    """A session under one prefix, ready to be measured."""

    material: Material
    rendered: tuple[Rendered, ...]
    """Of the later turns."""
    shortened: int


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
