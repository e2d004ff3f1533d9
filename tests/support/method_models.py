"""Tiny random models of two real architectures, examples to teach them, and the slow way to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from soma_vllm.method.rendering import Rendered
from soma_vllm.types import Example

SHAPE = {
    "vocab_size": 272,  # a few rows more than the tokenizer has, as real models do
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def tiny_model(architecture: str, **shape: Any) -> Qwen2ForCausalLM | LlamaForCausalLM:
    torch.manual_seed(7)
    if architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, **shape}))
    else:
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": False, **shape}))
    return model.eval().requires_grad_(False)


class _PlainNorm(nn.Module):
    """RMSNorm without the detour over float32."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = own.weight, own.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = (
            self.weight * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon)
        )
        return normed


def in_float64(model: Any) -> Any:
    """The model in float64 throughout, for finite differences."""
    model = model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, _PlainNorm(module))
    return model


def ask(turn: int, question: str, answer: str) -> Example:
    return Example(turn=turn, messages=({"role": "user", "content": question},), answer=answer)


def dialogue(*exchanges: tuple[str, str]) -> tuple[Example, ...]:
    """A session's turns, each with the full history in its prompt."""
    turns: list[Example] = []
    history: list[dict[str, str]] = []
    for number, (question, answer) in enumerate(exchanges, start=1):
        history.append({"role": "user", "content": question})
        turns.append(Example(number, tuple(history), answer))
        history.append({"role": "assistant", "content": answer})
    return tuple(turns)


def read_alone(model: Any, turn: Rendered) -> torch.Tensor:
    """Logits (n, V) that predict a turn's answer, by the model's own forward pass over that turn alone."""
    whole = model(input_ids=torch.tensor([turn.prompt + turn.answer]), use_cache=False).logits[0]
    return whole[len(turn.prompt) - 1 : -1]


def with_teachers(turns: Sequence[Rendered], k: int = 6) -> tuple[Rendered, ...]:
    """The turns as if an original had shown its k likeliest tokens: random, the answer's token first."""
    generator = torch.Generator().manual_seed(11)
    taught = []
    for turn in turns:
        n = len(turn.answer)
        logits = 2 * torch.randn(n, 260, generator=generator)
        logits[torch.arange(n), torch.tensor(turn.answer)] += 8
        logprobs, top = torch.log_softmax(logits, dim=1).topk(k, dim=1)
        head = top.numpy().astype(np.int32), logprobs.numpy().astype(np.float32)
        taught.append(replace(turn, teacher=head))
    return tuple(taught)
