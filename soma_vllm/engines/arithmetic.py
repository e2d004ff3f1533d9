"""Which type engines and trainers compute in where the configuration says `dtype: auto`, and why.

Guarantees: a type that the configuration names is kept; the choice depends on the configuration, the processor,
the memory that is free and the kernels that were built, and comes with a line for people; nothing is loaded.

| processor | engines | trainers |
|---|---|---|
| bf16 products in hardware | what the model is stored in | bfloat16 |
| AVX-512 without them | what the model is stored in: oneDNN has a product | float32, where memory suffices |
| AVX2 | bfloat16 weights and float32 products (`vllm/kernels/linear.py`) | float32, where memory suffices |
| AVX2, kernel not built | float32, where memory suffices | the same |
| a GPU | what the model is stored in | bfloat16 |

On AVX2, stock bf16 products run at a tenth to a fifth of float32's speed (`benchmarks/cpu_products.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from soma_vllm.config import Config, Engine
from soma_vllm.engines.memory import GB, available_memory, memory_needs
from soma_vllm.machine import LINEAR_ENV, InstructionSet, describe, instruction_set, training_dtype

LINEAR_KERNEL = "soma_vllm.engines.vllm.kernels._linear_cpu"


def settle(config: Config, original: Path | None, surrogate: Path) -> tuple[Config, list[str]]:
    """`config` with every `dtype: auto` decided for this machine, and a line about each decision.

    `original` and `surrogate` are the models' folders; `original` is None for an external endpoint. An engine
    keeps `auto` where vLLM's own choice, the type that the model is stored in, is the best.
    """
    lines = [describe()]
    roles = {"surrogate": surrogate} | ({"original": original} if original is not None else {})

    def fits(changed: Config) -> bool:
        engines = {role: (getattr(changed, role), path) for role, path in roles.items()}
        return sum(amount for _, amount in memory_needs(changed, engines)) <= available_memory() / GB

    # The surrogate first: it is the smaller one, and answers most turns.
    for role in roles:
        config, why = _engine(config, role, fits)
        lines.append(f"{role}: {why}")
    config, why = _training(config, fits)
    return config, [*lines, f"trainers: {why}"]


def _engine(config: Config, role: str, fits: Callable[[Config], bool]) -> tuple[Config, str]:
    engine: Engine = getattr(config, role)
    if engine.dtype != "auto":
        return config, f"{engine.dtype}, as configured"
    if engine.device == "cuda":
        return config, "the model's own type, on a GPU"
    if instruction_set() is not InstructionSet.AVX2:
        return config, f"the model's own type ({instruction_set()})"
    if os.environ.get(LINEAR_ENV) == "stock":
        return config, f"vLLM's own products, by {LINEAR_ENV}"
    if _is_built(LINEAR_KERNEL):
        return _with(config, role, "bfloat16"), "bfloat16 weights, float32 products: no bf16 in this processor"
    wide = _with(config, role, "float32")
    if fits(wide):
        return wide, "float32: no bf16 in this processor, and no kernel for it was built (is there a g++?)"
    return (
        _with(config, role, "bfloat16"),
        "bfloat16, slow: no bf16 in this processor, no kernel for it was built, and float32 would not fit in "
        "memory",
    )


def _is_built(module: str) -> bool:
    """Whether a compiled kernel is there and loads; it imports nothing else."""
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def _training(config: Config, fits: Callable[[Config], bool]) -> tuple[Config, str]:
    training = config.training
    if training.dtype != "auto":
        return config, f"{training.dtype}, as configured"
    if training_dtype(training.dtype, training.device) == "bfloat16":
        return _with(config, "training", "bfloat16"), "bfloat16"
    wide = _with(config, "training", "float32")
    if fits(wide):
        return wide, "float32: no bf16 in this processor"
    return _with(config, "training", "bfloat16"), "bfloat16, slow: float32 would not fit in memory"


def _with(config: Config, section: str, dtype: str) -> Config:
    changed = getattr(config, section).model_copy(update={"dtype": dtype})
    return config.model_copy(update={section: changed})
