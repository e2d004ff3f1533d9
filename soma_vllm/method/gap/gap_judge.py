"""The port of the gate's judges, and the one that a configuration asks for.

Guarantees of every judge: a pair's gap depends neither on the order of its two texts nor on other pairs; the
same text twice has the gap 0; no text makes it raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from soma_vllm.config import Config
from soma_vllm.method.gap.facts_judge import FactsJudge, TokenVectors
from soma_vllm.sessions.state.gate import gap
from soma_vllm.types import Gap

Pair = tuple[str, str]
"""Two answers to one query, in either order."""


class GapJudge(Protocol):
    """Tells how far two answers are apart; blocking, on one thread at a time."""

    def gaps(self, pairs: Sequence[Pair]) -> list[Gap]:
        """The gap of each pair, in order."""
        ...


class Encoder(TokenVectors, Protocol):
    """What judges ask of a sentence encoder (`method/encoder.py`)."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, shape (n, d); zeros for empty text."""
        ...


class EncoderJudge:
    """The encoder's cosine distance alone: it sees wording, not facts."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def gaps(self, pairs: Sequence[Pair]) -> list[Gap]:
        """The gap of each pair, in order."""
        if not pairs:
            return []
        vectors = self._encoder.encode([text for pair in pairs for text in pair])
        return [Gap(gap(vectors[n], vectors[n + 1])) for n in range(0, 2 * len(pairs), 2)]


def open_judge(config: Config, encoder: Encoder) -> GapJudge:
    """The judge that `config` asks for, beside an encoder that is loaded already.

    Raises:
        ModelError: `gate.judge_model` is no folder of a sequence classifier.
        ConfigError: the endpoint's key is not in the environment.
    """
    gate = config.gate
    if gate.gap == "cross_encoder":
        # Imported late: it brings torch.
        from soma_vllm.method.gap.cross_encoder import CrossEncoderJudge

        return CrossEncoderJudge(str(gate.judge_model), gate.encoder_max_tokens)
    if gate.gap == "llm":
        from soma_vllm.method.gap.llm_judge import LlmJudge

        return LlmJudge(
            str(gate.judge_url), str(gate.judge_model), gate.judge_api_key_env, gate.judge_timeout_s
        )
    return EncoderJudge(encoder) if gate.gap == "encoder" else FactsJudge(encoder)
