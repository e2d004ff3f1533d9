"""How fast this machine is, for estimates: measured by `probe` in a process of its own.

Guarantees: no torch in this process; a probe that fails costs a plan, never a replay: `measured` returns None.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

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

    def told(self) -> str:
        """The products in a few words, for people."""
        return ", ".join(f"{name} {product.gflops:.0f} GFLOP/s" for name, product in self.products.items())


def measured(command: tuple[str, ...] = (sys.executable, "-m", "soma_vllm.cli.probe")) -> Speed | None:
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
