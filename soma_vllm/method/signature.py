"""What an adapter does to a fixed text: the numbers by which an engine that serves it can be checked.

Guarantees: the texts belong to no conversation, so the numbers may be kept as long as the adapter is; of a few
texts the one is taken on which the adapter changes most; the model is left as it was.
"""

from __future__ import annotations

from typing import Any

import torch

from soma_vllm.method.decoder import Decoder
from soma_vllm.method.scoring import evaluating
from soma_vllm.types import Signature

TEXTS = (
    (
        "Could you shorten this for me, please?",
        "Sure. Here is a shorter version: we will meet on Monday at ten, talk about the plan, and then decide "
        "what to do next. Let me know if you would like me to change the tone or add anything.",
    ),
    (
        "List the steps and answer as JSON.",
        '{"steps": [{"id": 1, "name": "read", "done": true}, {"id": 2, "name": "check", "done": false}], '
        '"total": 2}\n\n1. First, read the file.\n2. Then check the result:\n\n```python\nprint(total)\n```',
    ),
)
"""(query, answer): plain words, and the marks of structured answers."""

HEAD_ROWS = 16384
"""Rows of the output head that are in float32 at a time."""
DIGITS = 4
"""Decimals kept of a log-probability."""


def signature_of(decoder: Decoder, tokenizer: Any, peft: Any) -> Signature:
    """The signature of the adapter that is in the decoder's model; `peft` is peft's view of it."""
    with evaluating(decoder):
        found = [_read(decoder, ids, peft) for ids in _texts(tokenizer)]
    return max(found, key=shift)


def shift(signature: Signature) -> float:
    """Mean square change of a token's log-probability; infinite where it is not a number."""
    pairs = zip(signature.plain, signature.adapted, strict=True)
    mean = sum((b - a) ** 2 for a, b in pairs) / len(signature.plain)
    return mean if mean == mean else float("inf")


def _texts(tokenizer: Any) -> list[tuple[int, ...]]:
    found = []
    for query, answer in TEXTS:
        asked = [{"role": "user", "content": query}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        found.append(tuple(i for text in (prompt, answer) for i in _ids(tokenizer, text)))
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.inference_mode()
def _read(decoder: Decoder, ids: tuple[int, ...], peft: Any) -> Signature:
    adapted = _logprobs(decoder, ids)
    with peft.disable_adapter():
        plain = _logprobs(decoder, ids)
    return Signature(ids, plain, adapted)


def _logprobs(decoder: Decoder, ids: tuple[int, ...]) -> tuple[float, ...]:
    """Log-probability of each token but the first, nats.

    The output head runs in float32, whatever the model's own: 16-bit logits alone are off by some 0.04 nats.
    """
    read = torch.tensor([ids], device=decoder.device)
    states = decoder.run(decoder.embed(read))[0, :-1].float()
    head: torch.Tensor = decoder.model.get_output_embeddings().weight
    parts = [(states @ rows.float().T).logsumexp(dim=1) for rows in torch.split(head, HEAD_ROWS)]
    own = (states * head[read[0, 1:]].float()).sum(dim=1)
    found = own - torch.stack(parts).logsumexp(dim=0)
    return tuple(round(value, DIGITS) for value in found.tolist())
