"""Messages to and from a trainer: plain and picklable. Tensors are exchanged as files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from soma_vllm.config import Lora, Mining
from soma_vllm.types import Agreement, Example, Signature


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of a trainer, fixed when it starts."""

    surrogate_path: str
    device: str
    dtype: str
    threads: int
    nice: int


@dataclass(frozen=True)
class TrainerReady:
    """A trainer's acknowledgement that its surrogate is loaded."""

    pid: int
    device: str
    seconds: float


@dataclass(frozen=True)
class ScoreRequest:
    """Score the plain surrogate on held-out turns, teacher-forced."""

    held_out: tuple[Example, ...]


@dataclass(frozen=True)
class TrainRequest:
    """Mine and distil one session's warm start into an adapter."""

    examples: tuple[Example, ...]
    """Turns to learn from."""
    held_out: tuple[Example, ...]
    """Turns to be judged on; never trained on."""
    mining: Mining
    lora: Lora
    seed: int
    out_dir: str
    """An empty directory of this request alone; the adapter's files are written there."""


@dataclass(frozen=True)
class TrainResult:
    """A trained adapter's evidence and cost."""

    directory: str
    plain: Agreement
    """The plain surrogate on the held-out turns."""
    adapted: Agreement
    """The same under the adapter."""
    checkpoints: tuple[tuple[int, Agreement], ...]
    """(steps, agreement on the held-out turns) after 0 steps and at each checkpoint."""
    hardness: dict[int, float]
    """r_t of each trained turn; empty where nothing was mined."""
    steps: int
    """Steps behind the adapter."""
    distilled: bool
    """Whether the original's distribution was the target, and not only its tokens."""
    losses: tuple[float, ...]
    flops: float
    mining_s: float
    finetune_s: float
    scoring_s: float
    signature: Signature | None = None
    """What the engine that serves the adapter is checked against; None: it is not checked."""


class Trainer(Protocol):
    """Something that trains and scores in the background. Both verbs raise TrainingError."""

    async def train(self, request: TrainRequest) -> TrainResult: ...
    async def score(self, request: ScoreRequest) -> Agreement: ...
