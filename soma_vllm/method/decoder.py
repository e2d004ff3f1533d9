"""The surrogate's forward pass in pieces: embedding, any run of layers, final norm and output head.

Guarantees: the pieces put together are the model's own forward pass, bit by bit on equal batches; that is
checked when a `Decoder` is made, so a model whose forward pass is something else is refused at once and never
trained wrongly. The model is as before after each call.

Why: what lies below the adapted layers is the same in every training step and need be computed only once, and
only positions that predict an answer's token need meet the output head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from soma_vllm.errors import ModelError

_PROBE_TOKENS = 7
_ROUNDING = {torch.float32: 1.0e-3, torch.float64: 1.0e-3}
"""Largest difference that rounding explains, as a share of the largest logit; half precision allows more."""


class Decoder:
    """A causal language model of the form embedding -> layers -> norm -> head (Llama, Qwen2 and their like)."""

    def __init__(self, model: Any) -> None:
        """Find the parts of a loaded model; it is not changed.

        Raises:
            ModelError: its forward pass is not made of these pieces alone.
        """
        self.model = model
        name = type(model).__name__
        inner: Any = getattr(model, "model", None)
        missing = [part for part in ("embed_tokens", "layers", "norm") if not hasattr(inner, part)]
        if missing or model.get_output_embeddings() is None:
            raise ModelError(f"{name}: found no {', '.join(missing) or 'output head'}; {_EXPECTED}")
        kinds = sorted(set(getattr(model.config, "layer_types", None) or ()))
        if len(kinds) > 1:
            raise ModelError(f"{name}: found layers of kinds {kinds}; {_EXPECTED}")
        self._inner = inner
        self.depth: int = len(self._inner.layers)
        self._check_exact(name)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def embedding(self) -> torch.Tensor:
        """The embedding matrix (V, d), detached."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight.detach()
        return weight

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Word vectors (B, T, d) of `ids` (B, T)."""
        vectors: torch.Tensor = self.model.get_input_embeddings()(ids)
        return vectors

    def run(
        self, states: torch.Tensor, mask: torch.Tensor | None = None, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Hidden states (B, T, d) after layers `start` to `stop`, normed where `stop` is the depth.

        Args:
            states: (B, T, d) what enters layer `start`: word vectors for 0, else what `run(stop=start)` gave.
            mask: (B, T) 1 where there is a token, padding on the right; None without padding.
        """
        stop = self.depth if stop is None else stop
        if start == stop < self.depth:
            return states
        with self._only(start, stop):
            output = self._inner(inputs_embeds=states, attention_mask=mask, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of final hidden states (n, d)."""
        logits: torch.Tensor = self.model.get_output_embeddings()(states)
        return logits

    def layer_parameters(self) -> int:
        """Weights of one layer, adapters not counted."""
        named = self._inner.layers[0].named_parameters()
        return sum(weight.numel() for name, weight in named if "lora_" not in name)

    @contextmanager
    def _only(self, start: int, stop: int) -> Iterator[None]:
        """The inner model with layers `start` to `stop` alone, and no norm before its end."""
        layers, norm = self._inner.layers, self._inner.norm
        self._inner.layers = layers[start:stop]
        if stop < len(layers):
            self._inner.norm = nn.Identity()
        try:
            yield
        finally:
            self._inner.layers, self._inner.norm = layers, norm

    @torch.inference_mode()
    def _check_exact(self, name: str) -> None:
        ids = torch.arange(1, 1 + _PROBE_TOKENS, device=self.device).unsqueeze(0)
        middle = self.depth // 2
        lower = self.run(self.embed(ids), stop=middle) if middle else self.embed(ids)
        ours = self.logits(self.run(lower, start=middle)[0])
        theirs = self.model(input_ids=ids, use_cache=False).logits[0]
        tolerance = _ROUNDING.get(theirs.dtype, 0.05)
        worst = float((ours.float() - theirs.float()).abs().max())
        if not worst <= tolerance * float(theirs.abs().max()):  # so that NaN is refused too
            raise ModelError(f"{name}: found logits that differ by {worst:.3g} when run in pieces; {_EXPECTED}")


_EXPECTED = (
    "expected a model that is embedding, layers of one kind, norm and output head, such as Llama or Qwen2"
)
