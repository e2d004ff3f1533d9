"""Unpack a quantized GGUF file into an ordinary bf16 safetensors folder.

Guarantees of a folder written here: `config.json` names the architecture and knows no quantization, so that
transformers, peft and vLLM load it as any other checkpoint; the tokenizer carries the file's own chat
template; `generation_config.json` lists every token that ends an answer.

Memory: the bf16 weights about twice plus the largest tensor in fp32, below 8 GB for 1.5 B parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from soma_vllm.errors import ModelError
from soma_vllm.models.quiet import quiet

if TYPE_CHECKING:
    import torch

SAME_MATRIX = 0.15
"""Relative distance below which two quantized matrices are taken for two roundings of one. 4- to 8-bit
roundings of one matrix lie below 0.1, independent matrices near 1.4."""

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Tokens that end an answer in the embedded families, where the vocabulary has them."""


def convert(gguf_file: Path, folder: Path) -> None:
    """Dequantize `gguf_file` and save model and tokenizer into `folder` (created if need be).

    Raises:
        ModelError: the file carries no chat template.
        OSError: reading or writing failed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet():
        where = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        if not tokenizer.chat_template:
            raise ModelError(f"{gguf_file.name}: found no chat template; expected one in its metadata")
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        _forget_quantization(model)
        _tie_embeddings(model)
        _set_ends(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _forget_quantization(model: Any) -> None:
    """The weights are plain now; a leftover entry would make every loader ask for the GGUF file again."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    # The file's internal title would pass for the name of a repository.
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path


def _tie_embeddings(model: Any) -> None:
    """Undo the split of a tied embedding.

    A GGUF may hold one tied matrix twice, rounded more finely for the output. Tying it again to the finer
    copy is nearer to the original weights and saves one matrix (0.27 GB at 0.5 B parameters).
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings or not _same_matrix(embedding.weight, output.weight):
        return
    embedding.weight = output.weight
    model.config.tie_word_embeddings = True
    model.tie_weights()


def _same_matrix(coarse: torch.Tensor, fine: torch.Tensor) -> bool:
    """Whether two [vocabulary, width] matrices are roundings of one, judged on evenly spaced rows."""
    if coarse.shape != fine.shape:
        return False
    stride = max(1, coarse.shape[0] // 4096)
    a, b = coarse[::stride].float(), fine[::stride].float()
    return bool((a - b).norm() <= SAME_MATRIX * b.norm())


def _set_ends(model: Any, tokenizer: Any) -> None:
    """Fill generation_config: GGUF metadata knows a single end token, chat models stop at two."""
    from transformers import GenerationConfig

    vocabulary = tokenizer.get_vocab()
    ends = [tokenizer.eos_token_id, *(vocabulary[token] for token in END_TOKENS if token in vocabulary)]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(ends)),
        pad_token_id=tokenizer.pad_token_id,
    )
