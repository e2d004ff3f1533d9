"""What one core of this machine computes, measured in about two seconds: run as a process of its own.

Prints one JSON object: `import_s`, the seconds that importing torch took (starting engines is importing, for
the most part), and by arithmetic (the compiled kernel's only where engines use it) the best seconds seen for a
matrix product with 1, 4 and 64 rows, per 10^9 weights. Matrices are those of a 1.5B model's MLP; products of
few rows go over more of them than a cache holds, because that is what a model's step does: it reads all weights
from memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial

from soma_vllm.tools.replay.speed import PACKED

ROWS = (1, 4, 64)
"""A lone request's step, a step of several requests, a piece of a prompt."""

_WIDE, _NARROW = 8960, 1536
_MATRICES = 6
"""6 x 27 MB in bf16: more than a core's share of any cache."""
_FEW = 16
"""Products of up to this many rows go over all matrices."""
_TRIES = 2


def main() -> None:
    """Measure and print."""
    began = time.perf_counter()
    import torch

    from soma_vllm.engines.vllm.kernels.linear import PackedLinear, is_worthwhile

    found: dict[str, object] = {"import_s": time.perf_counter() - began}
    torch.set_num_threads(1)
    linear = torch.nn.functional.linear
    ways: dict[str, tuple[torch.dtype, Callable[[torch.Tensor], Callable[..., object]]]] = {
        "bfloat16": (torch.bfloat16, lambda weight: lambda x: linear(x, weight)),
        "float32": (torch.float32, lambda weight: lambda x: linear(x, weight)),
    }
    if is_worthwhile():
        ways[PACKED] = (torch.bfloat16, lambda weight: partial(PackedLinear(weight), weight=None, bias=None))
    for name, (dtype, prepared) in ways.items():
        layers = [prepared(torch.ones(_WIDE, _NARROW, dtype=dtype)) for _ in range(_MATRICES)]
        seconds = {}
        for rows in ROWS:
            inputs = torch.ones(rows, _NARROW, dtype=dtype)
            used = layers if rows <= _FEW else layers[:1]
            products = [partial(layer, inputs) for layer in used]
            seconds[rows] = _best(products) / (len(used) * _WIDE * _NARROW) * 1e9
        found[name] = seconds
    print(json.dumps(found), flush=True)


def _best(products: Sequence[Callable[[], object]]) -> float:
    """The least seconds that all products took one after the other."""
    tries = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        for product in products:
            product()
        tries.append(time.perf_counter() - began)
    return min(tries)


if __name__ == "__main__":
    main()
