"""Tiny random models in the architectures that LLMLingua-2 and RouteLLM load: what they say is noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
)

from soma_vllm.models.quiet import quiet
from soma_vllm.models.tiny import read_texts

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def make_compressor(folder: Path) -> Path:
    """An XLM-R token classifier with two labels; its name tells the package which tokenizer it has."""
    return _made(folder / "tiny-llmlingua-2-xlm-roberta-large", XLMRobertaForTokenClassification, 2)


def make_router(folder: Path) -> Path:
    """An XLM-R sequence classifier with three labels, as RouteLLM's `bert` router is."""
    return _made(folder / "tiny-routellm-bert", XLMRobertaForSequenceClassification, 3)


def _made(folder: Path, architecture: Any, labels: int) -> Path:
    tokenizer = _tokenizer()
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=514,
        num_labels=labels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = architecture(config).eval()
        with torch.no_grad():
            model.roberta.embeddings.word_embeddings.weight.mul_(50.0)
            if labels == 3:  # so that queries differ in their scores
                model.classifier.out_proj.weight.mul_(100.0)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1024, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(read_texts(), trainer)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=512,
    )
