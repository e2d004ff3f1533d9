"""When an engine serves what was trained: whatever rounding does, and none of what goes wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from soma_vllm.engines.adapter_probe import ROUNDING, Comparison, compare
from soma_vllm.types import Signature

TOKENS = 60


def measured(size: float, serve: Callable[[list[float]], list[float]], seed: int) -> Comparison:
    """A shift of that size, served by `serve`, everything rounded as 16 bits round it."""
    dice = random.Random(seed)

    def rounding() -> float:
        return dice.gauss(0, 0.03)

    plain = [dice.uniform(-9, -1) for _ in range(TOKENS)]
    shift = [dice.gauss(0, size) for _ in plain]
    served = serve(shift)
    signature = Signature(
        tuple(range(TOKENS + 1)),
        tuple(p + rounding() for p in plain),
        tuple(p + s + rounding() for p, s in zip(plain, shift, strict=True)),
    )
    return compare(
        signature,
        [p + rounding() for p in plain],
        [p + s + rounding() for p, s in zip(plain, served, strict=True)],
    )


@pytest.mark.parametrize("size", [0.0, 0.03, 0.1, 0.2, 0.5, 2.0])
def test_what_is_served_as_trained_agrees_whatever_its_size(size: float) -> None:
    assert all(measured(size, lambda shift: shift, seed).agrees for seed in range(200))


WRONG: dict[str, Callable[[list[float]], list[float]]] = {
    "nothing": lambda shift: [0.0] * len(shift),
    "half the scale": lambda shift: [0.5 * value for value in shift],
    "twice the scale": lambda shift: [2.0 * value for value in shift],
    "half of its parts": lambda shift: [value if n % 2 else 0.0 for n, value in enumerate(shift)],
    "another adapter": lambda shift: shift[::-1],
    "no number": lambda shift: [math.nan] * len(shift),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("size", [0.3, 0.5, 2.0])
def test_what_goes_wrong_does_not_agree_where_the_adapter_has_a_noticeable_effect(
    wrong: str, size: float
) -> None:
    assert not any(measured(size, WRONG[wrong], seed).agrees for seed in range(200))


def test_what_was_measured_on_a_real_model_is_told_apart() -> None:
    """Qwen2.5-Coder-0.5B in bfloat16 in trainer and engine: shifts, difference, slope, as they were found."""
    right = Comparison(68, 0.206, 0.196, 0.068, 0.897)
    assert right.agrees
    assert right.difference < ROUNDING
    for served, difference, slope in (
        (0.102, 0.130, 0.424),  # alpha halved
        (0.405, 0.221, 1.855),  # alpha doubled
        (0.567, 0.384, 2.554),  # scaled as rsLoRA
        (0.174, 0.109, 0.716),  # without v_proj
        (0.191, 0.101, 0.809),  # without gate_proj
        (0.153, 0.128, 0.583),  # without up_proj
        (0.202, 0.113, 0.832),  # without down_proj
        (0.157, 0.101, 0.671),  # without the last layer
        (0.0, 0.206, 0.0),
    ):
        assert not Comparison(68, 0.206, served, difference, slope).agrees
