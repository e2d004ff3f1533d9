"""What a model's token ids mean: whether two models mean the same by them, and which of them spell a text.

Log-probabilities travel as token ids; between models of different vocabularies they would train on noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soma_vllm.models.quiet import quiet

CHARACTER_TOKENS = 4
"""Most tokens of one character cut short, or of one and the end of turn: UTF-8 takes at most four bytes."""


class Vocabulary:
    """The tokenizer of a model's folder, as far as ids and their meaning go."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def digest(self) -> str:
        """SHA-256 over the (token, id) pairs, added tokens included, sorted; in hex."""
        digest = hashlib.sha256()
        for token, number in sorted(self._tokenizer.get_vocab().items()):
            digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def spelt(self, tokens: Sequence[int], text: str) -> int | None:
        """How many of an answer's tokens, from the first, spell its text; None where they do not.

        They are fewer than all where generation ended inside a character, which an engine does not show.
        """
        for count in range(len(tokens), max(0, len(tokens) - CHARACTER_TOKENS), -1):
            said = self._tokenizer.decode(
                list(tokens[:count]), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if said.strip() == text.strip():
                return count
        return None


def read_vocabulary(model: Path) -> Vocabulary | None:
    """The vocabulary of a model's folder; None where it holds no tokenizer that can be read."""
    with quiet():
        from transformers import AutoTokenizer

        try:
            return Vocabulary(AutoTokenizer.from_pretrained(str(model), local_files_only=True))
        except (OSError, ValueError):
            return None
