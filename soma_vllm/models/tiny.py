"""Tiny random models that load and generate like real ones: a pair of Qwen2 models and a sentence encoder.

They exist so that every path through real engines, real training and real adapters runs in seconds without a
download. Their answers are noise; what they guarantee is form: one tokenizer for both roles, ChatML, an end
token that is possible but rare, answers that depend on the prompt, and the same bytes of weights for the same
texts on every run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from soma_vllm.documents import read_json
from soma_vllm.errors import ModelError
from soma_vllm.models.catalog import TINY_NAMES
from soma_vllm.models.quiet import quiet

ORIGINAL, SURROGATE, ENCODER = TINY_NAMES
WIDTHS = {ORIGINAL: 96, SURROGATE: 64}
HEAD_WIDTH = 32
"""Smallest head that vLLM's attention on CPUs computes."""
VOCABULARY = 1024
MAX_POSITIONS = 4096
SEED = 20260

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXTS = Path(__file__).with_name("tiny_texts.json")
"""What the tokenizers learn from by default: an array of strings. A file of its own, because another text makes
other tokens, and with them other models."""


def make_tiny(target_dir: Path, dialogues: Path | None = None) -> tuple[Path, Path]:
    """Write `tiny-original`, `tiny-surrogate` and `tiny-encoder` into `target_dir`, replacing older ones.

    The Qwen2 models have 2 layers (width 96 and 64, heads of 32, one head of keys and values), tied
    embeddings, bf16, at most 4096 positions and one byte-level BPE vocabulary of at most 1024 tokens. The
    encoder is a 2-layer BertModel, width 32, fp32, with its own WordPiece vocabulary.

    Args:
        dialogues: folder of JSON files whose strings the tokenizers learn from instead of `TEXTS`; they do
            learn from `TEXTS` where there is no such file.

    Returns:
        (folder of the original, folder of the surrogate).

    Raises:
        ModelError: a file in `dialogues` is not JSON.
    """
    texts = read_texts(dialogues)
    target_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(target_dir / ".tiny.lock"):
        tokenizer = _chat_tokenizer(texts)
        for number, (name, width) in enumerate(WIDTHS.items()):
            model = _chat_model(tokenizer, width, SEED + number)
            _publish(target_dir / name, model, tokenizer)
        _publish(target_dir / ENCODER, *_encoder(texts))
    return target_dir / ORIGINAL, target_dir / SURROGATE


def read_texts(dialogues: Path | None = None) -> list[str]:
    """Every string in the folder's JSON files, in the order of their names; those of `TEXTS` if there is none.

    Raises:
        ModelError: a file is not JSON.
    """
    texts: list[str] = []
    for path in (dialogues and sorted(dialogues.glob("*.json"))) or [TEXTS]:
        try:
            texts.extend(_strings(read_json(path)))
        except ValueError as error:
            raise ModelError(f"{path}: expected JSON dialogues; {error}") from error
    return texts


def _strings(document: Any) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict):
        for value in document.values():
            yield from _strings(value)
    elif isinstance(document, list):
        for value in document:
            yield from _strings(value)


def _chat_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE with ChatML: any NFC text round-trips, however small the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHATML,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _chat_model(tokenizer: Any, width: int, seed: int) -> Any:
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // HEAD_WIDTH,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = _seeded(lambda: Qwen2ForCausalLM(config), seed)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    _widen(model, torch.Generator().manual_seed(seed))
    return model.to(torch.bfloat16)


def _widen(model: Any, generator: Any) -> None:
    """Redraw the weights so that layers outweigh the token embedding in the residual stream.

    At the usual scale the last token alone decides the next one, and every chat prompt ends in the same
    token. Embeddings of standard deviation 0.1 keep the logits near 1, so that no token is ever impossible;
    the end tokens' rows are shorter, so that they are sampled about once in 1000 tokens but rarely win.
    """
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.normal_(0.0, 0.1, generator=generator)
                weight[model.generation_config.eos_token_id] *= 0.25
            elif weight.ndim == 2:
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(0.0, gain / weight.shape[1] ** 0.5, generator=generator)


def _encoder(texts: list[str]) -> tuple[Any, Any]:
    """(BertModel, tokenizer). Words outweigh positions, so texts that share words lie near each other."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = _word_tokenizer(texts)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = _seeded(lambda: BertModel(config), SEED + len(WIDTHS))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(50.0)
    return model, tokenizer


def _word_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    # Special tokens get the first ids, in the trainer's order.
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    )


def _seeded(build: Callable[[], Any], seed: int) -> Any:
    """Build a model from `seed` without disturbing the caller's random state."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def _publish(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write next to the target, then rename it into place."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
