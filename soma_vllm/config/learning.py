"""Who serves a session, and what it learns first: mining, training, the gate, and what an adapter may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from soma_vllm.config.section import Positive, Ratio, Seconds, Section, Text
from soma_vllm.types import Candidate


class Mining(Section):
    """Stage 1, soft-prompt mining on the surrogate (Eqs. 2 and 3)."""

    enabled: bool | Literal["auto"] = "auto"
    """false: a training uses the bare warm start, with equal weights. true: every session is mined first. For
    studies. auto: mined where that was measured to help later turns: nowhere yet (docs/experiments)."""
    hardness: Literal["divergence", "reference"] = "divergence"
    """How a turn's hardness r_t is measured. reference: the published code's inverted form. For studies."""
    tail: Literal["distribution", "positions"] = "distribution"
    """H_tail of Eq. 3. distribution: the entropy beyond the m likeliest tokens, at the answer's positions.
    positions: the published code's, the whole entropy at the last 32 positions of the sequence. For studies."""
    soft_len: Annotated[int, Field(ge=1, le=256)] = 16
    """L, virtual tokens of the soft prompt."""
    n_candidates: Positive = 3
    """M, soft prompts mined from different random starts; the one of lowest objective is kept."""
    iters: Positive = 30
    """Optimiser steps of each mining run."""
    lr: Annotated[float, Field(gt=0)] = 1.0e-3
    """Learning rate of the soft prompt (AdamW)."""
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-2
    """Weight decay of the soft prompt (AdamW)."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of a gradient; a larger one is scaled down to it."""
    neighborhood_k: Positive = 32
    """k of Def. 3.1."""
    teacher_topm: Positive = 100
    """m, tokens of the surrogate's distribution that enter the expected embedding."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """tau of Def. 3.1."""
    lambda_exp: Annotated[float, Field(ge=0)] = 1.0
    """How much more a token weighs whose expected embedding points to the answer's: 1 + lambda_exp * cosine
    (Eq. 2)."""
    beta_anti_degen: Annotated[float, Field(ge=0)] = 0.05
    """beta, weight of the tail entropy, which keeps the mined distribution from collapsing onto a few tokens
    (Eq. 3). 0: left out."""
    lambda_P: Annotated[float, Field(ge=0)] = 1.0e-4
    """lambda_P, weight of the soft prompt's squared norm, before the tanh (Eq. 3). 0: left out."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the soft prompt's random start, before the tanh."""
    scale: Annotated[float, Field(gt=0)] = 0.25
    """Bound of the soft prompt's components: each is `scale` times a tanh."""
    max_prompt_tokens: Positive = 768
    """A longer prompt keeps its end."""
    max_teacher_tokens: Positive = 96
    """A longer answer keeps its beginning."""


class Lora(Section):
    """Stage 2, localized LoRA fine-tuning (Eq. 4)."""

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Rank of the adapter's matrices. The surrogate reserves memory for adapters of this rank."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """The adapter's product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of an adapter's inputs that is dropped while it trains."""
    target_modules: tuple[Text, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear layers that get an adapter."""
    objective: Literal["nll", "kd"] = "kd"
    """kd: towards the original's own distribution, where it is known in the surrogate's vocabulary, and
    elsewhere as nll, towards the answer's tokens."""
    top_layers: Positive | None = None
    """LoRA in this many upper layers only; what lies below them is computed once per session. null: in all."""
    checkpoints: tuple[Positive, ...] = ()
    """Step counts up to `steps` at which the adapter is judged on the held-out turns; the best one is kept, and
    training ends when they get worse. Empty: the last step alone."""
    init_from: Text | None = None
    """Directory of an adapter of the same shape to start from (`soma distill`); null starts from nothing."""
    steps: Positive = 60
    """Optimiser steps of a training, unless it stops earlier."""
    batch_size: Positive | None = None
    """Turns per step; null takes all of them, which costs little more where they share their history."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    """Learning rate (AdamW)."""
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-2
    """Weight decay (AdamW)."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of a gradient; a larger one is scaled down to it."""
    max_seq_length: Positive = 1024
    """Longest training text, tokens. A longer one loses the beginning of its prompt first."""
    early_stop_patience: Positive = 20
    """Steps without progress after which a training stops."""
    early_stop_min_delta: Annotated[float, Field(ge=0)] = 1.0e-3
    """Decrease of the mean training loss, nats per token, that counts as progress."""

    @model_validator(mode="after")
    def _checkpoints_are_steps(self) -> Lora:
        if (
            list(self.checkpoints) != sorted(set(self.checkpoints))
            or max(self.checkpoints, default=0) > self.steps
        ):
            raise ValueError(
                f"lora.checkpoints: found {list(self.checkpoints)}; expected increasing numbers of at most "
                f"lora.steps: {self.steps}"
            )
        return self


class Gate(Section):
    """Stage 3, acceptance, locality and drift (Cor. 4.3). Gaps lie in [0, 2]."""

    gap: Literal["facts", "encoder"] = "facts"
    """How two answers are compared. facts: numbers, dates, names, negations, order, JSON, code and SQL, beside
    the
    encoder; in [0, 1], 0.12 parts right answers from wrong ones (docs/gap.md). encoder: the cosine distance of
    their
    sentence embeddings, as the paper has it. Locality is the encoder's distance in either case."""
    accept_threshold: Annotated[float, Field(ge=0, le=2)] = 0.12
    """eps: the mean gap over held-out turns, plus `accept_margin`, may be at most this."""
    accept_margin: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Added to the mean gap before it is compared with `accept_threshold`: the surrogate has to be better by
    this much."""
    min_agreement: Ratio = 0.0
    """Least share of held-out answer tokens that are the candidate's own first choice. 0: the plain surrogate
    is judged by its gaps alone and does not score the answers, which takes some seconds on a CPU."""
    min_gain: Ratio = 0.1
    """Share by which an adapter's held-out NLL must be less than the plain surrogate's."""
    min_tool_turns: Positive = 2
    """Turns of the warm start, at least, in which the original called a tool and the surrogate did the same,
    before the surrogate may have turns with tools (surrogate.tools: checked)."""
    locality_threshold: Annotated[float, Field(ge=0, le=2)] = 0.35
    """Largest cosine distance of a query to the warm start's centroid that the surrogate may answer."""
    drift_window: Positive = 4
    """Audits in the moving mean."""
    drift_threshold: Annotated[float, Field(ge=0, le=2)] = 0.30
    """Moving mean of the audited gaps above which a session counts a breach. Where it lies above
    `accept_threshold`, a session may come to lie between the two and is served on; soma-serve says so."""
    consecutive_to_rollback: Positive = 2
    """m_cons: breaches in a row that roll the session back."""
    encoder_max_tokens: Positive = 256
    """Longest text that the sentence encoder reads, tokens; a longer one is cut at its end."""
    readmit_factor: Annotated[float, Field(gt=0, le=1)] = 0.8
    """`accept_threshold` is multiplied by this for every rollback and refusal that the session has had:
    hysteresis."""
    audit: Literal["generate", "score"] = "generate"
    """How the original audits a turn of the surrogate's. generate: it answers too, and the gap is taken.
    score: it only reads the surrogate's answer, one prefill, and says how surprising it is."""
    audit_rate: Ratio = 0.25
    """Share of the surrogate's turns that the original audits, in the background."""
    audits_per_minute: Annotated[float, Field(gt=0)] = 30.0
    """Most audits by the original per minute, all sessions together; unused ones are kept for a minute."""
    audit_yields: bool = True
    """Whether an audit waits for a time in which no user waits for the original, and is cancelled when one
    comes."""
    audit_wait_s: Seconds = 60.0
    """Longest wait of an audit for a time without users, seconds: after it the audit runs beside them, so that
    no load ends all audits. Also its longest run, after which it is dropped. On a slow machine the limit is the
    time of the original's last twelve requests, where that is longer."""
    surprise_threshold: Annotated[float, Field(gt=0)] = 2.0
    """Mean NLL of the surrogate's answers under the original, nats per token, that is drift (audit: score)."""


class Prefix(Section):
    """What the surrogate sees of a long history."""

    mode: Literal["full", "anchored", "sliding"] = "full"
    """full: everything. sliding: a summary and the last turns, as in the paper. anchored: the system message
    and turn 1 verbatim, a summary of the middle, the last turns; its window moves in steps."""
    anchor: Literal["first", "facts"] = "facts"
    """What the anchor keeps verbatim: turn 1 alone, or also later turns that bring facts (a passage, a table,
    code, numbers)."""
    anchor_words: Positive = 400
    """Most words of later turns in the anchor."""
    anchor_role: Literal["user", "system"] = "user"
    """Where the anchor stands. user: as turns, with their answers. system: in the system message, without them,
    which costs fewer tokens at the same agreement; needs a surrogate whose chat template knows that role."""
    summary_words: Annotated[int, Field(ge=0)] = 12
    """Words kept of each summarised query; 0: those turns are left out."""
    window_step: Positive = 2
    """Turns by which the anchored window moves at once, so that the prompt's head stays cacheable between."""


class Adaptation(Section):
    """When a session is adapted, and who may serve it then."""

    candidates: tuple[Candidate, ...] = (Candidate.PLAIN, Candidate.ADAPTER)
    """Compared on the same held-out turns; the cheapest that passes serves. The original is always the last."""
    allow_force_header: bool = False
    """Let a request's `X-SOMA-Force: plain|adapter` overrule the gate's verdict for its session. For
    studies."""
    cool_down_turns: Positive = 3
    """New turns answered by the original after a rollback or a refusal before the session is adapted again;
    twice as many after every further one."""
    max_looks: Positive = 2
    """Refusals and rollbacks after which a session stays with the original. Each look at a session is one more
    chance to let in a surrogate that is not good enough: k looks are at most k times as likely to as one."""
    max_trainings: Positive = 3
    """Trainings a session may have in its life."""
    max_concurrent: Positive = 8
    """Adaptations that are judged or trained at the same time; further ones wait."""
    max_attempts: Positive = 3
    """Beginnings of one adaptation, where servers end during it: a session that ends its server is not tried
    again."""
    teachers_mib: Positive = 256
    """Memory for the original's log-probabilities until they are trained on, MiB; beyond it the sessions that
    have been idle longest learn from text. At 20 a token some 200 bytes for each token of an answer."""
    train_timeout_s: Seconds = 900.0
    """Longest run of a training or of a trainer's score, seconds. After it the trainer is replaced and the
    session stays with the original."""
    payback: Literal["auto", "always", "never"] = "auto"
    """Whether an adapter is trained where the plain surrogate does not pass. auto: where the turns that are
    still expected save more than it costs. always, never: whatever it costs, or not at all. For studies. The
    plain surrogate is judged in any case."""


class Payback(Section):
    """What sessions and adapters are expected to take, until this server has seen enough of its own, and when a
    session counts as over."""

    remaining_turns: Annotated[float, Field(gt=0)] = 8.0
    """Further turns expected after any turn of a session."""
    weight: Annotated[float, Field(gt=0)] = 4.0
    """Weight of each expectation here, in observations: of sessions, turns or trainings."""
    over_after_s: Seconds = 1800.0
    """Seconds without a turn after which a session counts as ended."""
    admitted: Ratio = 0.5
    """Share of trained adapters that the gate lets serve."""
    original_turn_s: Seconds = 5.0
    """Seconds that the original is busy per turn, concurrent turns sharing them; also per audit that
    generates."""
    surrogate_turn_s: Seconds = 1.0
    """Seconds that the surrogate is busy per turn, concurrent turns sharing them."""
    training_s: Seconds = 10.0
    """Seconds of a trainer per adapter: mining, fine-tuning and scoring. Prefer a low estimate: if it rules out
    every training, no real one ever corrects it."""


class Prices(Section):
    """What things cost, in any one currency: only ratios matter."""

    original_second: Annotated[float, Field(ge=0)] = 1.0
    """A second in which the original is busy, with however many turns."""
    surrogate_second: Annotated[float, Field(ge=0)] = 1.0
    """A second in which the surrogate is busy."""
    trainer_second: Annotated[float, Field(ge=0)] = 1.0
    """A second of a trainer."""
    original_prompt_thousand: Annotated[float, Field(ge=0)] | None = None
    """A thousand prompt tokens of an original that is paid by the token; null: it is paid by the second."""
    original_completion_thousand: Annotated[float, Field(ge=0)] | None = None
    """A thousand tokens of its answers."""
