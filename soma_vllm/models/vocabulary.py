"""Whether two models mean the same by a token's id.

Log-probabilities travel as token ids; between models of different vocabularies they would teach noise.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from soma_vllm.models.quiet import quiet


def vocabulary_digest(model: Path) -> str | None:
    """SHA-256 over the (token, id) pairs of a model folder's tokenizer, added tokens included, sorted.

    Returns:
        The digest in hex, or None where the folder holds no tokenizer that can be read.
    """
    with quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        except (OSError, ValueError):
            return None
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
