"""Two models share their token ids when their tokenizers say so, added tokens included."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from soma_vllm.models.hub import folder_here
from soma_vllm.models.tiny import make_tiny
from soma_vllm.models.vocabulary import Vocabulary, read_vocabulary


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


def digest(folder: Path) -> str:
    vocabulary = read_vocabulary(folder)
    assert vocabulary is not None
    return vocabulary.digest()


def test_models_of_one_tokenizer_share_a_digest_and_an_added_token_ends_that(
    tiny: Path, tmp_path: Path
) -> None:
    assert digest(tiny / "tiny-original") == digest(tiny / "tiny-surrogate")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "tiny-surrogate")
    tokenizer.add_tokens(["a token of its own"])
    tokenizer.save_pretrained(tmp_path)
    assert digest(tmp_path) != digest(tiny / "tiny-surrogate")


def test_tokens_spell_their_text_but_for_a_character_that_was_cut(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "tiny-original")
    spelt = Vocabulary(tokenizer).spelt
    tokens = tokenizer("Grüße an alle 🙂", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens[:-1]).endswith("\ufffd")  # or nothing is cut here
    assert spelt(tokens, "Grüße an alle 🙂") == len(tokens)
    assert spelt([*tokens, tokenizer.eos_token_id], "Grüße an alle 🙂") == len(tokens) + 1
    found = spelt(tokens[:-1], "Grüße an alle")
    assert found is not None
    assert tokenizer.decode(tokens[:found]).strip() == "Grüße an alle"
    assert spelt(tokens, "Grüße") is None
    assert spelt([], "Grüße") is None


def test_a_folder_without_a_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None


def test_a_model_elsewhere_has_no_folder_here_and_nothing_is_fetched(tmp_path: Path) -> None:
    assert folder_here(str(tmp_path)) == tmp_path
    assert folder_here("some-org/some-model") is None
    assert folder_here("no such model") is None
