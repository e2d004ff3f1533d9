"""The soft prompt P: a few free vectors in front of the surrogate's prompt, and their nearest words V(P).

Guarantees: every entry of the prompt the model sees lies in (-scale, scale); equal seeds give equal starts;
nearest-token searches hold at most a slice of the vocabulary in float32, never a V x V matrix.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_SLICE = 16_384
"""Vocabulary rows compared at once."""


class SoftPrompt(nn.Module):
    """P (L, d): an fp32 parameter, seen by the model as `scale * tanh(parameter)` (Section 3.1)."""

    def __init__(self, length: int, width: int, init_std: float, scale: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(length, width, generator=generator, dtype=torch.float32) * init_std
        self.parameter = nn.Parameter(start)
        self.scale = scale

    def forward(self) -> torch.Tensor:
        """The squashed prompt (L, d), float32."""
        return self.scale * torch.tanh(self.parameter)


def verbalize(prompt: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """V(P): ids (L,) of the token whose embedding is nearest by cosine to each row of `prompt` (L, d).

    `embedding` (V, d) holds the rows to choose from; ids index its rows.
    """
    return nearest_tokens(prompt, embedding, 1)[0][:, 0]


@torch.no_grad()
def nearest_tokens(
    vectors: torch.Tensor,
    embedding: torch.Tensor,
    count: int,
    excluded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` nearest rows of `embedding` (V, d) to each of `vectors` (u, d) by cosine, nearest first.

    `excluded` (u,) names one row per vector that may not be chosen.

    Returns:
        ids (u, count) and cosines (u, count), float32 (float64 for float64 vectors); where fewer than
        `count` rows exist, all of them.
    """
    wanted = functional.normalize(at_least_float32(vectors), dim=-1)
    available = embedding.shape[0] - (0 if excluded is None else 1)
    ids = torch.empty(len(wanted), 0, dtype=torch.long, device=wanted.device)
    cosines = wanted.new_empty(len(wanted), 0)
    for start in range(0, embedding.shape[0], _SLICE):
        rows = functional.normalize(embedding[start : start + _SLICE].to(wanted.dtype), dim=-1)
        found = wanted @ rows.T
        if excluded is not None:
            inside = (excluded >= start) & (excluded < start + len(rows))
            found[inside, excluded[inside] - start] = -torch.inf
        numbers = torch.arange(start, start + len(rows), device=wanted.device).expand(len(wanted), -1)
        ids, cosines = torch.cat([ids, numbers], dim=1), torch.cat([cosines, found], dim=1)
        cosines, chosen = cosines.topk(min(count, available, cosines.shape[1]), dim=1)
        ids = ids.gather(1, chosen)
    return ids, cosines


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half-precision tensors as float32; float64 stays, so that gradients can be checked in it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
