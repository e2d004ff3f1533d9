"""A remedy for vLLM's LoRA expand, should it be wrong on a card: parameters in a file, no patch.

`lora_correct` compares vLLM's own parameters (`default`) with the same in one stage (`tuned`), which vLLM
reads from the folder that VLLM_TUNED_CONFIG_FOLDER names. Each variant leaves its count of wrong cases beside
the models; engines and soma-serve take the file where the default is wrong and the file right.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

FOLDER = "VLLM_TUNED_CONFIG_FOLDER"


def write_tuned(models: Path) -> dict[str, str]:
    """Write the file for this card, beside the models; the environment that makes vLLM read it.

    One entry for each number of slices: vLLM takes the nearest for any number of slots, rows, ranks and widths.
    """
    taken = {"block_m": 64, "block_k": 32, "num_warps": 4, "num_ctas": 1, "num_stages": 1, "max_nreg": None}
    slices = {
        str(number): {"1": {"8": {"1024": {**taken, "block_n": 64 if number > 1 else 128}}}}
        for number in (1, 2, 3)
    }
    card = torch.cuda.get_device_name().replace(" ", "_").replace("-", "_")
    _folder(models).mkdir(parents=True, exist_ok=True)
    (_folder(models) / f"{card}_EXPAND_TRUE.json").write_text(json.dumps({"1": slices}))
    return {FOLDER: str(_folder(models))}


def remedy(models: Path) -> dict[str, str]:
    """Environment for engines on this card; empty unless the default was found wrong and the file right."""
    wrong: dict[str, int] = {}
    for file in models.glob("lora-*.json"):
        wrong |= json.loads(file.read_text())
    if wrong.get("default") and wrong.get("tuned") == 0:
        return {FOLDER: str(_folder(models))}
    return {}


def remember(models: Path, variant: str, wrong: int) -> None:
    """Keep a variant's count of wrong cases; variants run side by side, so that each has a file of its own."""
    (models / f"lora-{variant}.json").write_text(json.dumps({variant: wrong}))


def _folder(models: Path) -> Path:
    return models / "tuned"
