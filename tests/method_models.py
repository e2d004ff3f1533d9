"""Tiny random models of two real architectures, and examples to teach them."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

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


def tiny_model(architecture: str) -> Qwen2ForCausalLM | LlamaForCausalLM:
    torch.manual_seed(7)
    if architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    else:
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": False}))
    return model.eval().requires_grad_(False)


def ask(turn: int, question: str, answer: str) -> Example:
    return Example(turn=turn, messages=({"role": "user", "content": question},), answer=answer)
