"""Two models share their token ids when their tokenizers say so, added tokens included."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from soma_vllm.models.hub import folder_here
from soma_vllm.models.tiny import make_tiny
from soma_vllm.models.vocabulary import vocabulary_digest


def test_models_of_one_tokenizer_share_a_digest_and_an_added_token_ends_that(tmp_path: Path) -> None:
    make_tiny(tmp_path, tmp_path / "no-dialogues")
    first, second = tmp_path / "tiny-original", tmp_path / "tiny-surrogate"
    digest = vocabulary_digest(first)
    assert digest is not None
    assert digest == vocabulary_digest(second)
    tokenizer = AutoTokenizer.from_pretrained(second)
    tokenizer.add_tokens(["a token of its own"])
    tokenizer.save_pretrained(second)
    assert vocabulary_digest(second) not in (None, digest)


def test_a_folder_without_a_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    assert vocabulary_digest(tmp_path) is None


def test_a_model_elsewhere_has_no_folder_here_and_nothing_is_fetched(tmp_path: Path) -> None:
    assert folder_here(str(tmp_path)) == tmp_path
    assert folder_here("some-org/some-model") is None
    assert folder_here("no such model") is None
