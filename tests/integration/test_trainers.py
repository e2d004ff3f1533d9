"""Trainers on real Ray: what they make, and what happens when one fails or dies."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from safetensors import safe_open
from support.guard import GUARD_S

from soma_vllm.config import Lora, Mining, Training
from soma_vllm.errors import TrainingError
from soma_vllm.training.messages import ScoreRequest, TrainRequest
from soma_vllm.training.pool import TrainerPool
from soma_vllm.types import Example

EXAMPLES = tuple(
    Example(turn, ({"role": "user", "content": f"question {turn}"},), f"the answer {turn}")
    for turn in (1, 2, 3)
)
MINING = Mining(enabled=True, soft_len=4, n_candidates=2, iters=2, neighborhood_k=8, teacher_topm=16)
LORA = Lora(rank=4, alpha=8, dropout=0.0, steps=3, lr=5e-3)


@pytest.fixture(scope="module")
async def pool(tiny_models: Path) -> AsyncIterator[TrainerPool]:
    pool = TrainerPool(Training(dtype="float32"), str(tiny_models / "tiny-surrogate"), GUARD_S)
    await pool.start()
    yield pool
    await pool.stop()


def request(folder: Path, *examples: Example) -> TrainRequest:
    return TrainRequest(examples or EXAMPLES[:2], EXAMPLES[2:], MINING, LORA, 0, str(folder))


async def test_an_actor_mines_trains_and_writes_an_adapter(pool: TrainerPool, tmp_path: Path) -> None:
    result = await pool.train(request(tmp_path / "a"))
    assert result.hardness.keys() == {1, 2}
    assert result.steps == len(result.losses) == 3
    # Judged before and after; a text-only original leaves nothing to distil from.
    assert result.checkpoints == ((0, result.plain), (3, result.adapted))
    assert (result.distilled, result.flops > 0) == (False, True)
    with safe_open(Path(result.directory) / "adapter_model.safetensors", "pt") as file:
        assert any("lora_A" in name for name in file.keys())  # noqa: SIM118


async def test_a_session_trained_second_gets_the_same_adapter_as_one_trained_first(
    pool: TrainerPool, tmp_path: Path
) -> None:
    results = [await pool.train(request(tmp_path / name)) for name in ("first", "second")]
    weights = [(Path(r.directory) / "adapter_model.safetensors").read_bytes() for r in results]
    assert weights[0] == weights[1]
    score = await pool.score(ScoreRequest(EXAMPLES[2:]))
    assert score == results[0].plain == results[1].plain


async def test_a_training_without_answers_fails_alone_and_leaves_nothing(
    pool: TrainerPool, tmp_path: Path
) -> None:
    empty = Example(1, ({"role": "user", "content": "q"},), "")
    with pytest.raises(TrainingError):
        await pool.train(request(tmp_path / "none", empty))
    assert not (tmp_path / "none").exists()
    assert (await pool.score(ScoreRequest(EXAMPLES[2:]))).tokens > 0


async def test_a_trainer_that_is_killed_is_replaced(
    tiny_models: Path, pool: TrainerPool, tmp_path: Path
) -> None:
    trainer = await pool._idle.get()
    pid = (await trainer.ready.remote()).pid
    pool._idle.put_nowait(trainer)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match="lost"):
        await pool.train(request(tmp_path / "lost"))
    assert (await pool.train(request(tmp_path / "again"))).steps == 3
