"""The gate's sentence encoder: fixed weights, mean pooling, unit vectors.

Guarantees: the same text gives the same vector under every adapter and every session (up to rounding across
batches); empty text gives the zero vector; a generating model is refused, so that the yardstick never moves
with what it measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer

from soma_vllm.errors import ModelError
from soma_vllm.method.gap.readings import Reading

_BATCH = 32
"""Texts per forward pass."""


class SentenceEncoder:
    """phi: texts to unit vectors, by mean pooling over the attention mask."""

    def __init__(self, path: str | Path, max_tokens: int, threads: int) -> None:
        """Load an encoder from a local folder; a text beyond `max_tokens` keeps its beginning.

        `threads` sets torch's threads for the whole process.

        Raises:
            ModelError: the folder holds no encoder.
        """
        torch.set_num_threads(threads)
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            _refuse_generators(path, config)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(
                path, config=config, dtype=torch.float32, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: found no sentence encoder that can be loaded: {error}") from error
        self._model.eval().requires_grad_(False)
        self._max_tokens = min(max_tokens, getattr(config, "max_position_embeddings", max_tokens))
        self.dimension: int = config.hidden_size

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors (n, d), float32, in the order of `texts`; a row of zeros for text without words."""
        return np.stack([one.vector for one in self.read(texts)]) if texts else self._zeros(0)

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """The vector of each text and those of its tokens, which the same pass computes."""
        found = [Reading(self._zeros(1)[0]) for _ in texts]
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # no half surrogate pairs
        # Texts of like length together: little padding.
        worded = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(texts[i]))
        for start in range(0, len(worded), _BATCH):
            rows = worded[start : start + _BATCH]
            for row, reading in zip(rows, self._read_batch([texts[row] for row in rows]), strict=True):
                found[row] = reading
        return found

    def _zeros(self, rows: int) -> npt.NDArray[np.float32]:
        return np.zeros((rows, self.dimension), dtype=np.float32)

    @torch.inference_mode()
    def _read_batch(self, texts: list[str]) -> list[Reading]:
        batch = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        offsets = batch.pop("offset_mapping").tolist()
        states = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        vectors = functional.normalize(mean, dim=1).numpy()
        tokens = functional.normalize(states, dim=2).numpy()
        readings = []
        for vector, spans, rows in zip(vectors, offsets, tokens, strict=True):
            kept = [n for n, (first, end) in enumerate(spans) if end > first]  # without special tokens
            readings.append(Reading(vector, tuple((spans[n][0], spans[n][1]) for n in kept), rows[kept]))
        return readings


def _refuse_generators(path: str | Path, config: Any) -> None:
    generators = [name for name in config.architectures or () if name.endswith("ForCausalLM")]
    if generators:
        raise ModelError(f"{path}: found {generators[0]}, a generating model; expected a sentence encoder")
