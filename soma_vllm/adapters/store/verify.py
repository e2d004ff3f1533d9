"""Is this directory an adapter that an engine may load? Every problem is reported at once.

Guarantees for a directory that passes: weights come from safetensors alone, so that reading them runs no
code; the files are files, no links, and whole; every weight is finite; the A and B of every module are there,
of the rank that adapter_config.json promises and of widths and layers that the base model has; nothing in the
configuration asks for more than a plain LoRA.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from safetensors import SafetensorError, safe_open

from soma_vllm.adapters.store.base_model import BaseShapes, shapes_of
from soma_vllm.errors import AdapterRejected

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

PICKLED = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
"""Endings of files that run code when they are read."""

PLAIN: Mapping[str, object] = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
}
"""Features of peft's format beyond a plain LoRA, with the one value of each that is accepted."""


@dataclass(frozen=True)
class Demands:
    """What is asked of an adapter beyond being one. None asks nothing."""

    max_rank: int | None = None
    base_model: str | None = None
    """Compared with what the adapter says it was trained on, by path or by last path component."""
    shapes: BaseShapes | None = None

    @staticmethod
    def of_model(model: Path, max_rank: int | None = None) -> Demands:
        """That an adapter fits the model in this folder.

        Raises:
            AdapterError: its config.json cannot be read.
        """
        return Demands(max_rank, str(model), shapes_of(model))


NOTHING = Demands()


@dataclass(frozen=True)
class AdapterFacts:
    """What verification learned."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Kinds of module adapted, sorted: "down_proj", "q_proj", ..."""
    base_model: str
    """What the adapter was trained on, as its configuration names it."""
    digest: str
    """SHA-256 of the weights' file, hexadecimal."""
    size_bytes: int
    """Size of the weights' file."""
    config_digest: str
    """SHA-256 of adapter_config.json, hexadecimal."""
    config_bytes: int
    """Size of adapter_config.json."""


def verify_files(directory: Path, demands: Demands = NOTHING) -> AdapterFacts:
    """Check the files of a trained adapter; extra files are ignored unless they are pickles.

    Raises:
        AdapterRejected: with every problem found.
    """
    problems = list(_file_problems(directory))
    config = _read_config(directory / CONFIG, problems)
    if config is not None:
        problems.extend(_config_problems(config, demands.max_rank, demands.base_model))
    weights = directory / WEIGHTS
    modules: tuple[str, ...] = ()
    if weights.is_file():
        try:
            modules = _check_weights(weights, config, demands.shapes, problems)
        except SafetensorError as error:
            problems.append(f"{WEIGHTS} is not a whole safetensors file: {error}")
    else:
        problems.append(f"{WEIGHTS} is missing")
    if problems or config is None:
        raise AdapterRejected(directory.name, problems)
    return AdapterFacts(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        modules=modules,
        base_model=str(config.get("base_model_name_or_path") or ""),
        digest=digest_of(weights),
        size_bytes=weights.stat().st_size,
        config_digest=digest_of(directory / CONFIG),
        config_bytes=(directory / CONFIG).stat().st_size,
    )


def digest_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_problems(directory: Path) -> Iterator[str]:
    for path in sorted(directory.glob("*")):
        if path.suffix.lower() in PICKLED:
            yield f"found {path.name}; expected weights as safetensors only"
        if path.name in (CONFIG, WEIGHTS) and path.is_symlink():
            yield f"{path.name} is a link; expected a file of the adapter's own"


def _read_config(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        problems.append(f"{CONFIG} is missing")
        return None
    except ValueError as error:
        problems.append(f"{CONFIG} is not JSON: {error}")
        return None
    if not isinstance(config, dict):
        problems.append(f"{CONFIG}: found a {type(config).__name__}; expected an object")
        return None
    return config


def _config_problems(config: Mapping[str, Any], max_rank: int | None, base_model: str | None) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type: found {config.get('peft_type')!r}; expected 'LORA'"
    rank = config.get("r")
    if not _is_count(rank):
        yield f"r: found {rank!r}; expected a positive integer"
    elif max_rank is not None and rank > max_rank:
        yield f"r: found {rank}; expected at most {max_rank}"
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        yield f"lora_alpha: found {alpha!r}; expected a positive number"
    targets = config.get("target_modules")
    if not _is_name_list(targets):
        yield f"target_modules: found {targets!r}; expected a list of module names"
    for key, accepted in PLAIN.items():
        found = config.get(key)
        if found and found != accepted:
            yield f"{key}: found {found!r}; expected {accepted!r}"
    trained_on = config.get("base_model_name_or_path")
    if base_model is not None and Path(str(trained_on)).name != Path(base_model).name:
        yield f"base_model_name_or_path: found {trained_on!r}; expected {base_model!r}"


def _check_weights(
    path: Path, config: Mapping[str, Any] | None, shapes: BaseShapes | None, problems: list[str]
) -> tuple[str, ...]:
    """Check every tensor against the configuration; the kinds of module that are adapted."""
    rank = config.get("r") if config else None
    sides: dict[str, set[str]] = {}
    with safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
        for name in names:
            module, side = _parse(name)
            if side is None:
                problems.append(f"{name}: expected only tensors named ….lora_A.weight and ….lora_B.weight")
                continue
            sides.setdefault(module, set()).add(side)
            tensor = file.get_tensor(name)
            problems.extend(_tensor_problems(name, side, tensor, rank))
            if shapes is not None and tensor.dim() == 2:
                problems.extend(shapes.problems(module, side, tuple(tensor.shape)))
    if not names:
        problems.append(f"{WEIGHTS} holds no tensors")
    for module, found in sides.items():
        if len(found) < 2:
            missing = "lora_B" if "lora_A" in found else "lora_A"
            problems.append(f"{module}: {missing} is missing")
    kinds = tuple(sorted({module.rpartition(".")[2] for module in sides}))
    targets = config.get("target_modules") if config else None
    if names and _is_name_list(targets) and set(kinds) != {name.rpartition(".")[2] for name in targets}:
        problems.append(f"adapted modules: found {list(kinds)}; expected {sorted(targets)}")
    return kinds


def _parse(name: str) -> tuple[str, str | None]:
    """("model.layers.0.self_attn.q_proj", "lora_A") of a tensor's name; None for a name of another form."""
    prefix, _, rest = name.partition("base_model.model.")
    module, _, tail = rest.rpartition(".lora_")
    if prefix or not module or tail not in ("A.weight", "B.weight"):
        return name, None
    return module, f"lora_{tail[0]}"


def _tensor_problems(name: str, side: str, tensor: torch.Tensor, rank: object) -> Iterator[str]:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        yield f"{name}: found {tensor.dtype} of shape {tuple(tensor.shape)}; expected a matrix of floats"
        return
    found = tensor.shape[0 if side == "lora_A" else 1]
    if _is_count(rank) and found != rank:
        yield f"{name}: found rank {found} in shape {tuple(tensor.shape)}; expected {rank}"
    if not bool(tensor.isfinite().all()):
        yield f"{name}: holds values that are not finite"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_name_list(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
