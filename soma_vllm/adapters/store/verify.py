"""Is this directory an adapter that an engine may load? Every problem is reported at once, as AdapterRejected.

An engine that finds out by itself may do so inside a model step, and take everybody's requests down with it. So
files are looked at twice: in full when they are published, and quickly before each load. Guarantees for what
passes, at either depth: weights come from safetensors alone, so that reading them runs no code; the files are
whole; every weight is a finite number; every matrix has the rank that adapter_config.json promises; rank, base
model, widths and layers are those demanded; and the files are those published, where it is said which those
were. In full also: the files are files, no links, with no pickle beside them; the A and B of every module are
there; nothing in the configuration asks for more than a plain LoRA.

Each file is read once and hashed once. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from safetensors import SafetensorError, deserialize

from soma_vllm.adapters.store.base_model import BaseShapes, shapes_of
from soma_vllm.documents import parse_json
from soma_vllm.errors import AdapterRejected, DocumentError
from soma_vllm.types import CONFIG, WEIGHTS

PICKLED = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
"""Endings of files that run code when they are read."""

PLAIN: Mapping[str, object] = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""What stands in place of a feature beyond a plain LoRA; null for all others."""

NOTED = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
        *("use_rslora", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
        "init_lora_weights",
    )
)
"""Keys that ask for no more than a plain LoRA, whatever they say; vLLM scales by `use_rslora`. Every other key,
those of a later peft too, asks for more unless it is null, false or empty."""

INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model's own weights alone, as PiSSA and OLoRA do not."""

EXPONENTS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
"""By safetensors' name of a type: its words, and the exponent bits that are all set in a NaN or an infinity."""


class Depth(Enum):
    """How closely files are looked at."""

    FULL = "full"
    """Before they are published, or when an operator asks."""
    QUICK = "quick"
    """Before each load: what an engine would stumble over."""


@dataclass(frozen=True)
class Demands:
    """What is asked of an adapter beyond being one. None asks nothing."""

    max_rank: int | None = None
    base_model: str | None = None
    """Compared with what the adapter says it was trained on, by the last path component."""
    shapes: BaseShapes | None = None

    @staticmethod
    def of_model(model: Path, max_rank: int | None = None) -> Demands:
        """That an adapter fits the model in this folder.

        Raises:
            AdapterError: its config.json cannot be read.
        """
        return Demands(max_rank, str(model), shapes_of(model))

    def unmet(self, rank: int, base_model: str) -> Iterator[str]:
        """What is wrong with an adapter of this rank for this base model."""
        if self.max_rank is not None and rank > self.max_rank:
            yield f"r: found {rank}; expected at most {self.max_rank}"
        if self.base_model is not None and Path(base_model).name != Path(self.base_model).name:
            yield f"base_model_name_or_path: found {base_model!r}; expected {self.base_model!r}"


NOTHING = Demands()


@dataclass(frozen=True)
class FileFacts:
    """One file as it was verified or published."""

    sha256: str
    """Hexadecimal."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class AdapterFacts:
    """What verification learned."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Kinds of module adapted, sorted: "down_proj", "q_proj", ..."""
    base_model: str
    """What the adapter was trained on, as its configuration names it."""
    weights: FileFacts
    config: FileFacts


class Verified(NamedTuple):
    """An adapter that passed, and the bytes that did."""

    facts: AdapterFacts
    contents: Mapping[str, bytes]
    """By file name."""


def verify(
    directory: Path,
    demands: Demands = NOTHING,
    expected: Mapping[str, FileFacts] | None = None,
    depth: Depth = Depth.FULL,
    name: str | None = None,
) -> Verified:
    """Check an adapter's two files, read once; extra files are ignored unless they are pickles.

    `expected` says by file name which files were published; `name` is the adapter's in errors.

    Raises:
        AdapterRejected: with every problem found.
        OSError: a file that is there cannot be read.
    """
    full = depth is Depth.FULL
    problems = list(_directory_problems(directory)) if full else []
    contents: dict[str, bytes] = {}
    facts: dict[str, FileFacts] = {}
    config: Mapping[str, Any] = {}
    modules: tuple[str, ...] = ()
    for file in (CONFIG, WEIGHTS):
        try:
            content = (directory / file).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            problems.append(f"{file} is missing")
            continue
        contents[file] = content
        facts[file] = FileFacts(hashlib.sha256(content).hexdigest(), len(content))
        if expected is not None:
            problems.extend(_changed(file, facts[file], expected[file]))
        if file == CONFIG:
            config = _read_config(content, problems)
            problems.extend(_config_problems(config, demands, full))
        else:
            modules = _check_weights(content, config, demands.shapes, full, problems)
    if problems:
        raise AdapterRejected(name or directory.name, problems)
    alpha, base_model = float(config["lora_alpha"]), str(config.get("base_model_name_or_path") or "")
    found = AdapterFacts(config["r"], alpha, modules, base_model, facts[WEIGHTS], facts[CONFIG])
    return Verified(found, contents)


def _directory_problems(directory: Path) -> Iterator[str]:
    for path in sorted(directory.glob("*")):
        if path.suffix.lower() in PICKLED:
            yield f"found {path.name}; expected weights as safetensors only"
        if path.name in (CONFIG, WEIGHTS) and path.is_symlink():
            yield f"{path.name} is a link; expected a file of the adapter's own"


def _changed(file: str, found: FileFacts, expected: FileFacts) -> Iterator[str]:
    if found.size != expected.size:
        yield f"{file}: found {found.size} bytes; expected {expected.size}"
    elif found.sha256 != expected.sha256:
        yield f"{file}: expected SHA-256 {expected.sha256}, found {found.sha256}"


def _read_config(content: bytes, problems: list[str]) -> Mapping[str, Any]:
    """The configuration; empty, with a problem told, where it is none."""
    try:
        config = parse_json(content)
    except DocumentError as error:
        problems.append(f"{CONFIG} {error}")
        return {}
    if not isinstance(config, dict):
        problems.append(f"{CONFIG}: found a {type(config).__name__}; expected an object")
        return {}
    return config


def _config_problems(config: Mapping[str, Any], demands: Demands, full: bool) -> Iterator[str]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if full and config.get("peft_type") != "LORA":
        yield f"peft_type: found {config.get('peft_type')!r}; expected 'LORA'"
    if not _is_count(rank):
        yield f"r: found {rank!r}; expected a positive integer"
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        yield f"lora_alpha: found {alpha!r}; expected a positive number"
    targets = config.get("target_modules")
    if full and not _is_name_list(targets):
        yield f"target_modules: found {targets!r}; expected a list of module names"
    if full:
        for key in sorted(config.keys() - NOTED):
            if (found := config[key]) and found != PLAIN.get(key):
                yield f"{key}: found {repr(found)[:100]}; expected {PLAIN.get(key)!r}"
        if (start := config.get("init_lora_weights")) not in INITIAL:
            yield f"init_lora_weights: found {start!r}; expected one of {INITIAL}"
    yield from demands.unmet(rank if _is_count(rank) else 0, str(config.get("base_model_name_or_path")))


def _check_weights(
    content: bytes, config: Mapping[str, Any], shapes: BaseShapes | None, full: bool, problems: list[str]
) -> tuple[str, ...]:
    """Check every tensor against the configuration; the kinds of module that are adapted."""
    try:
        tensors = sorted(deserialize(content), key=lambda one: one[0])  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        problems.append(f"{WEIGHTS} is not a whole safetensors file: {error}")
        return ()
    sides: dict[str, set[str]] = {}
    for name, tensor in tensors:
        module, side = _parse(name)
        if side is None:
            problems.append(f"{name}: expected only tensors named ….lora_A.weight and ….lora_B.weight")
            continue
        sides.setdefault(module, set()).add(side)
        problems.extend(_tensor_problems(name, side, tensor, config.get("r")))
        if shapes is not None and len(tensor["shape"]) == 2:
            problems.extend(shapes.problems(module, side, tuple(tensor["shape"])))
    if not tensors:
        problems.append(f"{WEIGHTS} holds no tensors")
    kinds = tuple(sorted({module.rpartition(".")[2] for module in sides}))
    if full and tensors:
        problems.extend(_incomplete(sides, kinds, config.get("target_modules")))
    return kinds


def _incomplete(sides: Mapping[str, set[str]], kinds: tuple[str, ...], targets: object) -> Iterator[str]:
    for module, found in sides.items():
        if len(found) < 2:
            yield f"{module}: {'lora_B' if 'lora_A' in found else 'lora_A'} is missing"
    if _is_name_list(targets) and set(kinds) != {name.rpartition(".")[2] for name in targets}:
        yield f"adapted modules: found {list(kinds)}; expected {sorted(targets)}"


def _parse(name: str) -> tuple[str, str | None]:
    """("model.layers.0.self_attn.q_proj", "lora_A") of a tensor's name; None for a name of another form."""
    prefix, _, rest = name.partition("base_model.model.")
    module, _, tail = rest.rpartition(".lora_")
    if prefix or not module or tail not in ("A.weight", "B.weight"):
        return name, None
    return module, f"lora_{tail[0]}"


def _tensor_problems(name: str, side: str, tensor: Mapping[str, Any], rank: object) -> Iterator[str]:
    shape = tuple(tensor["shape"])
    if len(shape) != 2 or 0 in shape or tensor["dtype"] not in EXPONENTS:
        yield f"{name}: found {tensor['dtype']} of shape {shape}; expected a matrix of floats"
        return
    found = shape[0 if side == "lora_A" else 1]
    if _is_count(rank) and found != rank:
        yield f"{name}: found rank {found} in shape {shape}; expected {rank}"
    word, exponent = EXPONENTS[tensor["dtype"]]
    values = np.frombuffer(tensor["data"], dtype=np.dtype(word))
    if bool(((values & exponent) == exponent).any()):
        yield f"{name}: holds values that are not finite"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_name_list(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
