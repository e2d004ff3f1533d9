"""One adaptation, end to end on tiny models."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from support.method_models import ask, dialogue, tiny_model
from transformers import PreTrainedTokenizerFast

from soma_vllm.config import Lora, Mining
from soma_vllm.errors import ModelError, TrainingError
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.recipe import Surrogate, adapt, adapting, load_surrogate, score_plain
from soma_vllm.method.rendering import render
from soma_vllm.method.scoring import pooled, score_turns
from soma_vllm.types import Example, Teacher

MINING = Mining(enabled=True, soft_len=2, n_candidates=2, iters=2)
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
    assert result.peft is None
    assert pickle.loads(pickle.dumps(result)) == result


def test_without_held_out_turns_an_adapter_is_trained_on_all_and_judged_on_none(
    surrogate: Surrogate, examples: Turns, tmp_path: Path
) -> None:
    lora = LORA.model_copy(update={"checkpoints": (1, 2)})
    result = adapt(surrogate, examples, (), Mining(enabled=False), lora, seed=0, out_dir=tmp_path)
    assert set(result.weights.values()) == {1.0}
    assert result.steps == 4
    assert result.plain.tokens == result.adapted.tokens == 0
    assert result.checkpoints == ()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_probe_tells_the_saved_adapter_from_the_plain_surrogate(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    result = adapt(qwen, examples, held_out, MINING, LORA, seed=0, out_dir=tmp_path)
    turns = render(qwen.tokenizer, held_out)
    (plain,) = score_turns(qwen.decoder, turns)
    served = PeftModel.from_pretrained(qwen.model, tmp_path).eval()
    (score,) = score_turns(Decoder(served.get_base_model()), turns)
    assert pooled([score]) == result.adapted
    assert score.probe == result.probe != plain.probe


def test_two_sessions_one_after_the_other_get_the_adapters_they_would_get_alone(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    adapt(qwen, examples[:1], held_out, MINING, LORA, seed=0, out_dir=tmp_path / "first")
    second = adapt(qwen, examples[1:], held_out, MINING, LORA, seed=0, out_dir=tmp_path / "second")
    fresh = Surrogate(Decoder(tiny_model("qwen2")), qwen.tokenizer)
    alone = adapt(fresh, examples[1:], held_out, MINING, LORA, seed=0, out_dir=tmp_path / "alone")
    assert second.losses == alone.losses
    name = "adapter_model.safetensors"
    assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("enabled", [False, "auto"])
def test_without_mining_every_turn_weighs_the_same(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path, enabled: Any
) -> None:
    off = Mining(enabled=enabled)
    result = adapt(qwen, examples, held_out, off, LORA, seed=0, out_dir=tmp_path)
    assert result.weights == {1: 1.0, 2: 1.0, 3: 1.0}
    assert (result.hardness, result.objective, result.mined_text_ids) == ({}, None, ())
    assert result.mining_s == 0


def test_mining_is_left_out_unless_it_is_asked_for(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    unsaid = adapt(qwen, examples, held_out, Mining(), LORA, seed=0, out_dir=tmp_path / "unsaid")
    mined = adapt(qwen, examples, held_out, MINING, LORA, seed=0, out_dir=tmp_path / "mined")
    assert (unsaid.hardness, unsaid.mining_s) == ({}, 0)
    assert mined.flops > unsaid.flops > 0
    assert mined.losses != unsaid.losses


def test_inside_the_block_the_surrogate_runs_with_the_adapter_and_afterwards_without(
    surrogate: Surrogate, examples: Turns, held_out: Turns
) -> None:
    turns = render(surrogate.tokenizer, held_out)
    before = {name: tensor.clone() for name, tensor in surrogate.model.state_dict().items()}
    with adapting(surrogate, examples, held_out, Mining(), LORA, seed=0) as learnt:
        inside = pooled(score_turns(surrogate.decoder, turns))
    assert inside == learnt.adapted != learnt.plain
    with (
        pytest.raises(ZeroDivisionError),
        adapting(surrogate, examples, held_out, Mining(), LORA, seed=0),
    ):
        raise ZeroDivisionError
    assert pooled(score_turns(surrogate.decoder, turns)) == learnt.plain
    after = surrogate.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_was_learnt_is_the_best_checkpoint_and_says_what_each_one_came_to(
    surrogate: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    lora = LORA.model_copy(update={"steps": 24, "lr": 0.03, "checkpoints": (1, 2, 8, 24), "dropout": 0.0})
    result = adapt(surrogate, examples, held_out, Mining(), lora, seed=0, out_dir=tmp_path)
    seen = {point.steps: point.agreement for point in result.checkpoints}
    assert seen[0] == result.plain == score_plain(surrogate, held_out)
    assert result.adapted == seen[result.steps]
    assert result.adapted.nll == min(agreement.nll for steps, agreement in seen.items() if steps)
    assert len(result.losses) == max(seen)


def test_a_pairs_adapter_to_start_from_does_not_pass_for_the_plain_surrogate(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    adapt(qwen, examples[:2], held_out, Mining(), LORA, seed=0, out_dir=tmp_path / "pair")
    lora = LORA.model_copy(update={"init_from": str(tmp_path / "pair")})
    result = adapt(qwen, examples, held_out, Mining(), lora, seed=0, out_dir=tmp_path / "session")
    assert result.plain == score_plain(qwen, held_out)
    assert result.checkpoints[0].agreement != result.plain


def test_it_is_distilled_only_where_every_turn_has_a_teacher(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    def taught(example: Example) -> Example:
        tokens = (*qwen.tokenizer(example.answer, add_special_tokens=False)["input_ids"],)
        top = np.array(tokens, dtype=np.int32)[:, None]
        return replace(example, teacher=Teacher(tokens, top, np.full(top.shape, -0.1, dtype=np.float32)))

    shown = tuple(taught(example) for example in examples)
    cases = {
        "all": (shown, LORA),
        "some": ((*shown[:2], examples[2]), LORA),
        "none": (examples, LORA),
        "words": (shown, LORA.model_copy(update={"objective": "nll"})),
    }
    distilled = {
        name: adapt(qwen, told, held_out, Mining(), lora, seed=0, out_dir=tmp_path / name).distilled
        for name, (told, lora) in cases.items()
    }
    assert distilled == {"all": True, "some": False, "none": False, "words": False}


def test_a_shared_history_is_counted_once_and_every_step_costs_the_same_again(
    surrogate: Surrogate, held_out: Turns, tmp_path: Path
) -> None:
    told = dialogue(("What is a crane?", "A bird."), ("And a bat?", "A club."), ("And a seal?", "Wax."))

    def cost(name: str, **change: Any) -> float:
        lora = LORA.model_copy(update=change)
        result = adapt(surrogate, told, held_out, Mining(), lora, seed=0, out_dir=tmp_path / name)
        assert len(result.losses) == lora.steps
        return result.flops

    one, two, three = (cost(str(steps), steps=steps) for steps in (1, 2, 3))
    assert 0 < one < two < three
    assert three - two == pytest.approx(two - one)
    # One more step reads the longest turn, which holds the others, and nothing else.
    decoder, turns = surrogate.decoder, render(surrogate.tokenizer, told)
    layers = decoder.depth * decoder.layer_parameters() * len(turns[-1].inputs)
    head = decoder.embedding.numel() * sum(len(turn.answer) for turn in turns)
    assert two - one == pytest.approx(2 * 2 * (layers + head))
    # A step above a cached trunk is cheaper, and so is a shorter text.
    assert cost("top", steps=3, top_layers=1) < three
    assert cost("short", steps=3, max_seq_length=20) < three


def test_a_turn_beyond_the_surrogates_context_is_refused_by_name(
    qwen: Surrogate, examples: Turns, held_out: Turns, tmp_path: Path
) -> None:
    long = ask(9, "word " * 120, "An answer.")
    found = len(render(qwen.tokenizer, [long])[0].inputs)
    message = f"turn 9: found {found} tokens; the surrogate's context holds 512"
    with pytest.raises(TrainingError, match=message):
        adapt(qwen, (*examples, long), held_out, Mining(), LORA, seed=0, out_dir=tmp_path)
    with pytest.raises(TrainingError, match=message):
        score_plain(qwen, (long,))
    assert not list(tmp_path.iterdir())


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
