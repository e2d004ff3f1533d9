"""What is asked of the engines: how much, which prompts, which adapters. Seeded and random."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
REQUESTS = 16
PROMPT = 16
OVERFLOW_SLOTS = 4
ADAPTERS = 64


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    tokens: int
    """Generated per request in a throughput round."""
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    """Distinct adapters among the requests of a throughput round."""
    loads: int
    """Adapters loaded while another request generates."""


QUICK = Effort(rounds=3, tokens=24, slots=(16,), counts=(1, 4, 16), loads=5)
FULL = Effort(rounds=5, tokens=48, slots=(4, 8, 16), counts=(1, 4, 16, 64), loads=10)


def prompts(seed: int, count: int, tokens: int) -> list[list[int]]:
    """Random token ids: what is said does not matter, that no two prompts share a prefix does."""
    draw = random.Random(seed)
    return [[draw.randrange(1000, 100_000) for _ in range(tokens)] for _ in range(count)]


def write_adapters(folder: Path, model: str, count: int) -> list[Path]:
    """Random adapters on every projection, in PEFT's format."""
    config = json.loads((Path(model) / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    widths = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
        "base_model_name_or_path": model,
    }
    made = []
    for number in range(count):
        random_numbers = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for name, (into, out) in widths.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                a = torch.randn(RANK, into, generator=random_numbers) / into**0.5
                b = torch.randn(out, RANK, generator=random_numbers) / 100
                tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
                tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
        path = folder / f"adapter-{number}"
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(described))
        made.append(path)
    return made


def drop_from_page_cache(path: Path) -> None:
    """Make the next reader of an adapter go to the disk."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
