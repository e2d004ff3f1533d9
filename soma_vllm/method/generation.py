"""Greedy answers of the surrogate inside a trainer: for studies, where no engine is running.

Guarantees: what is generated is the model's own first choice at every step, whatever sampling its folder
recommends; equal inputs give equal answers on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from soma_vllm.method.decoder import Decoder
from soma_vllm.method.rendering import end_of_turn, prompt_ids
from soma_vllm.method.scoring import evaluating
from soma_vllm.types import Message

_ROWS = 16
"""Prompts in one batch."""


@torch.inference_mode()
def generate(
    decoder: Decoder, tokenizer: Any, prompts: Sequence[Sequence[Message]], max_new_tokens: int
) -> list[str]:
    """The answer to each list of messages, at most `max_new_tokens` long, in order.

    Raises:
        TrainingError: the chat template refuses a list of messages.
    """
    end = end_of_turn(tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    ids = [prompt_ids(tokenizer, messages) for messages in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    answers = [""] * len(ids)
    with evaluating(decoder):
        for start in range(0, len(order), _ROWS):
            rows = order[start : start + _ROWS]
            texts = _generate(decoder, tokenizer, [ids[row] for row in rows], end, greedy)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
    return answers


def _generate(
    decoder: Decoder, tokenizer: Any, rows: Sequence[Sequence[int]], pad: int, greedy: GenerationConfig
) -> list[str]:
    """One padded batch, padding on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=decoder.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=decoder.device)
    with _recommended(decoder, greedy):
        output = decoder.model.generate(input_ids=ids, attention_mask=mask)
    texts: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


@contextmanager
def _recommended(decoder: Decoder, config: GenerationConfig) -> Iterator[None]:
    """Use `config` instead of the folder's own, which would supply every setting that it lacks, such as a
    penalty."""
    own = decoder.model.generation_config
    decoder.model.generation_config = config
    try:
        yield
    finally:
        decoder.model.generation_config = own
