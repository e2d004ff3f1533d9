"""Small real adapters, written as peft writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.adapters.store.manifest import PublishedAdapter
from soma_vllm.types import SessionKey

RANK, WIDTH = 4, 16
BASE_MODEL = "models/tiny-surrogate"


def module(layer: int, kind: str) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.{kind}"


def tensors(fill: float = 0.5) -> dict[str, torch.Tensor]:
    found = {}
    for layer in range(2):
        for kind in ("q_proj", "v_proj"):
            found[f"{module(layer, kind)}.lora_A.weight"] = torch.full((RANK, WIDTH), fill)
            found[f"{module(layer, kind)}.lora_B.weight"] = torch.full((WIDTH, RANK), fill)
    return found


def write_adapter(directory: Path, weights: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """An adapter that passes verification, unless `weights` or a key of `config` spoils it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors() if weights is None else weights), directory / "adapter_model.safetensors")
    document = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["v_proj", "q_proj"],
        "bias": "none",
        "base_model_name_or_path": BASE_MODEL,
        "modules_to_save": None,
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(document), encoding="utf-8")
    return directory


KEY = SessionKey("public", "dialogue-7")
OTHER = SessionKey("public", "dialogue-8")


def publish(store: FilesystemAdapterStore, trained: Path, key: SessionKey = KEY) -> PublishedAdapter:
    return store.publish(key, trained, base_model="tiny-surrogate", manifest={"hardness": {1: 0.5}})
