"""LoRA products on a CPU, grouped by adapter: correct for base-model tokens, and without copying weights.

vLLM's stock CPU wrapper looks adapters up by index, so that a base-model token (index -1) in a batch with
LoRA tokens gets the *last* slot's adapter: one session's training would leak into another's answer. It also
copies A and B once per token. `GroupedPunicaWrapperCPU` takes its place and guarantees:

* A row gets the delta of its own adapter. A row without an adapter, and a padded row, is not written at all.
* Who belongs to whom is worked out once per step (`update_metadata`), not once per layer.
* Linear layers in bf16 take one fused call each (`fused.py`) where the kernel was compiled and the CPU runs it.
  Everything else takes torch's products: an adapter with many rows one pair, those with a few rows share one
  batched pair. No weights are copied while the active slots are neighbours.

`engines/vllm/general_plugin.py` puts it in place. It leans on vLLM internals that `versions.py` pins.

*slot*: an adapter's place in the stacked weights, (slots, 1, rank, in) for A, (slots, 1, out, rank) for B;
*row*: one token of the step (or one sampled position, for logits)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from soma_vllm.engines.vllm.kernels.fused import Fused, compiled_kernel

logger = init_logger(__name__)

MANY_ROWS = 8
"""From here on an adapter's rows take products of their own: measured, padding costs more than it saves."""

Rows = slice | torch.Tensor
"""Ascending row numbers: a slice where they are neighbours (a view, no copy), else an index."""


@dataclass(frozen=True)
class OneAdapter:
    """Rows of one adapter."""

    slot: int
    rows: Rows

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x: (n, width)."""
        return x[self.rows]

    def multiply(self, x: torch.Tensor, stacked: torch.Tensor) -> torch.Tensor:
        """Gathered rows times the adapter's weight, transposed: (n, in) -> (n, out)."""
        return torch.mm(x, stacked[self.slot].t())

    def put(self, y: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite the rows of y with `multiply`'s result."""
        y[self.rows] = values.to(y.dtype)

    def add_product(self, y: torch.Tensor, x: torch.Tensor, stacked: torch.Tensor) -> None:
        """Add `multiply(x, stacked)` to the rows of y, in one fused product."""
        weight = stacked[self.slot].t()
        if isinstance(self.rows, slice):
            y[self.rows].addmm_(x, weight)
        else:
            y[self.rows] = torch.addmm(y[self.rows], x, weight)


@dataclass(frozen=True)
class FewRowsEach:
    """Rows of several adapters with a few rows each, padded to the longest: (adapters, longest, width)."""

    slots: Rows
    """Ascending: a slice where they are neighbours, so that the weights need no copy."""
    longest: int
    source: Rows
    """Row of x for every place of the padded block; a padded place repeats one of its own adapter's rows."""
    rows: Rows
    """Rows of y, ascending."""
    place: Rows
    """Place in the padded block of each row in `rows`."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.source].view(-1, self.longest, x.shape[-1])

    def multiply(self, x: torch.Tensor, stacked: torch.Tensor) -> torch.Tensor:
        # Weights first: with few rows this orientation is the faster one, by up to a half.
        return torch.bmm(stacked[self.slots], x.transpose(1, 2)).transpose(1, 2)

    def put(self, y: torch.Tensor, values: torch.Tensor) -> None:
        y[self.rows] = self._by_row(values).to(y.dtype)

    def add_product(self, y: torch.Tensor, x: torch.Tensor, stacked: torch.Tensor) -> None:
        delta = self._by_row(self.multiply(x, stacked))
        if isinstance(self.rows, slice):
            y[self.rows].add_(delta)
        else:
            y[self.rows] = y[self.rows] + delta

    def _by_row(self, values: torch.Tensor) -> torch.Tensor:
        """(adapters, longest, width) -> (rows, width), in the order of `rows`."""
        return values.reshape(-1, values.shape[-1])[self.place]


Product = OneAdapter | FewRowsEach


def plan(slots: Sequence[int]) -> tuple[Product, ...]:
    """The products a step needs, given the slot of each of its rows; -1 means no adapter and no product."""
    groups: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            groups.setdefault(slot, []).append(row)
    few = {slot: rows for slot, rows in sorted(groups.items()) if len(rows) < MANY_ROWS}
    if len(few) < 2:
        few = {}
    products: list[Product] = [OneAdapter(s, _as_rows(r)) for s, r in groups.items() if s not in few]
    if few:
        products.append(_few_rows_each(few))
    return tuple(products)


def _few_rows_each(groups: dict[int, list[int]]) -> FewRowsEach:
    longest = max(map(len, groups.values()))
    source: list[int] = []
    place_of: dict[int, int] = {}
    for rows in groups.values():
        for row in rows:
            place_of[row] = len(source)
            source.append(row)
        source.extend([rows[-1]] * (longest - len(rows)))
    ascending = sorted(place_of)
    return FewRowsEach(
        slots=_as_rows(list(groups)),
        longest=longest,
        source=_as_rows(source),
        rows=_as_rows(ascending),
        place=_as_rows([place_of[row] for row in ascending]),
    )


def _as_rows(numbers: list[int]) -> Rows:
    first, count = numbers[0], len(numbers)
    if numbers == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(numbers, dtype=torch.long)


def _stacked(weights: torch.Tensor) -> torch.Tensor:
    """(slots, 1, out, in) -> (slots, out, in), a view."""
    return weights.squeeze(1) if weights.dim() == 4 else weights


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Every leading dimension folded into rows, a view."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def _shrink(product: Product, x: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """Gathered x times A, in the wider of the two types."""
    dtype = torch.promote_types(x.dtype, a.dtype)
    low = product.multiply(x.to(dtype), a.to(dtype))
    return low if scale == 1.0 else low * scale


def _expand(product: Product, y: torch.Tensor, low: torch.Tensor, b: torch.Tensor, add: bool) -> None:
    """Add gathered `low` times B to y, in y's type; or overwrite y's rows with it."""
    low, b = low.to(y.dtype), b.to(y.dtype)
    if add:
        product.add_product(y, low, b)
    else:
        product.put(y, product.multiply(low, b))


class GroupedPunicaWrapperCPU(PunicaWrapperCPU):  # type: ignore[misc]
    """Drop-in for vLLM's `PunicaWrapperCPU`; method names, arguments and shapes are vLLM's.

    `add_inputs=False` overwrites the rows that have an adapter and leaves the others alone, as the GPU
    kernels do. `apply_lora_full_linear` is inherited: it already discards what it computes for base rows.
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._token_slots: list[int] = []
        self._sampler_slots: list[int] = []
        self._token_plans: dict[int, tuple[Product, ...]] = {}
        self._sampler_plans: dict[int, tuple[Product, ...]] = {}
        self._kernel = compiled_kernel()
        self._fused_plan: Any = None
        self._fused: dict[int, tuple[Any, Fused | None]] = {}
        """By the id of a layer's tuple of stacked A, kept beside it; None where the kernel does not fit."""

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Plan the coming step. `mapping` is vLLM's LoRAMapping."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        slots = self.token_lora_indices
        self._token_slots = slots.tolist()
        self._sampler_slots = self.sampler_indices.tolist()
        self._token_plans, self._sampler_plans = {}, {}
        self.no_lora = max(self._token_slots, default=-1) < 0
        if self._kernel is not None:
            self._fused_plan = self._kernel.plan(slots)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y[i] = x @ A[i] * scale for rows with an adapter. y[i]: (rows, rank); x: (rows, in)."""
        x = _flat(x)
        for product in self._plan_for(x.shape[0]):
            gathered = product.gather(x)
            for target, a in zip(y, lora_a_stacked, strict=True):
                low = _shrink(product, gathered, _stacked(a), scale)
                product.put(_flat(target)[:, : low.shape[-1]], low)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += x[i] @ B[i]. y: (rows, out); x[i]: (rows, rank)."""
        y = _flat(y)
        for product in self._plan_for(y.shape[0]):
            start = offset_start
            for low, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
                part = y[:, start : start + width]
                _expand(product, part, product.gather(_flat(low)), _stacked(b), add_inputs)
                start += width

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += x @ A[i] @ B[i] * scale. y: (rows, out); x: (rows, in).

        A `buffer`, where given, receives x @ A[i] * scale, as it does with the stock wrapper.
        """
        if buffer is not None:
            self.add_shrink(buffer, x, lora_a_stacked, scale)
            self.add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=add_inputs)
            return
        if self.no_lora:
            return
        x, y = _flat(x), _flat(y)
        if add_inputs and x.shape[0] >= len(self._token_slots):
            fused = self._fused_layer(lora_a_stacked, lora_b_stacked, output_slices)
            if fused is not None and fused.add(self._fused_plan, y, x, scale):
                return
        for product in self._plan_for(x.shape[0]):
            gathered = product.gather(x)
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                low = _shrink(product, gathered, _stacked(a), scale)
                _expand(product, y[:, start : start + width], low, _stacked(b), add_inputs)
                start += width

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y += x @ B. y: (rows, width), maybe padded; x: (rows, rank), rows of the embedding's A."""
        y, x, b = _flat(y), _flat(x), _stacked(lora_b_stacked)
        width = min(y.shape[1], b.shape[1])
        for product in self._plan_for(x.shape[0]):
            _expand(product, y[:, :width], product.gather(x), b[:, :width], add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y += x @ A @ B * scale, with one row per sampled position. y: (rows, vocabulary); x: (rows, in)."""
        y, x, b = _flat(y), _flat(x), _stacked(lora_b_stacked)
        width = min(y.shape[1], b.shape[1])
        for product in self._sampler_plan_for(x.shape[0]):
            low = _shrink(product, product.gather(x), _stacked(lora_a_stacked), scale)
            if buffer is not None:
                product.put(_flat(buffer), low)
            _expand(product, y[:, :width], low, b[:, :width], add=True)

    def _fused_layer(
        self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], outs: tuple[int, ...]
    ) -> Fused | None:
        """The compiled kernel's view of a layer, where it can compute it."""
        if self._kernel is None:
            return None
        known = self._fused.get(id(a))
        if known is None:
            known = self._fused[id(a)] = (a, Fused(self._kernel, a, b) if Fused.fits(a, b, outs) else None)
        return known[1]

    def _plan_for(self, rows: int) -> tuple[Product, ...]:
        """The step's plan for a tensor of so many rows: rows past the metadata are padding and get nothing."""
        rows = min(rows, len(self._token_slots))
        found = self._token_plans.get(rows)
        if found is None:
            found = self._token_plans[rows] = plan(self._token_slots[:rows])
        return found

    def _sampler_plan_for(self, rows: int) -> tuple[Product, ...]:
        """The plan for logits. Rows that are not the sampled ones (prompt log-probabilities) have no mapping
        of their own: they get the adapter that the whole step shares, or none, never a neighbour's."""
        found = self._sampler_plans.get(rows)
        if found is None:
            found = self._sampler_plans[rows] = self._plan_logits(rows)
        return found

    def _plan_logits(self, rows: int) -> tuple[Product, ...]:
        if rows == len(self._sampler_slots):
            return plan(self._sampler_slots)
        if len(set(self._sampler_slots)) == 1:
            return plan(self._sampler_slots[:1] * rows)
        if max(self._sampler_slots, default=-1) >= 0:
            logger.warning_once(
                "logits of %d rows in a step with adapters that sampled %d: served without the adapters' heads",
                rows,
                len(self._sampler_slots),
            )
        return ()
