"""What LoRA costs in the kernels of one decoder step, and what its metadata takes.

Some decoder layers' products alone (cuBLAS) in one CUDA graph, then with vLLM's LoRA calls after each
product, at 1 to 256 rows and 1 to 32 adapters. Then `update_metadata`, which vLLM calls once a step, against
a mapping that is sorted on the host and sent in one copy.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import Step
from lora_correct import forget_pointers
from shapes import LAYERS

DEPTH = {"0.5b": (8, 24), "8b": (2, 36), "tiny": (2, 2)}
"""Layers in the graph, so many that their weights exceed the cache; layers of the model."""
RANK = 8
MAX_LORAS = 32


def wrapper(step: Step, rows: int) -> Any:
    """vLLM's LoRA calls for `rows` tokens."""
    if step.device == "cpu":
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        return PunicaWrapperCPU(rows, rows, "cpu")
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    settings = SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=False, fully_sharded_loras=False)
    return PunicaWrapperGPU(rows, rows, torch.device("cuda"), lora_config=settings)


def update(punica: Any, rows: int, adapters: int) -> None:
    """Give rows to adapters in turn; with 0 adapters no row has one."""
    from vllm.lora.layers import LoRAMapping

    numbers = tuple(1 + row % adapters for row in range(rows)) if adapters else (0,) * rows
    ids: list[int | None] = list(range(1, MAX_LORAS + 1))
    punica.update_metadata(LoRAMapping(numbers, numbers, is_prefill=False), ids, MAX_LORAS, 151936)


class Layers:
    """Random weights and adapters of a few layers of a model, and their products."""

    def __init__(self, step: Step, model: str) -> None:
        self.parts = LAYERS[model]
        self.count, self.of_model = DEPTH[model]
        self._at = {"device": step.device, "dtype": torch.bfloat16}
        self._weights = [
            {name: self._random(sum(outs), width) / width**0.5 for name, (width, outs) in self.parts.items()}
            for _ in range(self.count)
        ]
        self._slots = [
            {
                name: (
                    tuple(self._random(MAX_LORAS, 1, RANK, width) for _ in outs),
                    tuple(self._random(MAX_LORAS, 1, out, RANK) for out in outs),
                )
                for name, (width, outs) in self.parts.items()
            }
            for _ in range(self.count)
        ]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, **self._at)

    def inputs(self, rows: int) -> dict[str, torch.Tensor]:
        """[rows, width] for each product of a layer."""
        return {name: self._random(rows, width) for name, (width, _) in self.parts.items()}

    def base(self, inputs: dict[str, torch.Tensor]) -> None:
        """The products alone."""
        for layer in self._weights:
            for name, weight in layer.items():
                torch.nn.functional.linear(inputs[name], weight)

    def adapted(self, inputs: dict[str, torch.Tensor], punica: Any) -> None:
        """The products, and LoRA's after each."""
        for layer, slots in zip(self._weights, self._slots, strict=True):
            for name, weight in layer.items():
                y = torch.nn.functional.linear(inputs[name], weight)
                a, b = slots[name]
                punica.add_lora_linear(y, inputs[name], a, b, 1.0, self.parts[name][1])


def layer_costs(step: Step, model: str) -> None:
    """Microseconds of a layer, by rows and adapters."""
    layers = Layers(step, model)
    for rows in (1, 8) if step.tiny else (1, 8, 32, 128, 256):
        if step.left() < 6:
            return
        inputs, punica = layers.inputs(rows), wrapper(step, rows)

        def base(inputs: Any = inputs) -> None:
            layers.base(inputs)

        def adapted(inputs: Any = inputs, punica: Any = punica) -> None:
            layers.adapted(inputs, punica)

        base_us = step.graph_microseconds(base) / layers.count
        figures: dict[str, float] = {}
        eager: dict[str, float] = {}
        for adapters in (1, 4, 16, 32):
            if adapters > rows or step.left() < 4:
                break
            update(punica, rows, adapters)
            figures[str(adapters)] = step.graph_microseconds(adapted) / layers.count
            if adapters == 1:
                eager["base"] = step.microseconds(base, repeats=8) / layers.count
                eager["adapted"] = step.microseconds(adapted, repeats=8) / layers.count
        step.record(
            "layer",
            model=model,
            rows=rows,
            layers_of_model=layers.of_model,
            base_us=base_us,
            with_lora_us=figures,
            tax={adapters: us / base_us - 1 for adapters, us in figures.items()},
            eager_us=eager,
        )


class HostMapping:
    """The same mapping as vLLM's metadata, sorted on the host and sent in one copy."""

    def __init__(self, rows: int, device: str) -> None:
        self._host = torch.empty(2 * rows + 3 * MAX_LORAS + 4, dtype=torch.int32, pin_memory=device == "cuda")
        self._device = torch.empty_like(self._host, device=device)

    def update(self, numbers: np.ndarray) -> None:
        """`numbers`: [rows], the adapter of each row."""
        rows, host = len(numbers), self._host.numpy()
        order = np.argsort(numbers, kind="stable")
        ids, counts = np.unique(numbers, return_counts=True)
        at = 2 * rows
        host[:rows] = numbers
        host[rows:at] = order
        host[at:] = -1
        host[at : at + len(ids)] = ids
        host[at + MAX_LORAS + 1 : at + MAX_LORAS + 1 + len(ids)] = counts
        host[at + 2 * MAX_LORAS + 2] = 0
        ends = np.cumsum(counts)
        host[at + 2 * MAX_LORAS + 3 : at + 2 * MAX_LORAS + 3 + len(ids) - 1] = ends[:-1]
        self._device.copy_(self._host, non_blocking=True)


def metadata(step: Step) -> None:
    """Microseconds of a step's metadata: vLLM's with adapters and with none, and sorted on the host."""
    for rows in (8,) if step.tiny else (1, 32, 256, 2048):
        adapters = min(rows, 16)
        punica, ours = wrapper(step, rows), HostMapping(rows, step.device)
        numbers = np.arange(rows, dtype=np.int32) % adapters

        def used(punica: Any = punica, rows: int = rows, adapters: int = adapters) -> None:
            update(punica, rows, adapters)

        def unused(punica: Any = punica, rows: int = rows) -> None:
            update(punica, rows, 0)

        def sorted_on_host(ours: HostMapping = ours, numbers: np.ndarray = numbers) -> None:
            ours.update(numbers)

        step.record(
            "metadata",
            rows=rows,
            adapters=adapters,
            vllm_us=step.microseconds(used),
            host_sorted_us=step.microseconds(sorted_on_host),
            unused_us=step.microseconds(unused),
        )


def main() -> None:
    step = Step("lora_cost")
    torch.manual_seed(2)
    with step.part("metadata"):
        metadata(step)
    for model in ("tiny",) if step.tiny else ("0.5b", "8b"):
        if step.device == "cuda":
            forget_pointers()
        with step.part(f"layer {model}"):
            layer_costs(step, model)


if __name__ == "__main__":
    main()
