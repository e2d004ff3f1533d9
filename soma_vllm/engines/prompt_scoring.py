"""How a vLLM is asked to read an answer instead of giving one, and how its reply is read. Pure.

The prompt ends with the answer, its log-probabilities are asked for, and nothing is decoded but the one token
that vLLM cannot do without. vLLM reads such a prompt without its prefix cache: a log-probability needs a pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from soma_vllm.errors import EngineError
from soma_vllm.types import Agreement


def scoring_body(body: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """A chat request that makes a vLLM score `answer` as the reply to the chat request `body`."""
    return {
        **body,
        "messages": [*body["messages"], {"role": "assistant", "content": answer}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "prompt_logprobs": 1,
        "return_token_ids": True,
        "max_tokens": 1,
        "temperature": 0.0,
    }


def agreement_from_prompt(reply: Mapping[str, Any], opening: Sequence[int]) -> Agreement:
    """The agreement in a reply to `scoring_body`; `opening` are the tokens before the answer's first.

    Raises:
        EngineError: the reply holds no scores, or its prompt does not begin with `opening` (a template that
            opens an answer in another way when it continues one, or a first character that merges with it).
    """
    ids = reply.get("prompt_token_ids")
    scores = reply.get("prompt_logprobs")
    if not isinstance(ids, list) or not isinstance(scores, list) or len(ids) != len(scores):
        raise EngineError("found no prompt_logprobs for the answer's tokens; expected one entry for each")
    start = len(opening)
    if ids[:start] != list(opening):
        raise EngineError(
            f"found another prompt of {len(ids)} tokens; expected the {start} tokens that open an answer first"
        )
    if len(ids) == start:
        raise EngineError("found an answer without tokens; expected at least one")
    entries = [_entry(found, token) for found, token in zip(scores[start:], ids[start:], strict=True)]
    nll = -math.fsum(float(entry["logprob"]) for entry in entries) / len(entries)
    if not math.isfinite(nll):
        raise EngineError(f"found a mean NLL of {nll} over {len(entries)} tokens; expected a number")
    return Agreement(nll, sum(entry.get("rank") == 1 for entry in entries) / len(entries), len(entries))


def _entry(found: Any, token: int) -> Mapping[str, Any]:
    """The entry of the prompt's own token at one position; the others are the likeliest ones."""
    # JSON has no keys but text; in our own process they are still numbers.
    entry = found.get(str(token), found.get(token)) if isinstance(found, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("logprob"), int | float):
        raise EngineError("found no log-probability of one of the answer's tokens; expected one for each")
    return entry
