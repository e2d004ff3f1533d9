"""Is an adapter served as it was trained? One short fixed text, read by trainer and engine, decides.

The trainer notes for each token of that text how likely the plain and the adapted surrogate find it. The engine
is asked for the same numbers, and the two *shifts*, adapted minus plain, are compared: most of what the two
sides round differently is in both of their terms and cancels, while a wrong scaling, a missing module, another
adapter or none at all changes the shift itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soma_vllm.errors import EngineUnavailable
from soma_vllm.types import Signature

ROUNDING = 0.08
"""Difference of the two shifts that 16-bit arithmetic alone explains, nats (root mean square). Measured for
adapters served as trained: 0.068 with Qwen2.5-Coder-0.5B, bfloat16 on both sides, and 0.039 with a tiny one."""
TOLERANCE = 0.25
"""Further difference that is accepted, as a share of the larger shift."""
SCALE = 0.3
"""Largest deviation from 1 of the served shift's size along the trained one, beyond three standard errors."""


@dataclass(frozen=True)
class Comparison:
    """Two shifts, in nats per token (root mean squares)."""

    tokens: int
    trained: float
    """The shift that the trainer saw."""
    served: float
    """The shift that the engine shows."""
    difference: float
    """Between the two."""
    slope: float
    """The served shift's size along the trained one: 1 where they are equal, 0 where nothing is served."""

    @property
    def agrees(self) -> bool:
        """Whether the engine serves what was trained, as far as rounding lets one see.

        An adapter whose whole effect drowns in rounding agrees with whatever does as little.
        """
        # Written so that a NaN does not agree.
        if not self.difference <= math.hypot(ROUNDING, TOLERANCE * max(self.trained, self.served)):
            return False
        if self.trained < 2 * ROUNDING:  # its own rounding would make any slope look flat
            return True
        error = ROUNDING / (self.trained * math.sqrt(self.tokens))
        return abs(self.slope - 1) <= SCALE + 3 * error

    def numbers(self) -> dict[str, float]:
        """For events and logs."""
        return {
            "trained_shift": round(self.trained, 4),
            "served_shift": round(self.served, 4),
            "difference": round(self.difference, 4),
            "slope": round(self.slope, 3),
        }


def compare(signature: Signature, plain: Sequence[float], adapted: Sequence[float]) -> Comparison:
    """What the trainer noted against what the engine says of the same tokens, plain and adapted."""
    trained = [b - a for a, b in zip(signature.plain, signature.adapted, strict=True)]
    served = [b - a for a, b in zip(plain, adapted, strict=True)]
    difference = [b - a for a, b in zip(trained, served, strict=True)]
    size = math.fsum(value * value for value in trained)
    along = math.fsum(a * b for a, b in zip(trained, served, strict=True))
    slope = along / size if size > 0 else 1.0
    return Comparison(len(trained), _rms(trained), _rms(served), _rms(difference), slope)


def reading_body(model: str, signature: Signature) -> dict[str, Any]:
    """The completion request that has an engine read the text; one token is generated and ignored."""
    return {
        "model": model,
        "prompt": list(signature.tokens),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
        "cache_salt": "soma-signature",
    }


def logprobs_read(body: Mapping[str, Any], signature: Signature) -> tuple[float, ...]:
    """Log-probability of each token of the text but the first, as the engine answered `reading_body`.

    Raises:
        EngineUnavailable: the answer does not hold them.
    """
    try:
        entries = body["choices"][0]["prompt_logprobs"][1:]
        found = tuple(_of(entry, token) for entry, token in zip(entries, signature.tokens[1:], strict=True))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineUnavailable("the engine gave no log-probabilities of a prompt") from error
    return found


def _of(entry: Mapping[Any, Any], token: int) -> float:
    """vLLM's entry of one position, by token id; an id is a string once it was JSON."""
    found = entry[token] if token in entry else entry[str(token)]
    return float(found["logprob"] if isinstance(found, Mapping) else found.logprob)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
