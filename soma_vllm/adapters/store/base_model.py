"""What shapes an adapter must have to fit a base model, read from the model's config.json alone.

Guarantees: what is told of a model is what its config.json says; a kind of module whose widths do not follow
from it (of an architecture with names of its own) is not judged, and neither is anything of a folder without
that file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soma_vllm.errors import AdapterError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class BaseShapes:
    """Widths and depth of a decoder."""

    layers: int | None
    """None where config.json does not say."""
    widths: Mapping[str, tuple[int, int]]
    """Kind of module -> (in, out)."""

    def problems(self, module: str, side: str, shape: tuple[int, ...]) -> Iterator[str]:
        """What is wrong with one matrix: A is (rank, in), B is (out, rank)."""
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
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
    text = config.get("text_config")
    return _shapes({**config, **text} if isinstance(text, dict) else config)


def _shapes(config: Mapping[str, Any]) -> BaseShapes:
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
    return BaseShapes(_count(config, "num_hidden_layers"), widths)


def _count(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
