"""The pruned Ray starts, and the project's trainer pool trains one adapter on it, on the CPU.

Needs `steps/` on PYTHONPATH. The argument is a folder made by `steps/models.py`:

    python benchmarks/gpu/rehearsal/trimmed_ray.py MODEL_FOLDER
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import ray
from training import session
from transformers import AutoTokenizer

from soma_vllm.config import Lora, Mining, Training
from soma_vllm.training.messages import TrainRequest
from soma_vllm.training.pool import TrainerPool


async def main(model: str) -> None:
    pool = TrainerPool(Training(dtype="float32"), model, 120.0)
    ready = await pool.start()
    try:
        examples = session(AutoTokenizer.from_pretrained(model), 4, 16, 1)
        with tempfile.TemporaryDirectory() as folder:
            asked = TrainRequest(
                examples[:3], examples[3:], Mining(enabled=False), Lora(steps=2), 0, str(Path(folder) / "a")
            )
            result = await pool.train(asked)
        print(f"ray {ray.__version__}: trainer ready in {ready[0].seconds:.1f} s, {result.steps} steps trained")
    finally:
        await pool.stop()


asyncio.run(main(sys.argv[1]))
