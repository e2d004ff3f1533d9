"""Are an adapter's files on the disk fit to be read by an engine now? A quick look, without torch.

An engine that finds out by itself may do so inside a model step, and take everybody's requests down with it.
So each load looks first: the configuration is JSON for the served model and of a rank that fits; the weights'
file is whole, by its own header, and holds numbers; and it is the one that was published, where a manifest says
which that was.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soma_vllm.errors import EngineUnavailable
from soma_vllm.types import AdapterRef, Signature

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "soma.json"

_EXPONENTS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
"""By safetensors' name of a type: its words, and the exponent bits that are all set in a NaN or an infinity."""
_HEADER_LIMIT = 64 * 1024**2


def check_adapter_files(
    ref: AdapterRef, *, max_rank: int | None = None, base_model: str | None = None
) -> Signature | None:
    """Look at an adapter's files; what the trainer said it does to a fixed text, where the manifest tells.

    Blocks on the disk. `base_model` is compared by its last path component.

    Raises:
        EngineUnavailable: they are not fit to be loaded; quotes what was found.
    """
    path = Path(ref.path)
    try:
        config = _object(path / CONFIG)
        _check_config(config, max_rank, base_model)
        _check_whole(path / WEIGHTS, config)
        manifest = _object(path / MANIFEST) if (path / MANIFEST).is_file() else {}
        content = (path / WEIGHTS).read_bytes()
        _check_digest(content, manifest)
        _check_finite(content)
        return signature_in(manifest)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise EngineUnavailable(f"adapter {ref.name} is not fit to be loaded: {_told(error)}") from error


def signature_in(manifest: Mapping[str, Any]) -> Signature | None:
    """The signature in a manifest, as `as_json` wrote it; None where there is none.

    Raises:
        ValueError, KeyError, TypeError: there is something else in its place.
    """
    found = manifest.get("training", {}).get("signature")
    if found is None:
        return None
    signature = Signature(
        tuple(int(token) for token in found["tokens"]),
        tuple(float(value) for value in found["plain"]),
        tuple(float(value) for value in found["adapted"]),
    )
    lengths = {len(signature.plain), len(signature.adapted), len(signature.tokens) - 1}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{MANIFEST}: found a signature of lengths {sorted(lengths)}; expected one length")
    return signature


def _check_config(config: Mapping[str, Any], max_rank: int | None, base_model: str | None) -> None:
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1 or (max_rank is not None and rank > max_rank):
        raise ValueError(f"{CONFIG}: found rank {rank!r}; expected at most {max_rank}")
    trained_on = Path(str(config.get("base_model_name_or_path"))).name
    if base_model is not None and trained_on != Path(base_model).name:
        raise ValueError(f"{CONFIG}: found base model {trained_on}; expected {Path(base_model).name}")


def _check_whole(weights: Path, config: Mapping[str, Any]) -> None:
    """The file is as long as its header says, and its matrices have the rank of the configuration."""
    size = weights.stat().st_size
    with weights.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{WEIGHTS}: found {size} bytes; expected a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"{WEIGHTS}: found {size} bytes; expected a header of {length} and more")
        header = json.loads(file.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size != end or not tensors:
        raise ValueError(f"{WEIGHTS}: found {size} bytes; expected {end}, with tensors in them")
    for name, entry in tensors.items():
        _check_rank(name, entry["shape"], config["r"])


def _check_rank(name: str, shape: Sequence[int], rank: int) -> None:
    found = shape[0] if ".lora_A." in name else shape[-1]
    if len(shape) != 2 or found != rank or math.prod(shape) == 0:
        raise ValueError(f"{WEIGHTS}: {name}: found shape {list(shape)}; expected rank {rank}")


def _check_digest(content: bytes, manifest: Mapping[str, Any]) -> None:
    expected = (manifest.get("weights") or {}).get("sha256")
    if expected is None:
        return
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{WEIGHTS}: found SHA-256 {found}; expected {expected}")


def _check_finite(content: bytes) -> None:
    """No weight is a NaN or an infinity, by its exponent bits: an engine's cache would keep them for others."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _EXPONENTS:
            raise ValueError(
                f"{WEIGHTS}: {name}: found {entry['dtype']}; expected one of {', '.join(_EXPONENTS)}"
            )
        word, exponent = _EXPONENTS[entry["dtype"]]
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        values: NDArray[Any] = np.frombuffer(content[start:end], dtype=np.dtype(word))
        if bool(((values & exponent) == exponent).any()):
            raise ValueError(f"{WEIGHTS}: {name}: found values that are not finite")


def _told(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"found no {error}; expected one"
    return str(error.strerror if isinstance(error, OSError) else error)


def _object(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{path.name}: found a {type(document).__name__}; expected an object")
    return document
