"""Who serves a session, and what it learns first: mining, training, the gate, and what an adapter may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from soma_vllm.config.section import Positive, Ratio, Seconds, Section
from soma_vllm.types import Candidate


class Mining(Section):
    """Stage 1, soft-prompt mining on the surrogate (Eqs. 2 and 3)."""

    enabled: bool | Literal["auto"] = "auto"
    """True mines every session; False trains on the bare warm start, with equal weights. auto mines only where
    it was measured to help later turns (docs/experiments)."""
    hardness: Literal["divergence", "reference"] = "divergence"
    """How a turn's hardness r_t is read off; "reference" is the published code's inverted form, for studies."""
    soft_len: Annotated[int, Field(ge=1, le=256)] = 16
    """L, virtual tokens of the soft prompt."""
    n_candidates: Positive = 3
    """M, soft prompts mined from different random starts; the one of lowest objective is kept."""
    iters: Positive = 30
    lr: Annotated[float, Field(gt=0)] = 1.0e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-2
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    neighborhood_k: Positive = 32
    """k of Def. 3.1."""
    teacher_topm: Positive = 100
    """m, tokens of the surrogate's distribution that enter the expected embedding."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """tau of Def. 3.1."""
    lambda_exp: Annotated[float, Field(ge=0)] = 1.0
    beta_anti_degen: Annotated[float, Field(ge=0)] = 0.05
    lambda_P: Annotated[float, Field(ge=0)] = 1.0e-4
    init_std: Annotated[float, Field(gt=0)] = 0.02
    scale: Annotated[float, Field(gt=0)] = 0.25
    max_prompt_tokens: Positive = 768
    """A longer prompt keeps its end."""
    max_teacher_tokens: Positive = 96
    """A longer answer keeps its beginning."""


class Lora(Section):
    """Stage 2, localized LoRA fine-tuning (Eq. 4)."""

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    objective: Literal["nll", "kd"] = "kd"
    """kd: towards the original's own distribution, where it is known in the surrogate's vocabulary; towards the
    answer's words, as with nll, elsewhere."""
    top_layers: Positive | None = None
    """LoRA in this many upper layers only; what lies below them is computed once per session. null: in all."""
    checkpoints: tuple[Positive, ...] = ()
    """Step counts up to `steps` at which the adapter is judged on the held-out turns; the best one is kept, and
    training ends when they get worse. Empty: the last step alone."""
    init_from: str | None = None
    """Directory of an adapter of the same shape to start from (`soma distill`); null starts from nothing."""
    steps: Positive = 60
    batch_size: Positive | None = None
    """Turns per step; null takes all of them, which costs little more where they share their history."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-2
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    max_seq_length: Positive = 1024
    early_stop_patience: Positive = 20
    early_stop_min_delta: Annotated[float, Field(ge=0)] = 1.0e-3

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

    accept_threshold: Annotated[float, Field(ge=0, le=2)] = 0.10
    """eps: the mean gap over held-out turns, plus `accept_margin`, may be at most this."""
    accept_margin: Annotated[float, Field(ge=0, le=2)] = 0.0
    min_agreement: Ratio = 0.0
    """Least share of held-out answer tokens that are the candidate's own first choice. 0: the plain surrogate
    is judged by its gaps alone and does not read the answers, which on a CPU takes some seconds."""
    min_gain: Ratio = 0.1
    """Share by which an adapter's held-out NLL must be less than the plain surrogate's."""
    locality_threshold: Annotated[float, Field(ge=0, le=2)] = 0.35
    """Largest cosine distance of a query to the warm start's centroid that the surrogate may answer."""
    drift_window: Positive = 4
    """Audits in the moving mean."""
    drift_threshold: Annotated[float, Field(ge=0, le=2)] = 0.30
    consecutive_to_rollback: Positive = 2
    """m_cons: breaches in a row that roll the session back."""
    encoder_max_tokens: Positive = 256
    readmit_factor: Annotated[float, Field(gt=0, le=1)] = 0.8
    """`accept_threshold` is multiplied by this for every rollback and refusal that the session has had:
    hysteresis."""
    audit: Literal["generate", "score"] = "generate"
    """How the original audits a turn of the surrogate's. generate: it answers too, and the gap is taken.
    score: it only reads the surrogate's answer, one prefill, and says how surprising it is."""
    audit_rate: Ratio = 0.25
    """Share of the surrogate's turns that the original audits, in the background."""
    audits_per_minute: Annotated[float, Field(gt=0)] = 30.0
    """Most audits of the original over all sessions, on average; after a pause a minute's worth at once."""
    audit_yields: bool = True
    """Audits run only while no user waits for the original, and give way when one comes."""
    audit_wait_s: Seconds = 60.0
    """An audit that has not had its turn within this time, or whose turn takes longer, is dropped; on a slow
    machine within the time that the original's last twelve requests took, where that is longer."""
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
    """Words kept of each summarised query; 0 leaves those turns out without a word."""
    window_step: Positive = 2
    """Turns by which the anchored window moves at once, so that the prompt's head stays cacheable between."""


class Adaptation(Section):
    """When a session is adapted, and who may serve it then."""

    candidates: tuple[Candidate, ...] = (Candidate.PLAIN, Candidate.ADAPTER)
    """Compared on the same held-out turns; the cheapest that passes serves. The original is always the last."""
    allow_force_header: bool = False
    """Let a request's `X-SOMA-Force: plain|adapter` overrule the gate's verdict for its session (studies)."""
    cool_down_turns: Positive = 3
    """New turns answered by the original after a rollback or a refusal before the session is adapted again;
    twice as many after every further one."""
    max_trainings: Positive = 3
    """Trainings a session may have in its life."""
    train_timeout_s: Seconds = 900.0
    payback: Literal["auto", "always", "never"] = "auto"
    """Whether an adapter is trained where the plain surrogate does not pass. auto: where the turns that are
    still expected save more than it costs. always and never: for studies. The plain surrogate is judged in any
    case."""


class Payback(Section):
    """What is expected of sessions before this server has seen enough of its own, and when one counts as
    over."""

    remaining_turns: Annotated[float, Field(gt=0)] = 8.0
    """Further turns expected after any turn of a session."""
    weight: Annotated[float, Field(gt=0)] = 4.0
    """Observed sessions that each expectation here weighs as much as."""
    over_after_s: Seconds = 1800.0
    """A session that has been silent for this long has ended."""
    admitted: Ratio = 0.5
    """Share of trained adapters that the gate lets serve."""
    original_turn_s: Seconds = 5.0
    """Time that the original is busy per turn, turns beside each other sharing it; also per audit that
    generates."""
    surrogate_turn_s: Seconds = 1.0
    training_s: Seconds = 10.0
    """Time of a trainer per adapter: mining, fine-tuning and scoring. Where this says that adapters never pay,
    none is trained, and nothing corrects it: rather too low than too high."""


class Prices(Section):
    """What things cost, in any one currency: only ratios matter."""

    original_second: Annotated[float, Field(ge=0)] = 1.0
    """A second in which the original is busy, with however many turns."""
    surrogate_second: Annotated[float, Field(ge=0)] = 1.0
    trainer_second: Annotated[float, Field(ge=0)] = 1.0
    original_prompt_thousand: Annotated[float, Field(ge=0)] | None = None
    """A thousand prompt tokens of an original that is paid by the token; null: it is paid by the second."""
    original_completion_thousand: Annotated[float, Field(ge=0)] | None = None
    """A thousand tokens of its answers."""
