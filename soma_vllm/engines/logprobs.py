"""How a vLLM original shows its own distribution over an answer, and how that is read. Pure.

Guarantees: what `teaching_fields` asks for is what `teacher_from_logprobs` reads; a reply that does not hold it
is refused, never guessed at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from soma_vllm.errors import EngineError
from soma_vllm.types import Teacher

_TOKEN_ID = "token_id:"


def teaching_fields(top_logprobs: int) -> dict[str, Any]:
    """Fields of a chat request that make a vLLM show its `top_logprobs` likeliest tokens, by id.

    Text would not do: pieces of words and special tokens have none that names them. Empty for 0.
    """
    if top_logprobs == 0:
        return {}
    return {"logprobs": True, "top_logprobs": top_logprobs, "return_tokens_as_token_ids": True}


def teacher_from_logprobs(content: Sequence[Mapping[str, Any]]) -> Teacher:
    """The teacher in `choices[0].logprobs.content`; of a stream, the contents of all events in order.

    Rows are sorted, likeliest first: vLLM puts the sampled token first, whatever its rank.

    Raises:
        EngineError: a token is not given by its id, or there is none.
    """
    if not content:
        raise EngineError("found no log-probabilities in the original's answer; expected one entry per token")
    rows = [
        sorted(((_number(top), float(top["logprob"])) for top in entry["top_logprobs"]), key=_likelihood)
        for entry in content
    ]
    width = max(len(row) for row in rows)
    if width == 0:
        raise EngineError("found no top_logprobs in the original's answer; expected at least one per token")
    ids = np.full((len(rows), width), -1, dtype=np.int32)
    logprobs = np.full((len(rows), width), -math.inf, dtype=np.float32)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = [number for number, _ in row]
        logprobs[index, : len(row)] = [logprob for _, logprob in row]
    return Teacher(tuple(_number(entry) for entry in content), ids, logprobs)


def _likelihood(pair: tuple[int, float]) -> float:
    return -pair[1]


def _number(entry: Mapping[str, Any]) -> int:
    """The id in a token written "token_id:123"."""
    token = str(entry["token"])
    number = token.removeprefix(_TOKEN_ID)
    if number == token or not (number.isascii() and number.isdigit()):
        # The token itself is conversation text.
        raise EngineError(f"found a token given by its text; expected {_TOKEN_ID!r} and a number")
    return int(number)
