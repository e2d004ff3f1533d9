"""A judge that reads both answers at once: a sequence classifier, such as an NLI or paraphrase model, from a
local folder.

Guarantees: equal texts, data and code are compared as by `facts`; symmetric, since both orders are read and the
less sure one counts; in [0, 1]; nothing is fetched. A pair beyond the model's length is cut at its end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from soma_vllm.errors import ModelError
from soma_vllm.method.gap.facts_judge import alike
from soma_vllm.types import Gap

_BATCH = 16
"""Pairs per forward pass."""
_SAME = re.compile(r"entail|paraphras|duplicate|equivalent|same")
_NEGATED = re.compile(r"\b(?:not|non)|unrelated|different")


class CrossEncoderJudge:
    """1 - the probability that two answers say the same; of an NLI head, that each entails the other."""

    def __init__(self, path: str | Path, max_tokens: int) -> None:
        """Load the classifier in `path`; a pair keeps `2 * max_tokens` tokens, or as many as the model takes.

        Raises:
            ModelError: no classifier lies there, or which of its labels means "the same" is unknown.
        """
        folder = Path(path).expanduser()
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            named = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
            if not named:
                raise ValueError(f"found {config.architectures or 'no architecture'}")
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: found no sequence classifier that can be loaded: {error}") from error
        self._model.eval().requires_grad_(False)
        self._same = _label(path, dict(config.id2label))
        # Position tables of the RoBERTa family are two longer than what they take.
        longest = getattr(config, "max_position_embeddings", 514) - 2
        self._max_tokens = min(2 * max_tokens, longest, self._tokenizer.model_max_length)

    def gaps(self, pairs: Sequence[tuple[str, str]]) -> list[Gap]:
        """The gap of each pair, in order."""
        found = [alike(*pair) for pair in pairs]
        open_pairs = [n for n, gap in enumerate(found) if gap is None]
        judged = {}
        for start in range(0, len(open_pairs), _BATCH):
            places = open_pairs[start : start + _BATCH]
            texts = [sorted(pairs[n]) for n in places]
            both = (self._probabilities(texts), self._probabilities([text[::-1] for text in texts]))
            for n, forth, back in zip(places, *both, strict=True):
                judged[n] = _gap(min(forth, back) if math.isfinite(forth + back) else math.nan)
        return [judged[n] if gap is None else gap for n, gap in enumerate(found)]

    @torch.inference_mode()
    def _probabilities(self, pairs: Sequence[Sequence[str]]) -> list[float]:
        batch = self._tokenizer(
            [list(pair) for pair in pairs],
            padding=True,
            truncation="longest_first",
            max_length=self._max_tokens,
            return_tensors="pt",
        )
        logits = self._model(**batch).logits
        found = torch.sigmoid(logits[:, 0]) if self._same is None else logits.softmax(dim=1)[:, self._same]
        return [float(value) for value in found]


def _gap(same: float) -> Gap:
    if math.isnan(same):  # which would pass as 0
        return Gap(1.0, failure="the classifier's output is no number")
    return Gap(min(1.0, max(0.0, 1.0 - same)))


def _label(path: str | Path, labels: dict[int, str]) -> int | None:
    """The output that means "the same"; None for a model with one output, whose sigmoid does.

    Raises:
        ModelError: the labels do not tell.
    """
    if len(labels) == 1:
        return None
    named = [
        number
        for number, name in labels.items()
        if _SAME.search(name.lower()) and not _NEGATED.search(name.lower().replace("_", " "))
    ]
    if len(named) == 1:
        return named[0]
    if not named and len(labels) == 2:  # paraphrase models without names: 1 is "equivalent"
        return 1
    raise ModelError(
        f"{path}: found the labels {', '.join(labels.values())}; expected one output, two, or one label that "
        "is called entailment, paraphrase, duplicate, equivalent or same"
    )
