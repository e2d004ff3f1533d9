"""The signature of an adapter: of the adapter in the model, on a text of nobody's."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from soma_vllm.config import Lora, Mining
from soma_vllm.method.finetune import attached
from soma_vllm.method.recipe import Surrogate, adapt
from soma_vllm.method.signature import TEXTS, shift, signature_of
from soma_vllm.types import Example, Signature

LORA = Lora(rank=4, alpha=8, dropout=0.0, steps=10, lr=2e-2)
Turns = tuple[Example, ...]


def reading(model: object, tokens: tuple[int, ...]) -> torch.Tensor:
    """Log-probability of each token but the first, by the model's own forward pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1].float()
    return torch.log_softmax(logits, 1).gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)


def test_it_tells_what_the_saved_adapter_does(
    surrogate: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    made = adapt(surrogate, examples, held_out, Mining(enabled=False), LORA, seed=0, out_dir=tmp_path)
    signature = made.signature
    assert signature is not None
    assert signature.plain == pytest.approx(reading(surrogate.model, signature.tokens).tolist(), abs=1e-3)
    served = PeftModel.from_pretrained(surrogate.model, tmp_path).eval()
    assert signature.adapted == pytest.approx(reading(served, signature.tokens).tolist(), abs=1e-3)
    assert shift(signature) > 0.01
    text = surrogate.tokenizer.decode(signature.tokens)
    assert any(answer in text for _, answer in TEXTS)
    assert not any(example.answer in text for example in (*examples, *held_out))
    assert json.loads(json.dumps(asdict(signature)))["plain"] == list(signature.plain)


def test_of_an_adapter_that_does_nothing_both_sides_are_equal_and_the_model_is_left_as_it_was(
    qwen: Surrogate,
) -> None:
    before = {name: weight.clone() for name, weight in qwen.model.named_parameters()}
    with attached(qwen.decoder, LORA, 0) as peft:
        signature = signature_of(qwen.decoder, qwen.tokenizer, peft)
        assert signature.plain == signature.adapted
        assert shift(signature) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in qwen.model.named_parameters())


def test_what_is_no_number_counts_as_the_largest_change() -> None:
    nan = Signature((1, 2), (-1.0,), (float("nan"),))
    assert shift(nan) == float("inf")
    assert shift(replace(nan, adapted=(-3.0,))) == 4.0
