"""How fast this machine is, for estimates: measured by `probe` in a process of its own.

Guarantees: no torch in this process; a probe that fails costs a plan, never a replay: `measured` returns None.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

PACKED = "packed"
"""The probe's name for the compiled kernel's products (kernels/linear.py)."""

ARITHMETIC = {
    "bfloat16": "bf16",
    "float32": "float32",
    PACKED: "bf16 weights with float32 products",
}
"""For people, by the probe's name."""

PROBE_LIMIT_S = 120.0
"""After this a probe is given up: importing torch from a cold disk may take a while, measuring does not."""


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

    def told(self) -> str:
        """The products in a few words, for people."""
        named = [(ARITHMETIC.get(name, name), one.gflops) for name, one in self.products.items()]
        return ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in named)


def measured(command: tuple[str, ...] = (sys.executable, "-m", "soma_vllm.tools.replay.probe")) -> Speed | None:
    """Measure one core, in about two seconds and the time that torch takes to load; None if that fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else read(done.stdout)


def read(printed: str) -> Speed | None:
    """What a probe printed; None where that is not what a probe prints."""
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
