"""Tiny real models for the method: two architectures, random weights, a byte-level tokenizer with ChatML."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.method_models import ask, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from soma_vllm.method.decoder import Decoder
from soma_vllm.method.recipe import Surrogate
from soma_vllm.types import Example

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """All 256 bytes and four special tokens: 260 ids."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|pad|>", extra_special_tokens=[]
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@pytest.fixture(params=["qwen2", "llama"])
def surrogate(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Surrogate:
    return Surrogate(Decoder(tiny_model(request.param)), tokenizer)


@pytest.fixture
def qwen(tokenizer: PreTrainedTokenizerFast) -> Surrogate:
    return Surrogate(Decoder(tiny_model("qwen2")), tokenizer)


@pytest.fixture
def examples() -> tuple[Example, ...]:
    return (
        ask(1, "What is a crane?", "A bird, or a machine."),
        ask(2, "And a bat?", "A mammal, or a club."),
        ask(3, "And a seal?", "An animal that swims; or wax."),
    )


@pytest.fixture
def held_out() -> tuple[Example, ...]:
    return (ask(4, "And a jaguar?", "A cat, or a car."),)
