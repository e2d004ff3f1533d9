"""The grouped LoRA products against the plainest possible reference, and vLLM's stock ones against the same.

Everything holds for each instruction set of the compiled kernel, and for torch's products; those that this
CPU lacks are skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from soma_vllm.engines.vllm.kernels import fused
from soma_vllm.engines.vllm.kernels.fused import KERNEL_ENV, Fused, Kernel, compiled_kernel
from soma_vllm.engines.vllm.kernels.lora_kernels import FewRowsEach, GroupedPunicaWrapperCPU, OneAdapter, plan
from soma_vllm.machine import ISA_ENV, InstructionSet

SLOTS, RANK, WIDTH, VOCABULARY = 4, 8, 64, 96
QKV = (48, 16, 16)
BASE = 0
"""vLLM's adapter id of a token of the base model."""

BATCHES = {
    "one adapter, prefill": [1] * 40,
    "one adapter and base tokens, prefill": [BASE] * 7 + [2] * 30 + [BASE] * 5,
    "several prefills": [1] * 20 + [3] * 9 + [BASE] * 11 + [2] * 33,
    "prefill beside decodes": [4, BASE, 1] + [2] * 25 + [3, 3],
    "one decode": [3],
    "decodes, one each": [3, 1, 4, 2],
    "decodes with gaps between slots": [4, BASE, 1],
    "decodes, several each, unordered": [2, 1, 2, BASE, 4, 1, 1, BASE, 4],
    "scattered rows of one adapter": [1, BASE] * 12,
    "base tokens only": [BASE] * 6,
}


COMPILED = [InstructionSet.AVX512_BF16, InstructionSet.AVX2]


@pytest.fixture(autouse=True, params=[*COMPILED, "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel | None:
    """The products that a wrapper made in this test takes; None for torch's."""
    return choose(request.param, monkeypatch)


def choose(name: str, monkeypatch: pytest.MonkeyPatch) -> Kernel | None:
    """Have wrappers take these products from here on, or skip the test where this CPU cannot compute them."""
    monkeypatch.setenv(KERNEL_ENV, "torch" if name == "torch" else "")
    monkeypatch.setenv(ISA_ENV, "avx2" if name == InstructionSet.AVX2 else "")
    built = fused._COMPILED
    if name != "torch" and (built is None or name not in built.instruction_sets()):
        pytest.skip("the kernel was not built" if built is None else f"this CPU has no {name}")
    return compiled_kernel()


@pytest.fixture
def compiled(kernel: Kernel | None) -> Kernel:
    """The compiled kernel; torch's products are skipped."""
    if kernel is None:
        pytest.skip("about the compiled kernel")
    return kernel


def step(wrapper: PunicaWrapperCPU, ids: Sequence[int], sampled: Sequence[int] | None = None) -> None:
    """Tell the wrapper of a step as the engine does: `is_prefill` is always true there."""
    mapping = LoRAMapping(tuple(ids), tuple(ids if sampled is None else sampled), is_prefill=True)
    wrapper.update_metadata(mapping, [1, 2, 3, 4], SLOTS + 1, VOCABULARY)


def wrapper_of(kind: type[PunicaWrapperCPU]) -> PunicaWrapperCPU:
    return kind(max_num_batched_tokens=256, max_batches=64, device="cpu")


def weights(outs: Sequence[int], seed: int = 0) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    random = torch.Generator().manual_seed(seed)
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH, generator=random).bfloat16() for _ in outs)
    b = tuple(torch.randn(SLOTS, 1, out, RANK, generator=random).bfloat16() for out in outs)
    return a, b


def inputs(rows: int, width: int = WIDTH) -> torch.Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) / 8).bfloat16()


def reference(
    x: torch.Tensor, ids: Sequence[int], a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The delta, token by token, in float64. Adapter id n lives in slot n - 1."""
    delta = torch.zeros(x.shape[0], sum(part.shape[2] for part in b), dtype=torch.float64)
    for row, adapter in enumerate(ids):
        if adapter == BASE:
            continue
        start = 0
        for down, up in zip(a, b, strict=True):
            end = start + up.shape[2]
            delta[row, start:end] = up[adapter - 1, 0].double() @ (
                down[adapter - 1, 0].double() @ x[row].double()
            )
            start = end
    return delta


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.03, atol=0.15)


def base_delta(kind: type[PunicaWrapperCPU]) -> float:
    """Largest change that a base-model token suffers beside LoRA tokens."""
    ids = [1, BASE, 2]
    wrapper, (a, b) = wrapper_of(kind), weights(QKV)
    step(wrapper, ids)
    y = torch.zeros(3, sum(QKV), dtype=torch.bfloat16)
    wrapper.add_lora_linear(y, inputs(3), a, b, 1.0, QKV)
    return float(y[1].abs().max())


def test_a_base_token_beside_adapters_is_left_exactly_alone() -> None:
    assert base_delta(GroupedPunicaWrapperCPU) == 0.0


def test_the_stock_wrapper_leaks_an_adapter_into_a_base_token() -> None:
    assert base_delta(PunicaWrapperCPU) > 1.0, "vLLM repaired its CPU kernels: ours may no longer be needed"


@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("slices", [(VOCABULARY,), QKV, (80, 80)], ids=["plain", "qkv", "gate_up"])
def test_a_linear_layer_agrees_with_the_token_by_token_reference(
    ids: list[int], slices: tuple[int, ...]
) -> None:
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights(slices), inputs(len(ids))
    step(wrapper, ids)
    before = inputs(len(ids), sum(slices)).roll(1, 0)
    y = before.clone()
    wrapper.add_lora_linear(y, x, a, b, 1.0, slices)
    assert_close(y, before.float() + reference(x, ids, a, b))
    untouched = [row for row, adapter in enumerate(ids) if adapter == BASE]
    assert torch.equal(y[untouched], before[untouched])


@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES.keys())
def test_shrink_then_expand_agrees_with_the_reference_at_an_offset(ids: list[int]) -> None:
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights(QKV), inputs(len(ids))
    step(wrapper, ids)
    buffer = torch.zeros(len(QKV), len(ids), RANK)
    y = torch.zeros(len(ids), 5 + sum(QKV), dtype=torch.bfloat16)
    wrapper.add_shrink(buffer, x, a, 0.5)
    wrapper.add_expand(y, buffer, b, QKV, offset_start=5, add_input=True)
    assert_close(y[:, 5:], 0.5 * reference(x, ids, a, b))
    assert torch.equal(y[:, :5], torch.zeros_like(y[:, :5]))


def test_a_scale_and_a_buffer_are_honoured() -> None:
    ids = [2, BASE, 1]
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights((WIDTH,)), inputs(3)
    step(wrapper, ids)
    with_buffer, without = torch.zeros(2, 3, WIDTH, dtype=torch.bfloat16)
    buffer = torch.zeros(3, RANK)
    wrapper.add_lora_linear(with_buffer, x, a, b, 2.0, (WIDTH,), buffer=(buffer,))
    wrapper.add_lora_linear(without, x, a, b, 2.0, (WIDTH,))
    assert_close(without, 2.0 * reference(x, ids, a, b))
    assert_close(with_buffer, without.float())
    assert_close(buffer[0], 2.0 * a[0][1, 0].float() @ x[0].float())


def test_overwriting_leaves_the_rows_of_the_base_model_alone() -> None:
    ids = [2, BASE, 1]
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights((WIDTH,)), inputs(3)
    step(wrapper, ids)
    y = torch.full((3, WIDTH), 7.0, dtype=torch.bfloat16)
    wrapper.add_lora_linear(y, x, a, b, 1.0, (WIDTH,), add_inputs=False)
    expected = reference(x, ids, a, b)
    expected[1] = 7.0
    assert_close(y, expected)


@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES.keys())
def test_an_embedding_layer_agrees_with_the_reference(ids: list[int]) -> None:
    wrapper, (_, b) = wrapper_of(GroupedPunicaWrapperCPU), weights((WIDTH,))
    step(wrapper, ids)
    low = inputs(len(ids), RANK)
    y = torch.zeros(len(ids), WIDTH, dtype=torch.bfloat16)
    wrapper.add_lora_embedding(y, low, b[0], add_input=True)
    eye = torch.eye(RANK).expand(SLOTS, 1, RANK, RANK)
    assert_close(y, reference(low, ids, [eye], b))


@pytest.mark.parametrize("sampled", [[1, BASE, 3], [2, 2], [BASE, 4, 1, 2, 1]])
def test_logits_follow_the_sampled_positions_and_not_the_tokens(sampled: list[int]) -> None:
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights((VOCABULARY,)), inputs(len(sampled))
    step(wrapper, [number for number in sampled for _ in range(3)], sampled)
    y = torch.zeros(len(sampled), VOCABULARY + 8)  # fp32 logits, padded
    wrapper.add_lora_logits(y, x, a[0], b[0], 1.0)
    assert_close(y[:, :VOCABULARY], reference(x, sampled, a, b))
    assert torch.equal(y[:, VOCABULARY:], torch.zeros(len(sampled), 8))


def test_logits_of_other_rows_than_the_sampled_never_get_a_neighbours_adapter() -> None:
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights((VOCABULARY,)), inputs(6)
    step(wrapper, [1, 1, 2], [1, 2])
    y = torch.zeros(6, VOCABULARY)
    wrapper.add_lora_logits(y, x, a[0], b[0], 1.0)
    assert torch.equal(y, torch.zeros(6, VOCABULARY))
    step(wrapper, [2] * 6, [2])
    wrapper.add_lora_logits(y, x, a[0], b[0], 1.0)
    assert_close(y, reference(x, [2] * 6, a, b))


@pytest.mark.parametrize(("rows", "ids"), [(9, [1, BASE, 2]), (9, [3] * 5), (2, [1, BASE, 2]), (4, [3] * 9)])
def test_padded_rows_get_nothing_and_missing_rows_do_no_harm(rows: int, ids: list[int]) -> None:
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights(QKV), inputs(rows)
    step(wrapper, ids)
    y = torch.zeros(rows, sum(QKV), dtype=torch.bfloat16)
    wrapper.add_lora_linear(y, x, a, b, 1.0, QKV)
    padded = (ids + [BASE] * rows)[:rows]
    assert_close(y, reference(x, padded, a, b))
    assert not y[len(ids) :].any()


def test_the_next_step_forgets_the_one_before() -> None:
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights(QKV), inputs(4)
    for ids in ([1, 2, 3, 4], [BASE] * 4, [4, 4, BASE, 1], [2] * 4):
        step(wrapper, ids)
        y = torch.zeros(4, sum(QKV), dtype=torch.bfloat16)
        wrapper.add_lora_linear(y, x, a, b, 1.0, QKV)
        assert_close(y, reference(x, ids, a, b))


def test_a_full_classification_head_serves_only_the_rows_of_its_adapter() -> None:
    wrapper, x, labels = wrapper_of(GroupedPunicaWrapperCPU), inputs(3), 5
    step(wrapper, [2, BASE, 1])
    weight = torch.randn(SLOTS, 1, labels, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
    bias = torch.ones(SLOTS, labels).bfloat16()
    y = torch.full((3, labels), 9.0, dtype=torch.bfloat16)
    wrapper.apply_lora_full_linear(y, x, weight, bias, torch.tensor([False, True, False, False]))
    assert_close(y[0], weight[1, 0].float() @ x[0].float() + 1.0)
    assert torch.equal(y[1:], torch.full((2, labels), 9.0, dtype=torch.bfloat16))


def test_mixed_types_are_computed_in_the_wider_one() -> None:
    ids = [1, BASE, 2]
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights(QKV), inputs(3).float()
    step(wrapper, ids)
    y = torch.zeros(3, sum(QKV))
    wrapper.add_lora_linear(y, x, a, b, 1.0, QKV)
    torch.testing.assert_close(y.double(), reference(x, ids, a, b), rtol=1e-5, atol=1e-5)


def test_a_batched_input_of_three_dimensions_is_folded() -> None:
    ids = [1, 2, BASE, 3]
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights(QKV), inputs(4)
    step(wrapper, ids)
    y = torch.zeros(1, 4, sum(QKV), dtype=torch.bfloat16)
    wrapper.add_lora_linear(y, x.unsqueeze(0), a, b, 1.0, QKV)
    assert_close(y[0], reference(x, ids, a, b))


def test_the_plan_spends_no_product_on_base_tokens_and_one_on_a_crowd_of_small_adapters() -> None:
    assert plan([-1] * 12) == ()
    assert plan([]) == ()
    assert plan([2] * 30) == (OneAdapter(2, slice(0, 30)),)
    assert plan([-1, 5]) == (OneAdapter(5, slice(1, 2)),)
    (decode,) = plan([0, 1, 2, 3])
    assert decode == FewRowsEach(slice(0, 4), 1, slice(0, 4), slice(0, 4), slice(0, 4))
    assert [type(product) for product in plan([0, 1] + [2] * 20)] == [OneAdapter, FewRowsEach]


def test_the_chosen_kernel_computes_what_it_fits(kernel: Kernel | None) -> None:
    wrapper, (a, b) = wrapper_of(GroupedPunicaWrapperCPU), weights(QKV)
    step(wrapper, [1, 2])
    wrapper.add_lora_linear(torch.zeros(2, sum(QKV)).bfloat16(), inputs(2), a, b, 1.0, QKV)
    fused = [layer for _, layer in wrapper._fused.values()]
    assert [type(layer) for layer in fused] == ([Fused] if kernel else [])


def test_each_variable_brings_the_instruction_set_that_it_names(
    request: pytest.FixtureRequest, kernel: Kernel | None
) -> None:
    asked = request.node.callspec.params["kernel"]
    assert (kernel.isa if kernel else "torch") == asked


@pytest.mark.parametrize("rank", [8, 24, 64])
@pytest.mark.parametrize(
    ("width", "outs"), [(64, (48,)), (50, (33, 7)), (31, (1,)), (15, (9, 264)), (896, (300, 128, 128))]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 13])
def test_every_rank_width_and_number_of_rows_agrees_with_the_reference(
    rank: int, width: int, outs: tuple[int, ...], rows: int
) -> None:
    random = torch.Generator().manual_seed(rank + width + rows)
    a = tuple((torch.randn(SLOTS, 1, rank, width, generator=random) / 8).bfloat16() for _ in outs)
    b = tuple((torch.randn(SLOTS, 1, out, rank, generator=random) / 8).bfloat16() for out in outs)
    ids = [2] * rows + [BASE] + [4] * (rows // 2)
    wrapper, total = wrapper_of(GroupedPunicaWrapperCPU), sum(outs)
    step(wrapper, ids)
    x = inputs(len(ids), width + 5)[:, 2 : 2 + width]  # rows further apart than they are wide
    around = torch.full((len(ids) + 2, total + 4), 5.0).bfloat16()
    wrapper.add_lora_linear(around[1:-1, 1 : 1 + total], x, a, b, 0.5, outs)
    expected = torch.full((len(ids) + 2, total + 4), 5.0, dtype=torch.float64)
    expected[1:-1, 1 : 1 + total] += 0.5 * reference(x, ids, a, b)
    torch.testing.assert_close(around.double(), expected, rtol=0.02, atol=0.04)
    rim = expected == 5.0
    assert torch.equal(around[rim], torch.full_like(around[rim], 5.0))


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_sums_are_kept_in_float32_and_rounded_once(compiled: Kernel, rank: int, rows: int) -> None:
    wrapper, width, out = wrapper_of(GroupedPunicaWrapperCPU), 70, 83
    random = torch.Generator().manual_seed(rows)
    step(wrapper, [1] * rows)
    a, b = torch.zeros(SLOTS, 1, rank, width), torch.zeros(SLOTS, 1, out, rank)
    a[0, 0, 5, 67] = 1.0  # the low-rank value is one input, unrounded
    b[0, 0, :, 5] = 2.0 ** -torch.randint(
        6, 12, (out,), generator=random
    )  # many sums lie halfway between two values
    x, before = torch.zeros(rows, width).bfloat16(), torch.randn(rows, out, generator=random).bfloat16()
    x[:, 67] = torch.tensor([1.0, -1.0, 3.0]).repeat(3)[:rows].bfloat16()
    y = before.clone()
    wrapper.add_lora_linear(y, x, (a.bfloat16(),), (b.bfloat16(),), 1.0, (out,))
    assert torch.equal(y, (before.float() + x[:, 67:68].float() * b[0, 0, :, 5]).bfloat16())


def test_infinities_and_values_that_are_no_number_keep_their_places(compiled: Kernel) -> None:
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights(QKV), inputs(2)
    step(wrapper, [1, 2])
    y = torch.zeros(2, sum(QKV)).bfloat16()
    strange = torch.tensor([0x7FFF, -1, 0x7F80, -0x80, 0x7FC0, 0x7F81], dtype=torch.int16).view(torch.bfloat16)
    y[0, 30:36] = strange
    wrapper.add_lora_linear(y, x, a, b, 1.0, QKV)
    expected = reference(x, [1, 2], a, b)
    expected[0, 30:36] = strange.double()
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.15, equal_nan=True)


@pytest.fixture
def layer(compiled: Kernel) -> Iterator[tuple[Fused, torch.Tensor]]:
    """A layer of 64 to 80 with 4 slots, and an output of 3 rows that must be as it was after the test."""
    y = torch.full((3, sum(QKV)), 7.0).bfloat16()
    yield Fused(compiled, *weights(QKV)), y
    assert torch.equal(y, torch.full_like(y, 7.0))


def planned(compiled: Kernel, *slots: int) -> object:
    return compiled.plan(torch.tensor(slots))


def test_rows_past_the_tensors_are_refused(compiled: Kernel, layer: tuple[Fused, torch.Tensor]) -> None:
    fused, y = layer
    with pytest.raises(ValueError, match="found x of 4 rows and y of 3, expected more than 3"):
        fused.add(planned(compiled, 0, 0, 0, 1), y, inputs(4), 1.0)
    with pytest.raises(ValueError, match="found x of 2 rows and y of 3, expected more than 2"):
        fused.add(planned(compiled, -1, -1, 0), y, inputs(2), 1.0)


def test_other_widths_than_the_layers_are_refused(compiled: Kernel, layer: tuple[Fused, torch.Tensor]) -> None:
    fused, y = layer
    with pytest.raises(ValueError, match="found x of width 63 and y of width 80, expected 64 and 80"):
        fused.add(planned(compiled, 0), y, inputs(3, 63), 1.0)
    with pytest.raises(ValueError, match="found x of width 64 and y of width 79, expected 64 and 80"):
        fused.add(planned(compiled, 0), y[:, 1:], inputs(3), 1.0)


def test_a_slot_past_the_layers_is_refused(compiled: Kernel, layer: tuple[Fused, torch.Tensor]) -> None:
    fused, y = layer
    with pytest.raises(ValueError, match="found a plan for slot 4, expected less than the module's 4"):
        fused.add(planned(compiled, 0, 4), y, inputs(3), 1.0)


def test_an_unknown_instruction_set_is_refused(compiled: Kernel) -> None:
    slots = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="found 'mmx', expected one of"):
        compiled.module.plan("mmx", slots.data_ptr(), 1)


@pytest.mark.parametrize("rank", [4, 12, 520])
def test_a_rank_that_no_kernel_computes_is_refused(compiled: Kernel, rank: int) -> None:
    a, b = torch.zeros(1, 1, rank, 8).bfloat16(), torch.zeros(1, 1, 8, rank).bfloat16()
    assert not Fused.fits((a,), (b,), (8,))
    with pytest.raises(ValueError, match=f"found 1 slices of rank {rank}, expected 1 to 4 of a multiple of 8"):
        Fused(compiled, (a,), (b,))


def test_threads_that_share_a_layer_and_a_plan_do_not_disturb_each_other(compiled: Kernel) -> None:
    fused, shared = Fused(compiled, *weights(QKV)), planned(compiled, 0, 1, 2, 3, 0)
    scales = [0.25, 0.5, 1.0, 2.0]
    found = [torch.zeros(5, sum(QKV)).bfloat16() for _ in scales]

    def work(y: torch.Tensor, scale: float) -> None:
        for _ in range(200):
            fused.add(shared, y.zero_(), inputs(5), scale)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(found, scales, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y, scale in zip(found, scales, strict=True):
        assert_close(y, scale * reference(inputs(5), [1, 2, 3, 4, 1], *weights(QKV)))


def test_what_is_written_into_a_slot_is_served_at_once_and_what_is_taken_out_is_not() -> None:
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights(QKV), inputs(2)
    for part in a:
        part[2] = 0  # as vLLM leaves a slot whose adapter has no such module
    kept = [part[2].clone() for part in weights(QKV)[0]]
    step(wrapper, [3, 1])

    def served() -> torch.Tensor:
        y = torch.zeros(2, sum(QKV), dtype=torch.bfloat16)
        wrapper.add_lora_linear(y, x, a, b, 1.0, QKV)
        return y

    assert not served()[0].any()
    with torch.inference_mode():
        for part, values in zip(a, kept, strict=True):
            part[2, :, :, :] = values
    assert_close(served(), reference(x, [3, 1], a, b))
    assert served()[0].any()
    a[0][2] = 0
    found = served()
    assert not found[0, : QKV[0]].any()
    assert_close(found, reference(x, [3, 1], a, b))


def test_a_value_that_is_no_number_stays_with_its_own_adapter() -> None:
    wrapper, (a, b), x = wrapper_of(GroupedPunicaWrapperCPU), weights(QKV), inputs(3)
    a[0][0] = float("nan")
    step(wrapper, [1, 2, BASE])
    y = torch.zeros(3, sum(QKV), dtype=torch.bfloat16)
    wrapper.add_lora_linear(y, x, a, b, 1.0, QKV)
    assert y[0].isnan().any()
    assert not y[1:].isnan().any()


def test_the_compiled_kernel_and_torch_agree_on_mixed_batches(
    compiled: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, b), found, expected = weights(QKV), {}, {}
    for results, name in ((found, compiled.isa.value), (expected, "torch")):
        choose(name, monkeypatch)
        wrapper = wrapper_of(GroupedPunicaWrapperCPU)
        for batch, ids in BATCHES.items():
            step(wrapper, ids)
            y = results[batch] = torch.zeros(len(ids), sum(QKV), dtype=torch.bfloat16)
            wrapper.add_lora_linear(y, inputs(len(ids)), a, b, 1.0, QKV)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("spoilt", ["three slices of four", "rank 4", "a float32 slot", "strided"])
def test_a_layer_that_the_kernel_does_not_fit_is_left_to_torch(spoilt: str) -> None:
    a, b = weights(QKV)
    assert Fused.fits(a, b, QKV)
    if spoilt == "three slices of four":
        assert not Fused.fits(a, b, (*QKV, 4))
    elif spoilt == "rank 4":
        assert not Fused.fits([p[:, :, :4].contiguous() for p in a], [p[..., :4].contiguous() for p in b], QKV)
    elif spoilt == "a float32 slot":
        assert not Fused.fits((a[0].float(), *a[1:]), b, QKV)
    else:
        assert not Fused.fits((a[0][:, :, :, ::2], *a[1:]), b, QKV)
