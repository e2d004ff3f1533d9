"""How fast this machine is, for estimates: measured in two seconds, by this module as a process of its own.

Guarantees: no torch in the process that asks; a probe that fails costs a plan, never a replay: `measure_speed`
returns None.

The probe prints one JSON object: `import_s`, the seconds that importing torch took (starting engines is
importing, for the most part), and for each arithmetic (the compiled kernel's only where engines use it) the
best seconds seen for a matrix product with 1, 4 and 64 rows, per 10^9 weights. Matrices are those of a 1.5B
model's MLP; products of few rows go over more of them than a cache holds, because a model's step reads all
weights from memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the probe imports as little as it can: what torch needs too would not be measured
    from soma_vllm.config import Config

PACKED = "packed"
"""The probe's name for the compiled kernel's products (kernels/linear.py)."""
ARITHMETIC = {
    "bfloat16": "bf16",
    "float32": "float32",
    PACKED: "bf16 weights with float32 products",
}
"""For people, by the probe's name."""

ROWS = (1, 4, 64)
"""A lone request's step, a step of several requests, a piece of a prompt."""
PROBE_LIMIT_S = 120.0
"""After this a probe is given up: importing torch from a cold disk may take a while, measuring does not."""

_WIDE, _NARROW = 8960, 1536
_MATRICES = 6
"""6 x 27 MB in bf16: more than a core's share of any cache."""
_FEW = 16
"""Products of up to this many rows go over all matrices."""
_TRIES = 2
_BF16_BYTES = 2
"""Per weight."""


@dataclass(frozen=True)
class Product:
    """One core's matrix products in one arithmetic. Seconds per 10^9 weights."""

    arithmetic: str
    step_s: float
    """One row: a request that decodes alone."""
    shared_step_s: float
    """Four rows, together."""
    token_s: float
    """One row of many: a token of a prompt, or of a training's text."""

    @property
    def gflops(self) -> float:
        """Of many rows: two operations per weight and row."""
        return 2.0 / self.token_s

    def step_of(self, rows: int) -> float:
        """Seconds of one step of `rows` requests, per 10^9 weights."""
        if rows <= 1:
            return self.step_s
        return self.step_s + (self.shared_step_s - self.step_s) * (rows - 1) / 3.0


@dataclass(frozen=True)
class Speed:
    """What the probe found."""

    import_s: float
    """Seconds to import torch."""
    products: Mapping[str, Product]
    """By arithmetic, such as "bfloat16"."""

    def engines_product(self, dtype: str) -> Product:
        """What an engine of a configured dtype multiplies with: the compiled kernel, where it is in use."""
        if dtype == "float32":
            return self.products["float32"]
        return self.products.get(PACKED) or self.products["bfloat16"]

    def describe(self) -> str:
        """The products in a few words, for people."""
        named = [(ARITHMETIC.get(name, name), one.gflops) for name, one in self.products.items()]
        return ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in named)


@dataclass(frozen=True)
class Machine:
    """What an estimate needs to know. Weights in 10^9."""

    product: Product
    """Products of the engines."""
    trainer: Product
    import_s: float
    original: float
    """Weights of the original; an embedding shared with the head counts once."""
    surrogate: float
    surrogate_layers: int
    original_cache_block: int = 32
    """Tokens; what an engine has cached of a prompt ends at a multiple."""


def measure_speed(command: Sequence[str] = (sys.executable, "-m", __name__)) -> Speed | None:
    """Measure one core, in about two seconds and the time that torch takes to load; None if that fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else parse_speed(done.stdout)


def parse_speed(printed: str) -> Speed | None:
    """What a probe printed; None where it is not of that form."""
    try:
        found = json.loads(printed)
        import_s = float(found.pop("import_s"))
        products = {
            name: Product(name, float(seconds["1"]), float(seconds["4"]), float(seconds["64"]) / 64)
            for name, seconds in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Speed(import_s, products) if products else None


def machine_of(config: Config, speed: Speed) -> Machine | None:
    """What an estimate needs, every `dtype: auto` settled as the server settles it; None where a model is not
    in a folder of this machine, or runs on a GPU, about which a core's products say nothing."""
    from soma_vllm.engines.arithmetic import settle
    from soma_vllm.engines.memory import read_object
    from soma_vllm.models.hub import folder_here

    if config.original.url is not None or config.original_model is None or config.surrogate_model is None:
        return None
    if "cuda" in (config.original.device, config.surrogate.device, config.training.device):
        return None
    original, surrogate = folder_here(config.original_model), folder_here(config.surrogate_model)
    if original is None or surrogate is None:
        return None
    settled, _ = settle(config, original, surrogate)
    return Machine(
        product=speed.engines_product(settled.original.dtype),
        trainer=speed.products["float32" if settled.training.dtype == "float32" else "bfloat16"],
        import_s=speed.import_s,
        original=count_weights(original),
        surrogate=count_weights(surrogate),
        surrogate_layers=int(read_object(surrogate / "config.json").get("num_hidden_layers") or 24),
    )


def count_weights(folder: Path) -> float:
    """10^9 weights in a model's folder, by the size of its files."""
    from soma_vllm.engines.memory import GB, weights_bytes

    return weights_bytes(folder, "bfloat16") / _BF16_BYTES / GB


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
    for name, (dtype, prepare) in ways.items():
        layers = [prepare(torch.ones(_WIDE, _NARROW, dtype=dtype)) for _ in range(_MATRICES)]
        seconds = {}
        for rows in ROWS:
            inputs = torch.ones(rows, _NARROW, dtype=dtype)
            used = layers if rows <= _FEW else layers[:1]
            products = [partial(layer, inputs) for layer in used]
            seconds[rows] = _best_time(products) / (len(used) * _WIDE * _NARROW) * 1e9
        found[name] = seconds
    print(json.dumps(found), flush=True)


def _best_time(products: Sequence[Callable[[], object]]) -> float:
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
