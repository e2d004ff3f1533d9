"""The AVX2 product of linear layers against float64, in every batch, and where vLLM takes it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from soma_vllm.engines.vllm.kernels.linear import LINEAR_ENV, PackedLinear, compiled_kernel, dispatching
from soma_vllm.machine import lowered_environment

pytestmark = pytest.mark.skipif(
    compiled_kernel() is None, reason="the kernel was not built, or this CPU has no AVX2 and FMA"
)

ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 13, 95, 96, 97, 130)
"""Every height of a register tile, and both sides of a block of 96."""


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def assert_close(found: torch.Tensor, expected: torch.Tensor, width: int) -> None:
    """Within the one rounding to bf16 (2**-8 of the value), and what float32 sums may lose."""
    tolerance = expected.abs() * 2**-8 + 1e-5 * width**0.5
    assert found.dtype is torch.bfloat16
    assert ((found.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("out", "width"), [(16, 32), (100, 70), (64, 1100), (300, 513), (5, 1)])
def test_the_product_is_exact_but_for_one_rounding(rows: int, out: int, width: int) -> None:
    weight, x, bias = drawn(out, width), drawn(rows, width, seed=1), drawn(out, seed=2)
    linear = PackedLinear(weight)
    assert_close(linear(x, None, None), exact(x, weight), width)
    assert_close(linear(x, None, bias), exact(x, weight, bias), width)


def test_a_rows_result_is_the_same_bits_in_every_batch_and_on_any_threads() -> None:
    weight, x = drawn(200, 1300), drawn(130, 1300, seed=1)
    linear = PackedLinear(weight)
    whole = linear(x, None, None)
    for rows in ROWS:
        assert torch.equal(linear(x[:rows], None, None), whole[:rows])
    assert torch.equal(linear(x[57:58], None, None), whole[57:58])
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(linear(x, None, None), whole)
    finally:
        torch.set_num_threads(threads)


def test_shapes_strides_and_empty_batches_are_as_with_torch() -> None:
    weight = drawn(48, 40)
    linear = PackedLinear(weight)
    wide = drawn(6, 80, seed=1)
    for x in (wide.reshape(3, 4, 40), wide[:, :40], wide[:, 1:80:2], wide[:0, :40]):
        expected = torch.nn.functional.linear(x, weight)
        found = linear(x, None, None)
        assert found.shape == expected.shape
        assert_close(found, exact(x, weight), 40)


def test_weights_may_lie_in_a_wider_matrix() -> None:
    wide = drawn(32, 100)
    for weight in (wide[:, :64], wide[::2], drawn(64, 32).T):
        x = drawn(3, weight.shape[1], seed=1)
        assert_close(PackedLinear(weight)(x, None, None), exact(x, weight), weight.shape[1])


def test_infinities_and_nans_go_through_and_stay_in_their_rows() -> None:
    weight, x = drawn(32, 64), drawn(8, 64, seed=1)
    clean = PackedLinear(weight)(x, None, None)
    x[2, 5], x[4, 7] = float("nan"), float("inf")
    found = PackedLinear(weight)(x, None, None)
    assert found[2].isnan().all()
    assert not found[4].isfinite().any()
    others = [0, 1, 3, 5, 6, 7]
    assert torch.equal(found[others], clean[others])


def test_rounding_is_to_nearest_even() -> None:
    identity = torch.eye(16).bfloat16()
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # halfway between two of bf16
    bias = halves.repeat(6)[:16]
    found = PackedLinear(identity)(torch.zeros(1, 16).bfloat16(), None, bias)
    assert torch.equal(found[0], bias.bfloat16())


def test_what_the_kernel_cannot_compute_is_refused_with_what_was_found() -> None:
    with pytest.raises(ValueError, match=r"weight: found torch\.float32 of shape \(4, 4\)"):
        PackedLinear(torch.zeros(4, 4))
    linear = PackedLinear(drawn(4, 8))
    with pytest.raises(
        ValueError, match=r"x: found torch\.bfloat16 of shape \(2, 7\); expected bfloat16 of width 8"
    ):
        linear(drawn(2, 7), None, None)
    with pytest.raises(ValueError, match=r"x: found torch\.float32"):
        linear(torch.zeros(2, 8), None, None)
    with pytest.raises(ValueError, match=r"bias: found shape \(3,\); expected \(4,\)"):
        linear(drawn(2, 8), None, drawn(3))


def test_a_bias_that_is_written_anew_counts() -> None:
    weight, x, bias = drawn(8, 8), drawn(1, 8, seed=1), torch.zeros(8).bfloat16()
    linear = PackedLinear(weight)
    assert_close(linear(x, None, bias), exact(x, weight), 8)
    bias += 4
    assert_close(linear(x, None, bias), exact(x, weight) + 4, 8)


def test_torch_compile_takes_it_as_one_operation() -> None:
    linear, x, bias = PackedLinear(drawn(24, 16)), drawn(3, 16, seed=1), drawn(24, seed=2)
    compiled = torch.compile(lambda x: linear(x, None, bias) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), linear(x, None, bias) * 2)


class Layer(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.cpu_linear: Any = None


def test_bf16_matrices_are_taken_over_and_everything_else_is_left_to_vllm() -> None:
    left: list[torch.Size] = []
    dispatch = dispatching(lambda layer, remove_weight: left.append(layer.weight.shape))
    kept, given_up = Layer(drawn(16, 8)), Layer(drawn(16, 8))
    dispatch(kept, remove_weight=False)
    dispatch(given_up, remove_weight=True)
    x = drawn(2, 8, seed=1)
    assert_close(given_up.cpu_linear(x, given_up.weight, None), exact(x, kept.weight), 8)
    assert_close(kept.cpu_linear(x, kept.weight, None), exact(x, kept.weight), 8)
    assert kept.cpu_linear._packed is not None, "packed at the first product"
    assert kept.weight.shape == (16, 8)
    assert given_up.weight.numel() == 0
    for other in (torch.zeros(3, 4), drawn(2, 3, 4), torch.zeros(2, 2, device="meta").bfloat16()):
        dispatch(Layer(other), remove_weight=True)
    assert left == [(3, 4), (2, 3, 4), (2, 2)]


@pytest.mark.parametrize(
    ("stock", "taken"), [("", "PackedLinear vllm.model_executor.layers.utils"), ("stock", "function None")]
)
def test_vllms_own_layers_ask_it_once_the_plugin_ran_and_not_where_stock_is_asked_for(
    stock: str, taken: str
) -> None:
    code = """
        from soma_vllm.engines.vllm.general_plugin import install
        install(), install()
        import torch
        from vllm.model_executor.layers import utils
        ours = getattr(utils.dispatch_cpu_unquantized_gemm, "soma_stock", None)
        layer = torch.nn.Linear(8, 16, bias=False).bfloat16()
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        print(type(layer.cpu_linear).__name__, None if ours is None else ours.__module__)
    """

    environment = {**os.environ, **lowered_environment(), LINEAR_ENV: stock}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.strip().splitlines()[-1] == taken
