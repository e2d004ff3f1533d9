"""One adaptation, end to end on tiny models."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from method_models import ask, tiny_model
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from soma_vllm.config import Lora, Mining
from soma_vllm.errors import ModelError, TrainingError
from soma_vllm.method.recipe import Surrogate, adapt, load_surrogate, score_plain
from soma_vllm.method.rendering import render
from soma_vllm.method.scoring import score_rendered
from soma_vllm.types import Example

MINING = Mining(soft_len=2, n_candidates=2, iters=2)
LORA = Lora(rank=4, alpha=8, steps=4, lr=0.01)

Turns = tuple[Example, ...]


def test_an_adaptation_scores_both_candidates_and_leaves_the_surrogate_pristine(
    surrogate: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    plain = score_plain(surrogate, held_out)
    before = {name: tensor.clone() for name, tensor in surrogate.model.state_dict().items()}
    result = adapt(surrogate, examples, held_out, MINING, LORA, seed=0, out_dir=tmp_path / "v1")
    assert result.plain == plain == score_plain(surrogate, held_out)
    assert result.adapted.nll != plain.nll
    after = surrogate.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert set(result.hardness) == set(result.weights) == {1, 2, 3}
    assert sum(result.weights.values()) / 3 == pytest.approx(1.0)
    ratios = [result.weights[turn] / result.hardness[turn] for turn in (1, 2, 3)]
    assert ratios == pytest.approx([ratios[0]] * 3)
    assert result.objective is not None
    assert len(result.mined_text_ids) == 2
    assert (result.steps, result.stopped_early) == (4, False)
    assert min(result.mining_s, result.finetune_s, result.scoring_s) > 0
    assert pickle.loads(pickle.dumps(result)) == result


def test_the_probe_tells_the_saved_adapter_from_the_plain_surrogate(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    result = adapt(qwen, examples, held_out, MINING, LORA, seed=0, out_dir=tmp_path)
    turns = render(qwen.tokenizer, held_out)
    _, plain = score_rendered(qwen.model, turns)
    served = PeftModel.from_pretrained(qwen.model, result.directory).eval()
    agreement, probe = score_rendered(served, turns)
    assert agreement == result.adapted
    assert probe == result.probe != plain


def test_two_sessions_one_after_the_other_get_the_adapters_they_would_get_alone(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    adapt(qwen, examples[:1], held_out, MINING, LORA, seed=0, out_dir=tmp_path / "first")
    second = adapt(qwen, examples[1:], held_out, MINING, LORA, seed=0, out_dir=tmp_path / "second")
    fresh = Surrogate(tiny_model("qwen2"), qwen.tokenizer)
    alone = adapt(fresh, examples[1:], held_out, MINING, LORA, seed=0, out_dir=tmp_path / "alone")
    assert second.losses == alone.losses
    name = "adapter_model.safetensors"
    assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_without_mining_every_turn_weighs_the_same(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    off = MINING.model_copy(update={"enabled": False})
    result = adapt(qwen, examples, held_out, off, LORA, seed=0, out_dir=tmp_path)
    assert result.weights == {1: 1.0, 2: 1.0, 3: 1.0}
    assert (result.hardness, result.objective, result.mined_text_ids) == ({}, None, ())
    assert result.mining_s == 0


def test_judging_on_a_training_turn_is_refused(qwen: Surrogate, examples: Turns, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"turns \[3\] are both trained on and held out"):
        adapt(qwen, examples, examples[2:], MINING, LORA, seed=0, out_dir=tmp_path)


def test_a_turn_given_twice_is_refused(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"found turns \[1, 1\]"):
        adapt(qwen, examples[:1] * 2, held_out, MINING, LORA, seed=0, out_dir=tmp_path)


def test_an_empty_answer_stops_the_adaptation_before_any_work(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="turns 7: found an empty answer"):
        adapt(qwen, (*examples, ask(7, "So?", "")), held_out, MINING, LORA, seed=0, out_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_loaded_surrogate_is_frozen_and_in_the_asked_dtype(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_surrogate(tmp_path, "bfloat16", "cpu", threads=1)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert render(loaded.tokenizer, [ask(1, "Hi?", "Yes.")]) == render(tokenizer, [ask(1, "Hi?", "Yes.")])


def test_a_folder_that_holds_no_chat_model_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="found no surrogate"):
        load_surrogate(tmp_path, "float32", "cpu", threads=1)
    tiny_model("qwen2").save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="found no chat template"):
        load_surrogate(tmp_path, "float32", "cpu", threads=1)
