"""The gate's sentence encoder, on a tiny random BERT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.method_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from soma_vllm.errors import ModelError
from soma_vllm.method.encoder import SentenceEncoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "bird", "or", "machine", "that", "swims", "the", "sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **shape)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SentenceEncoder:
    return SentenceEncoder(folder, max_tokens=256, threads=1)


def test_a_vector_is_the_normalised_mean_over_the_texts_own_tokens(
    folder: Path, encoder: SentenceEncoder
) -> None:
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(torch.tensor([[2, 4, 5, 3]])).last_hidden_state[0]
    mean = states.mean(dim=0)
    # The longer neighbour pads this text; padding must not count.
    found = encoder.encode(["a bird", "the sea that swims or a machine or a bird"])[0]
    assert np.allclose(found, (mean / mean.norm()).numpy(), atol=1e-5)


def test_vectors_are_unit_float32_rows_in_the_order_of_the_texts(encoder: SentenceEncoder) -> None:
    texts = [" ".join(WORDS[4 : 5 + i % 8]) for i in range(70)]
    vectors = encoder.encode(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == (70, encoder.dimension)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    for i in (0, 13, 69):
        assert np.allclose(vectors[i], encoder.encode([texts[i]])[0], atol=1e-5)


def test_the_same_texts_give_the_same_bits(encoder: SentenceEncoder) -> None:
    texts = ["a bird", "the sea", ""]
    assert np.array_equal(encoder.encode(texts), encoder.encode(texts))


def test_empty_text_gives_the_zero_vector(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(["", "a bird", " \n"])
    assert not vectors[0].any()
    assert vectors[1].any()
    assert not vectors[2].any()
    assert encoder.encode([]).shape == (0, encoder.dimension)


def test_a_long_text_keeps_its_beginning(folder: Path) -> None:
    short = SentenceEncoder(folder, max_tokens=4, threads=1)
    vectors = short.encode(["a bird", "a bird or a machine"])
    assert np.allclose(vectors[0], vectors[1], atol=1e-6)


def test_a_text_beyond_the_models_positions_is_encoded_all_the_same(encoder: SentenceEncoder) -> None:
    assert np.isfinite(encoder.encode(["a bird " * 200])).all()


def test_a_generating_model_is_refused(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Qwen2ForCausalLM, a generating model"):
        SentenceEncoder(tmp_path, max_tokens=256, threads=1)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found no sentence encoder"):
        SentenceEncoder(tmp_path, max_tokens=256, threads=1)
