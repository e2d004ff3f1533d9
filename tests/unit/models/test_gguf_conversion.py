"""A GGUF file becomes an ordinary bf16 folder. The file is written here, with the gguf package."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from soma_vllm.errors import ModelError

WIDTH, LAYERS, HEADS, FEED, VOCABULARY = 64, 1, 2, 128, 300
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(path: Path, output_noise: float, template: str | None = TEMPLATE) -> dict[str, np.ndarray]:
    """A one-layer qwen2 in Q8_0, whose output matrix is the embedding plus noise; its matrices."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("A title that is no repository")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    add_tokenizer(writer, template)
    embedding = random.normal(0, 0.1, (VOCABULARY, WIDTH)).astype(np.float32)
    noise = random.normal(0, output_noise, embedding.shape).astype(np.float32)
    half = WIDTH // HEADS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (half, WIDTH), "attn_v": (half, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH)}
    shapes["ffn_down"] = (WIDTH, FEED)
    matrices = {f"blk.0.{name}.weight": random.normal(0, 0.1, shape) for name, shape in shapes.items()}
    matrices |= {"token_embd.weight": embedding, "output.weight": embedding + noise}
    for name, value in matrices.items():
        quantized = gguf.quantize(value.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name, size in (("attn_q", WIDTH), ("attn_k", half), ("attn_v", half)):
        writer.add_tensor(f"blk.0.{name}.bias", np.zeros(size, np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def add_tokenizer(writer: gguf.GGUFWriter, template: str | None) -> None:
    """Byte-level BPE with one merge: 256 bytes, three special tokens, padding."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "ab"]
    unused = [f"[PAD{number}]" for number in range(len(tokens), VOCABULARY)]
    kinds = [1] * 256 + [3] * 3 + [1] + [5] * len(unused)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(256)
    if template is not None:
        writer.add_chat_template(template)


def converted(tmp_path: Path, output_noise: float = 0.001) -> Path:
    from soma_vllm.models.gguf import convert

    write_gguf(tmp_path / "toy.gguf", output_noise)
    convert(tmp_path / "toy.gguf", tmp_path / "folder")
    return tmp_path / "folder"


def test_the_folder_is_an_ordinary_bf16_model_with_its_tokenizer(tmp_path, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted(tmp_path)
    assert capfd.readouterr().err == ""

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    ends = json.loads((folder / "generation_config.json").read_text())
    assert ends["eos_token_id"] == [258, 256]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer(text, return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.input_ids.shape[1]


def test_two_roundings_of_one_embedding_are_tied_to_the_output_copy(tmp_path):
    from safetensors import safe_open

    folder = converted(tmp_path, output_noise=0.001)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    written = write_gguf(tmp_path / "again.gguf", 0.001)["output.weight"]
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118 - not a dict
        kept = tensors.get_tensor("model.embed_tokens.weight").float().numpy()
    np.testing.assert_allclose(kept, written, atol=0.004)


def test_an_output_matrix_of_its_own_stays_untied(tmp_path):
    folder = converted(tmp_path, output_noise=0.1)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_file_without_a_chat_template_is_refused(tmp_path):
    from soma_vllm.models.gguf import convert

    write_gguf(tmp_path / "toy.gguf", 0.001, template=None)
    with pytest.raises(ModelError, match="found no chat template"):
        convert(tmp_path / "toy.gguf", tmp_path / "folder")
