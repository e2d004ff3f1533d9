"""One trainer: a plain class that owns a surrogate of its own and runs one request at a time.

Guarantees: the first answer is a `TrainerReady`, given when the surrogate is loaded; every request starts
from the same untouched base weights; a failure is a TrainingError and leaves nothing in the out directory.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from soma_vllm.errors import TrainingError
from soma_vllm.method.recipe import Surrogate, adapt, load_surrogate, score_plain
from soma_vllm.training.messages import (
    ScoreRequest,
    TrainerReady,
    TrainerSettings,
    TrainRequest,
    TrainResult,
)
from soma_vllm.types import Agreement


class AdapterTrainer:
    """Mines, trains and scores for one session after the other."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._surrogate: Surrogate | None = None

    def ready(self) -> TrainerReady:
        """Load the surrogate and yield the processor to the engines."""
        started = time.monotonic()
        if self._surrogate is None:
            os.nice(self._settings.nice)
            self._surrogate = load_surrogate(
                self._settings.surrogate_path,
                self._settings.dtype,
                self._settings.device,
                self._settings.threads,
            )
        return TrainerReady(os.getpid(), self._settings.device, time.monotonic() - started)

    def score(self, request: ScoreRequest) -> Agreement:
        """Teacher-forced agreement of the plain surrogate.

        Raises:
            TrainingError: there is nothing to score.
        """
        return score_plain(self._loaded(), request.held_out)

    def train(self, request: TrainRequest) -> TrainResult:
        """Mine, train, score and write one adapter.

        Raises:
            TrainingError: there was nothing to learn from, or the loss was not a number.
        """
        out_dir = Path(request.out_dir)
        try:
            made = adapt(
                self._loaded(),
                request.examples,
                request.held_out,
                request.mining,
                request.lora,
                request.seed,
                out_dir,
            )
        except TrainingError:
            shutil.rmtree(out_dir, ignore_errors=True)
            raise
        return TrainResult(
            directory=str(out_dir),
            plain=made.plain,
            adapted=made.adapted,
            checkpoints=tuple((point.steps, point.agreement) for point in made.checkpoints),
            hardness=made.hardness,
            steps=made.steps,
            distilled=made.distilled,
            losses=made.losses,
            flops=made.flops,
            mining_s=made.mining_s,
            finetune_s=made.finetune_s,
            scoring_s=made.scoring_s,
            signature=made.signature,
        )

    def _loaded(self) -> Surrogate:
        self.ready()
        assert self._surrogate is not None
        return self._surrogate
