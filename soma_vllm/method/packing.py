"""Many answers in few sequences: a dialogue's turns share their history, so they share its computation.

Guarantees: every answer token sees exactly the tokens it would see alone (attention is causal, and two turns
share a sequence only where one's whole input begins the other's); no answer is lost or read twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from soma_vllm.method.rendering import Rendered

_WASTE = 1.15
"""Most tokens of a batch, padding included, per real token."""
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Strand:
    """One sequence with one or more answers in it, the earliest first."""

    turns: tuple[Rendered, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """What the model reads: the input of the last turn, which begins with those of the others."""
        return self.turns[-1].inputs


@dataclass(frozen=True)
class Batch:
    """A batch of strands, padded on the right."""

    strands: tuple[Strand, ...]
    ids: torch.Tensor
    """(B, T) token ids."""
    mask: torch.Tensor | None
    """(B, T) 1 where there is a token; None where nothing is padded."""

    def rows(self, shift: int = 0) -> Iterator[tuple[Rendered, int, slice]]:
        """(turn, row of the batch, positions that predict its answer); `shift` tokens stand before the ids."""
        for row, strand in enumerate(self.strands):
            for turn in strand.turns:
                first = shift + len(turn.prompt) - 1
                yield turn, row, slice(first, first + len(turn.answer))


def pack(rendered: Sequence[Rendered]) -> list[Strand]:
    """All turns in few strands, in the order of their lengths."""
    chains: list[list[Rendered]] = []
    for turn in sorted(rendered, key=lambda turn: len(turn.inputs)):
        for chain in chains:
            end = chain[-1].inputs
            # An answer that begins where another ends would read the same position twice.
            if turn.inputs[: len(end)] == end and len(turn.prompt) > len(end):
                chain.append(turn)
                break
        else:
            chains.append([turn])
    return [Strand(tuple(chain)) for chain in chains]


def batches(rendered: Sequence[Rendered], device: torch.device) -> list[Batch]:
    """Turns packed into strands, strands of like length side by side."""
    groups: list[list[Strand]] = []
    for strand in sorted(pack(rendered), key=lambda strand: len(strand.ids)):
        last = groups[-1] if groups else []
        padded = (len(last) + 1) * len(strand.ids)
        real = sum(len(other.ids) for other in last) + len(strand.ids)
        if last and padded <= min(_WASTE * real, _BATCH_TOKENS):
            last.append(strand)
        else:
            groups.append([strand])
    return [_batch(group, device) for group in groups]


def _batch(strands: Sequence[Strand], device: torch.device) -> Batch:
    longest = max(len(strand.ids) for strand in strands)
    ids = torch.zeros(len(strands), longest, dtype=torch.long)
    mask = torch.zeros(len(strands), longest, dtype=torch.long)
    for row, strand in enumerate(strands):
        ids[row, : len(strand.ids)] = torch.tensor(strand.ids)
        mask[row, : len(strand.ids)] = 1
    padded = not bool(mask.all())
    return Batch(tuple(strands), ids.to(device), mask.to(device) if padded else None)
