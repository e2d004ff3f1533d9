"""Shapes of public models, with random weights: real for every time and ratio, silent on quality."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    # name: hidden, inner, layers, heads, kv heads, vocabulary, tied
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "tiny": (64, 128, 2, 2, 1, 2048, True),
    "tiny-large": (96, 192, 2, 3, 1, 2048, True),
}
LAYERS = {
    "0.5b": {
        "qkv": (896, (896, 128, 128)),
        "o": (896, (896,)),
        "gate_up": (896, (4864, 4864)),
        "down": (4864, (896,)),
    },
    "1.5b": {"o": (1536, (1536,)), "down": (8960, (1536,))},
    "8b": {
        "qkv": (4096, (4096, 1024, 1024)),
        "o": (4096, (4096,)),
        "gate_up": (4096, (12288, 12288)),
        "down": (12288, (4096,)),
    },
    "tiny": {"qkv": (64, (64, 32, 32)), "o": (64, (64,)), "gate_up": (64, (128, 128))},
}
"""A decoder layer's products as vLLM merges them: inputs, outputs of each slice. 1.5b: those of one slice."""

MAX_POSITIONS = 32768
SEED = 20260
TRAINED = 8192
"""Vocabulary learnt from the project's dialogues; ids beyond it are filler that is rarely sampled."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE of `texts` with the project's ChatML, filled up to `vocabulary` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from soma_vllm.models.tiny import CHATML, END, PAD, START

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(TRAINED, vocabulary),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    document = json.loads(core.to_str())
    known = document["model"]["vocab"]
    number = 0
    while len(known) < vocabulary:
        word, rest = "Ġ", number
        for letters in ("bdfgklmnprstvz", "aeiou") * 4:
            rest, at = divmod(rest, len(letters))
            word += letters[at]
        known.setdefault(word, len(known))
        number += 1
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHATML,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(name: str, device: str, tokenizer: Any = None) -> Any:
    """A frozen bf16 model of the shape `name`, seeded. Layers outweigh the embedding, so that answers depend on
    the whole prompt.
    """
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[name]
    end = [] if tokenizer is None else [tokenizer.eos_token_id, tokenizer.pad_token_id]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=end[0] if end else None,
        pad_token_id=end[1] if end else None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device=device).manual_seed(SEED + sum(map(ord, name)))
    for part, weight in model.named_parameters():
        if "embed_tokens" in part or "lm_head" in part:
            weight.normal_(0.0, 0.1, generator=generator)
            weight[min(TRAINED, vocabulary) :] *= 0.05
            if end:
                weight[end] *= 0.25
        elif weight.ndim == 2:
            gain = 2.0 if "q_proj" in part or "k_proj" in part else 1.0
            weight.normal_(0.0, gain / weight.shape[1] ** 0.5, generator=generator)
    if end:
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end[1])
    return model


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both; `folder` holds all of it or does not exist."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_adapter(model_folder: Path, folder: Path, rank: int, seed: int) -> None:
    """A random adapter of all layers in peft's format, with changes that are small beside the weights."""
    from safetensors.torch import save_file

    of = json.loads((model_folder / "config.json").read_text())
    hidden, inner = of["hidden_size"], of["intermediate_size"]
    kv = hidden // of["num_attention_heads"] * of["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(of["num_hidden_layers"]):
        for part, (width, out) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{part}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.bfloat16() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_folder),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
