"""The surrogate in pieces, against the model's own forward pass; models that are something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.method_models import SHAPE, in_float64, tiny_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from soma_vllm.config import Lora
from soma_vllm.errors import ModelError
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.finetune import attached

DEPTH = 3
IDS = torch.tensor([[5, 80, 90, 100, 17, 3, 44]])


@pytest.fixture(params=["qwen2", "llama"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return Decoder(tiny_model(request.param, num_hidden_layers=DEPTH))


def in_pieces(decoder: Decoder, ids: torch.Tensor, cut: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    lower = decoder.run(decoder.embed(ids), mask, stop=cut) if cut else decoder.embed(ids)
    return decoder.logits(decoder.run(lower, mask, start=cut))


@pytest.mark.parametrize("cut", range(DEPTH))
@torch.no_grad()
def test_the_pieces_are_the_models_own_forward_pass_at_every_cut(decoder: Decoder, cut: int) -> None:
    assert torch.equal(in_pieces(decoder, IDS, cut), decoder.model(input_ids=IDS).logits)


@torch.no_grad()
def test_the_pieces_are_exact_in_bfloat16_too(decoder: Decoder) -> None:
    half = Decoder(decoder.model.to(torch.bfloat16))
    assert torch.equal(in_pieces(half, IDS, 1), half.model(input_ids=IDS).logits)


@pytest.mark.parametrize("cut", range(DEPTH))
@torch.no_grad()
def test_a_padded_batch_gives_each_row_what_it_gets_alone(decoder: Decoder, cut: int) -> None:
    rows = [[5, 80, 90, 100, 17], [9, 3], [250, 1, 1, 7]]
    ids, mask = torch.full((3, 5), 33), torch.zeros(3, 5, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    together = in_pieces(decoder, ids, cut, mask)
    for row, tokens in enumerate(rows):
        alone = decoder.model(input_ids=torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(together[row, : len(tokens)], alone, rtol=1e-4, atol=1e-4)


def lora_gradients(
    decoder: Decoder, lora: Lora, forward: Callable[[], torch.Tensor]
) -> dict[str, torch.Tensor]:
    with attached(decoder, lora, seed=0) as adapted:
        learning = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(5)
        for parameter in learning.values():  # B starts at 0, which would hide A's gradient
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        forward().square().mean().backward()
        return {name: p.grad.clone() for name, p in learning.items() if p.grad is not None}


@pytest.mark.parametrize("cut", range(DEPTH))
def test_gradients_above_a_cut_are_those_of_the_whole_model(decoder: Decoder, cut: int) -> None:
    double = Decoder(decoder.model.double())
    lora = Lora(rank=2, dropout=0.0, top_layers=DEPTH - cut)

    def through_the_cut() -> torch.Tensor:
        with torch.no_grad():
            lower = double.run(double.embed(IDS), stop=cut) if cut else double.embed(IDS)
        return double.logits(double.run(lower, start=cut))

    pieces = lora_gradients(double, lora, through_the_cut)
    whole = lora_gradients(double, lora, lambda: double.model(input_ids=IDS, use_cache=False).logits)
    assert len(whole) == 2 * 7 * (DEPTH - cut)
    assert pieces.keys() == whole.keys()
    for name, gradient in whole.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_gradient_by_what_enters_a_layer_is_right(architecture: str) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    decoder = Decoder(in_float64(tiny_model(architecture, **shape, vocab_size=20)))
    states = decoder.embed(IDS[:, :4] % 20).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0]])

    def value(x: torch.Tensor) -> torch.Tensor:
        return decoder.logits(decoder.run(x, mask, start=1)[0, :3])

    assert torch.autograd.gradcheck(value, (states,))


def test_nothing_is_changed_for_longer_than_a_call(decoder: Decoder) -> None:
    modules = {name: id(module) for name, module in decoder.model.named_modules()}
    decoder.run(decoder.embed(IDS), stop=1)
    with pytest.raises(RuntimeError):
        decoder.run(torch.zeros(1, 2, 5), start=1)  # states of another width
    assert modules == {name: id(module) for name, module in decoder.model.named_modules()}


def test_a_layers_weights_are_counted_without_its_adapter(decoder: Decoder) -> None:
    expected = sum(weight.numel() for weight in decoder.model.model.layers[0].parameters())
    assert decoder.layer_parameters() == expected
    with attached(decoder, Lora(rank=2), seed=0):
        assert decoder.layer_parameters() == expected


SMALL = {**SHAPE, "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16}


def two_percent_more() -> Any:
    """A Qwen2 whose forward pass does a little more than its parts."""
    model = tiny_model("qwen2")
    own = model.forward

    def forward(**inputs: Any) -> Any:
        output = own(**inputs)
        output.logits = 1.02 * output.logits
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)), "embed_tokens"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=4)), "layers of kinds"),
        (
            lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=True, max_window_layers=1)),
            "layers of kinds",
        ),
        (
            lambda: GraniteForCausalLM(GraniteConfig(**SMALL, embedding_multiplier=12.0)),
            "logits that differ by",
        ),
        (
            lambda: CohereForCausalLM(
                CohereConfig(**SMALL, logit_scale=0.0625, pad_token_id=0, bos_token_id=1, eos_token_id=2)
            ),
            "logits that differ by",
        ),
        (two_percent_more, "logits that differ by"),
    ],
    ids=["gpt2", "gemma2", "sliding windows", "granite", "cohere", "two percent more"],
)
def test_a_model_that_is_something_else_is_refused(make: Callable[[], Any], found: str) -> None:
    model = make().eval()
    with pytest.raises(ModelError, match=f"{type(model).__name__}: found .*{found}.*expected a model that is"):
        Decoder(model)


def test_a_model_that_computes_no_numbers_is_refused() -> None:
    model = tiny_model("llama")
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="found logits that differ by nan"):
        Decoder(model)
