"""What shapes an adapter must have to fit a base model, and on which modules it may lie.

Guarantees: widths and depth are what the model's config.json says, and modules those that its safetensors files
name; a kind of module whose widths do not follow from config.json (of an architecture with names of its own) is
judged by its name alone, and nothing is of a folder without that file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soma_vllm.documents import parse_json, read_json
from soma_vllm.errors import AdapterError

MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, as the format has it."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class BaseShapes:
    """Widths and depth of a decoder."""

    layers: int | None
    """None where config.json does not say."""
    widths: Mapping[str, tuple[int, int]]
    """Kind of module -> (in, out)."""
    modules: frozenset[str] | None = None
    """Every module with weights; None where they are not told."""

    def problems(self, module: str, side: str, shape: tuple[int, ...]) -> Iterator[str]:
        """What is wrong with one matrix: A is (rank, in), B is (out, rank)."""
        if self.modules is not None and module not in self.modules:
            yield f"{module}: expected a module of the base model, which has none of that name"
            return
        found = _LAYER.search(module)
        if found and self.layers is not None and int(found[1]) >= self.layers:
            yield f"{module}: found layer {found[1]}; expected one of 0 to {self.layers - 1}"
        widths = self.widths.get(module.rpartition(".")[2])
        if widths is None:
            return
        at, which = (1, "in") if side == "lora_A" else (0, "out")
        expected = widths[1 - at]
        if shape[at] != expected:
            yield f"{module}.{side}: found {which} width {shape[at]} in shape {shape}; expected {expected}"


def shapes_of(model: Path) -> BaseShapes | None:
    """The shapes of a model's folder; None where it has no config.json.

    Raises:
        AdapterError: config.json is not JSON.
    """
    file = model / "config.json"
    if not file.exists():
        return None
    try:
        config = dict(read_json(file))
        text = config.get("text_config")
        modules = None if isinstance(text, dict) else _modules_of(model)
    except (OSError, TypeError, ValueError) as error:
        raise AdapterError(f"{file}: {error}") from error
    return _shapes({**config, **text} if isinstance(text, dict) else config, modules)


def _modules_of(model: Path) -> frozenset[str] | None:
    """The modules that have weights in a model's folder; None where it has no safetensors.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    names: set[str] = set()
    for file in model.glob("*.safetensors"):
        names |= tensors_of(file).keys()
    if not names:
        return None
    modules = {name.rpartition(".")[0] for name in names}
    # Some models are stored without the prefix that they have in memory.
    prefixed = any(name.startswith("model.") for name in modules)
    # A head that shares the embedding's weights has none of its own.
    return frozenset({"lm_head", *(modules if prefixed else (f"model.{name}" for name in modules))})


def tensors_of(file: Path) -> dict[str, Any]:
    """What a safetensors file says of each of its tensors; `data_offsets` count from the file's beginning.

    Raises:
        OSError: it cannot be read.
        ValueError: it does not begin as such a file.
    """
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        found = parse_json(content.read(min(length, MAX_HEADER_BYTES)))
    try:
        found.pop("__metadata__", None)
        return {
            name: {**facts, "data_offsets": [8 + length + offset for offset in facts["data_offsets"]]}
            for name, facts in found.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"found no facts of tensors ({type(error).__name__})") from error


def _shapes(config: Mapping[str, Any], modules: frozenset[str] | None) -> BaseShapes:
    hidden, inner = _count(config, "hidden_size"), _count(config, "intermediate_size")
    heads = _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads") or heads
    head = _count(config, "head_dim") or (hidden // heads if hidden and heads else None)
    widths: dict[str, tuple[int, int]] = {}
    if hidden and heads and kv_heads and head:
        widths |= {kind: (hidden, kv_heads * head) for kind in ("k_proj", "v_proj")}
        widths |= {"q_proj": (hidden, heads * head), "o_proj": (heads * head, hidden)}
    if hidden and inner:
        widths |= {kind: (hidden, inner) for kind in ("gate_proj", "up_proj")}
        widths |= {"down_proj": (inner, hidden)}
    return BaseShapes(_count(config, "num_hidden_layers"), widths, modules)


def _count(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
