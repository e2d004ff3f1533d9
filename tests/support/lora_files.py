"""Adapters' files for engines that are not real, and the ways to spoil them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from soma_vllm.types import CONFIG, MANIFEST, WEIGHTS, AdapterRef, Signature

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
    save_file(weights, path / WEIGHTS)
    document = {"r": RANK, "lora_alpha": 8, "base_model_name_or_path": "models/small", **config}
    (path / CONFIG).write_text(json.dumps(document))
    return publish(AdapterRef(name, number, str(path)))


def publish(ref: AdapterRef, **training: Any) -> AdapterRef:
    """Write the manifest that a store would for the files that are there."""
    path = Path(ref.path)
    contents = {kind: path / file for kind, file in (("weights", WEIGHTS), ("config", CONFIG))}
    files = {
        kind: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
        for kind, file in contents.items()
    }
    document = {
        "format": 2,
        "name": ref.name,
        "number": ref.number,
        "version": 1,
        "tenant": "public",
        "session": "s",
        "created": "2026-01-01T00:00:00+00:00",
        "owner": "",
        "base_model": "small",
        "rank": RANK,
        **files,
        "training": training,
    }
    (path / MANIFEST).write_text(json.dumps(document))
    return ref


def sign(ref: AdapterRef, signature: Signature) -> None:
    """Put a signature into an adapter's manifest."""
    publish(ref, signature=asdict(signature))
