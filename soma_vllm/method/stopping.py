"""When a training stops, and which of its steps is kept: by its own loss, and by turns it does not learn from.

Guarantees: judging reads the model and changes nothing; the weights put back are, bit by bit, those that were
judged best.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from soma_vllm.method.activation_cache import Trunk
from soma_vllm.method.rendering import Rendered
from soma_vllm.method.scoring import pooled, score_trunk
from soma_vllm.types import Agreement


@dataclass(frozen=True)
class Checkpoint:
    """The adapter after some steps, judged on turns it does not learn from."""

    steps: int
    agreement: Agreement


class Judge:
    """Agreement of the adapter as it is now on the held-out turns."""

    def __init__(self, trunk: Trunk, held_out: Sequence[Rendered]) -> None:
        self._trunk = trunk
        self._held_out = held_out

    def agreement(self) -> Agreement:
        """Read the held-out turns under the weights as they are.

        Raises:
            TrainingError: the score is not finite.
        """
        return pooled(score_trunk(self._trunk, self._held_out))


class Best:
    """Keeps the weights that are best on held-out turns, those before the first step among them, and the score
    of each checkpoint."""

    def __init__(self, parameters: Sequence[nn.Parameter], judge: Judge | None) -> None:
        self._parameters = parameters
        self._judge = judge
        self._kept: list[torch.Tensor] = []
        self._best: Checkpoint | None = None
        self.seen: list[Checkpoint] = []
        self._steps = 0
        self.improves(0)

    def improves(self, steps: int) -> bool:
        """Judge the weights as they are; False once they are no better than the best before."""
        self._steps = steps
        if self._judge is None or (self.seen and self.seen[-1].steps == steps):
            return True
        found = Checkpoint(steps, self._judge.agreement())
        self.seen.append(found)
        if self._best is not None and found.agreement.nll >= self._best.agreement.nll:
            return False
        self._best = found
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        return True

    def restore(self, last: bool) -> int:
        """Put the best weights back, or leave the last ones; the number of steps behind them."""
        if last or self._best is None:
            return self._steps
        with torch.no_grad():
            for parameter, kept in zip(self._parameters, self._kept, strict=True):
                parameter.copy_(kept)
        return self._best.steps


class Patience:
    """Stops on a moving mean of the training loss: batches differ in their turns, a pass over all does not."""

    def __init__(self, patience: int, min_delta: float, window: int) -> None:
        self._patience = patience
        self._min_delta = min_delta
        self._recent: deque[float] = deque(maxlen=window)
        self._best = math.inf
        self._steps_without = 0

    @property
    def exhausted(self) -> bool:
        """Whether the loss has not improved for long enough."""
        return self._steps_without >= self._patience

    def observe(self, loss: float) -> None:
        """Take one step's loss."""
        self._recent.append(loss)
        if len(self._recent) < (self._recent.maxlen or 1):
            return
        mean = sum(self._recent) / len(self._recent)
        if mean < self._best - self._min_delta:
            self._best = mean
            self._steps_without = 0
        else:
            self._steps_without += 1
