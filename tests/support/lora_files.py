"""Adapters' files for engines that are not real, and the ways to spoil them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from soma_vllm.types import AdapterRef, Signature

RANK, WIDTH = 4, 16


def files_of(folder: Path, name: str = "a", number: int = 1, **config: Any) -> AdapterRef:
    """A published adapter, as the store leaves it."""
    path = folder / name
    path.mkdir(parents=True)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{module}.lora_A.weight": np.full((RANK, WIDTH), number, dtype=np.float32),
        f"{module}.lora_B.weight": np.full((WIDTH, RANK), number, dtype=np.float32),
    }
    save_file(weights, path / "adapter_model.safetensors")
    document = {"r": RANK, "lora_alpha": 8, "base_model_name_or_path": "models/small", **config}
    (path / "adapter_config.json").write_text(json.dumps(document))
    digest = hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
    (path / "soma.json").write_text(json.dumps({"weights": {"sha256": digest}}))
    return AdapterRef(name, number, str(path))


def sign(ref: AdapterRef, signature: Signature) -> None:
    """Put a signature into an adapter's manifest."""
    path = Path(ref.path, "soma.json")
    document = json.loads(path.read_text())
    fields = {
        "tokens": list(signature.tokens),
        "plain": list(signature.plain),
        "adapted": list(signature.adapted),
    }
    path.write_text(json.dumps({**document, "training": {"signature": fields}}))
