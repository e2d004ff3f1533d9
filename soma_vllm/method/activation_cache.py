"""Cached activations: packed turns, embedded and run through the frozen lower layers once.

Guarantees: logits are those of the whole model (`Decoder`); nothing below the cut is computed twice, and the
output head runs at the positions alone that predict an answer's token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from soma_vllm.method.decoder import Decoder
from soma_vllm.method.packing import Batch, batches
from soma_vllm.method.rendering import Rendered

Read = list[tuple[Rendered, torch.Tensor]]
"""Turns of one batch, each with the logits (n, V) that predict its n answer tokens."""


@dataclass(frozen=True)
class Trunk:
    """What enters layer `cut` for a set of turns. Valid for as long as the layers below it do not change."""

    decoder: Decoder
    cut: int
    batches: tuple[tuple[Batch, torch.Tensor], ...]
    """Each batch with its states (B, T, d)."""

    @classmethod
    @torch.no_grad()
    def grow(cls, decoder: Decoder, rendered: Sequence[Rendered], cut: int = 0) -> Trunk:
        """Run embedding and layers below `cut` over all turns."""
        states = []
        for batch in batches(rendered, decoder.device):
            entering = decoder.embed(batch.ids)
            states.append((batch, decoder.run(entering, batch.mask, stop=cut) if cut else entering))
        return cls(decoder, cut, tuple(states))

    def read(self, wanted: Collection[int] | None = None) -> Iterator[Read]:
        """Logits of all turns, or of the wanted turn numbers; differentiable in what lies above the cut."""
        for batch, states in self.batches:
            rows = [row for row in batch.rows() if wanted is None or row[0].turn in wanted]
            if rows:
                yield self._logits(states, batch.mask, rows)

    def _logits(
        self, states: torch.Tensor, mask: torch.Tensor | None, rows: Sequence[tuple[Rendered, int, slice]]
    ) -> Read:
        # Sequences without a wanted answer stay out, and the others end where their last one does.
        end = max(positions.stop for _, _, positions in rows)
        taken = {row: place for place, row in enumerate(sorted({row for _, row, _ in rows}))}
        if len(taken) < len(states):
            states = states[list(taken)]
            mask = None if mask is None else mask[list(taken)]
        final = self.decoder.run(states[:, :end], None if mask is None else mask[:, :end], start=self.cut)
        logits = self.decoder.logits(torch.cat([final[taken[row], positions] for _, row, positions in rows]))
        pieces = torch.split(logits, [positions.stop - positions.start for _, _, positions in rows])
        return [(turn, piece) for (turn, _, _), piece in zip(rows, pieces, strict=True)]

    def turns(self) -> Iterator[Rendered]:
        """All turns, in no particular order."""
        for batch, _ in self.batches:
            for strand in batch.strands:
                yield from strand.turns
