"""The trainers of a server: Ray actors, a queue in front of them, and one awaitable verb each.

Guarantees: at most one request runs on a trainer at a time; a request that fails, hangs past its time limit or
loses its actor raises TrainingError and costs no other request anything; `stop` ends what `start` began.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from soma_vllm.config import Training
from soma_vllm.errors import PreflightError, TrainingError
from soma_vllm.machine import training_dtype
from soma_vllm.training.messages import (
    ScoreRequest,
    TrainerReady,
    TrainerSettings,
    TrainRequest,
    TrainResult,
)
from soma_vllm.training.trainer import AdapterTrainer
from soma_vllm.types import Agreement

OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Messages are small and tensors travel as files; Ray's default would reserve a third of the memory."""


LOST_IN_A_ROW = 3
"""Trainers lost in a row from which the pool counts as failing."""


class TrainerPool:
    """Trains adapters on Ray actors, first come first served."""

    def __init__(self, training: Training, surrogate_path: str, time_limit_s: float) -> None:
        self._training = training
        self._time_limit_s = time_limit_s
        dtype = training_dtype(training.dtype, training.device)
        self._settings = TrainerSettings(
            surrogate_path, training.device, dtype, training.threads, training.nice
        )
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self._started_ray = False
        self.lost = 0
        """Trainers lost in a row; 0 after a request that was answered."""

    async def start(self) -> list[TrainerReady]:
        """Start Ray and the trainers; returns once every one has its surrogate loaded.

        Raises:
            PreflightError: Ray does not start, or a trainer does not.
        """
        try:
            await asyncio.to_thread(self._start_ray)
            trainers = [self._new_trainer() for _ in range(self._training.workers)]
            ready = [await trainer.ready.remote() for trainer in trainers]
        except (RayError, ConnectionError, TimeoutError, RuntimeError) as error:
            raise PreflightError(f"the trainers did not start: {_first_line(error)}") from error
        for trainer in trainers:
            self._idle.put_nowait(trainer)
        return ready

    async def stop(self) -> None:
        """End the trainers, and Ray with them where this pool started it."""
        if self._started_ray:
            await asyncio.to_thread(ray.shutdown)

    async def score(self, request: ScoreRequest) -> Agreement:
        """Agreement of the plain surrogate on held-out turns.

        Raises:
            TrainingError: it could not be scored.
        """
        agreement: Agreement = await self._run("score", request)
        return agreement

    async def train(self, request: TrainRequest) -> TrainResult:
        """One trained adapter.

        Raises:
            TrainingError: the training failed, took too long or lost its trainer.
        """
        result: TrainResult = await self._run("train", request)
        return result

    @property
    def failing(self) -> bool:
        """Whether trainers are lost as soon as they are used: Ray is down, or too little memory is left."""
        return self.lost >= LOST_IN_A_ROW

    async def _run(self, verb: str, request: ScoreRequest | TrainRequest) -> Any:
        trainer = await self._idle.get()
        try:
            answer = await asyncio.wait_for(getattr(trainer, verb).remote(request), self._time_limit_s)
            self.lost = 0
            return answer
        except RayTaskError as error:
            self.lost = 0
            if isinstance(error.cause, TrainingError):
                raise TrainingError(str(error.cause)) from None
            raise TrainingError(f"the trainer failed: {type(error.cause).__name__}") from error
        except (TimeoutError, asyncio.CancelledError, RayError) as error:
            # A hung, abandoned or dead actor is replaced: what it was doing must not hold up the next session.
            ray.kill(trainer)
            trainer = self._new_trainer()
            if isinstance(error, asyncio.CancelledError):
                raise
            self.lost += 1
            raise TrainingError(f"the trainer was lost: {type(error).__name__}") from error
        finally:
            self._idle.put_nowait(trainer)

    def _start_ray(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's own notice of a future default, for a case (zero GPUs asked for) that is not this one.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        lane = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
        if self._training.ray_address is not None:
            ray.init(address=self._training.ray_address, **lane)
        else:
            ray.init(
                num_cpus=self._training.workers,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **lane,
            )
        self._started_ray = True

    def _new_trainer(self) -> Any:
        on_gpu = self._training.device == "cuda"
        options = {"num_gpus": self._training.gpus_per_worker} if on_gpu else {"num_cpus": 0}
        return ray.remote(AdapterTrainer).options(**options).remote(self._settings)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
