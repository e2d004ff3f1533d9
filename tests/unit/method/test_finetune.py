"""LoRA training that leaves no trace in the surrogate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import ask
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional

from soma_vllm.config import Lora
from soma_vllm.errors import TrainingError
from soma_vllm.method.finetune import Training, attached, save, train, turn_weights
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import Rendered, answer_logits, render
from soma_vllm.method.scoring import score
from soma_vllm.types import Example

SMALL = Lora(rank=4, alpha=8, dropout=0.1, steps=6, lr=0.01)
EQUAL = {1: 1.0, 2: 1.0, 3: 1.0}


class Fingerprint:
    """Everything of a model that a session could leave behind."""

    def __init__(self, model: Any) -> None:
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.modules = {name: type(module) for name, module in model.named_modules()}
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.gradients = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        self.attributes = sorted(vars(model))
        with torch.no_grad():
            self.outputs = model(torch.tensor([[5, 80, 90, 100]])).logits

    def assert_equal(self, other: Fingerprint) -> None:
        assert self.modules == other.modules
        assert self.weights.keys() == other.weights.keys()
        assert all(torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items())
        assert self.flags == other.flags
        assert self.modes == other.modes
        assert self.gradients == other.gradients
        assert self.attributes == other.attributes
        assert torch.equal(self.outputs, other.outputs)


def run(
    surrogate: Surrogate,
    turns: tuple[Rendered, ...],
    lora: Lora = SMALL,
    weights: Mapping[int, float] = EQUAL,
    seed: int = 0,
) -> tuple[Training, dict[str, torch.Tensor]]:
    """A training, and the LoRA weights it ended with."""
    with attached(surrogate.model, lora, seed) as adapted:
        training = train(adapted, turns, weights, lora, seed)
        return training, {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_the_surrogate_is_bit_identical_after_a_training(
    surrogate: Surrogate, examples: tuple[Example, ...]
) -> None:
    surrogate.model.model.norm.requires_grad_(True)  # a flag that peft clears
    before = Fingerprint(surrogate.model)
    run(surrogate, render(surrogate.tokenizer, examples))
    before.assert_equal(Fingerprint(surrogate.model))


def test_the_surrogate_is_bit_identical_after_a_training_that_failed(
    surrogate: Surrogate, examples: tuple[Example, ...]
) -> None:
    before = Fingerprint(surrogate.model)
    with pytest.raises(TrainingError, match="found a training loss of nan"):
        run(surrogate, render(surrogate.tokenizer, examples), weights=dict.fromkeys(EQUAL, float("nan")))
    before.assert_equal(Fingerprint(surrogate.model))
    # No weight for the first batch's turns: a bug of the caller's, of a kind nobody catches.
    with pytest.raises(KeyError):
        run(surrogate, render(surrogate.tokenizer, examples), weights={})
    before.assert_equal(Fingerprint(surrogate.model))


def test_the_second_session_starts_where_the_first_one_did(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(qwen.tokenizer, examples)
    alone = run(qwen, turns[1:])
    run(qwen, turns[:1], seed=9)
    after_another = run(qwen, turns[1:])
    assert after_another[0].losses == alone[0].losses
    assert same(after_another[1], alone[1])


def test_a_model_that_carries_an_adapter_is_refused(qwen: Surrogate) -> None:
    with attached(qwen.model, SMALL, 0):
        with pytest.raises(TrainingError, match="already carries an adapter"), attached(qwen.model, SMALL, 0):
            pass
        assert any("lora_" in name for name, _ in qwen.model.named_parameters())


def test_a_missing_target_is_refused_before_the_model_is_touched(qwen: Surrogate) -> None:
    before = Fingerprint(qwen.model)
    wrong = SMALL.model_copy(update={"target_modules": ("q_proj", "c_attn")})
    with pytest.raises(TrainingError, match=r"found \['c_attn'\].*q_proj"), attached(qwen.model, wrong, 0):
        pass
    before.assert_equal(Fingerprint(qwen.model))


def test_training_lowers_the_nll_of_its_own_examples(
    surrogate: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(surrogate.tokenizer, examples)
    lora = SMALL.model_copy(update={"steps": 20})
    plain = score(surrogate.model, surrogate.tokenizer, examples)
    with attached(surrogate.model, lora, 0) as adapted:
        assert score(adapted, surrogate.tokenizer, examples) == plain
        training = train(adapted, turns, EQUAL, lora, 0)
        learnt = score(adapted, surrogate.tokenizer, examples)
    assert learnt.nll < 0.8 * plain.nll
    assert len(training.losses) == 20
    assert training.losses[-1] < training.losses[0]
    assert score(surrogate.model, surrogate.tokenizer, examples) == plain


def test_a_saved_adapter_gives_the_trained_logits_when_loaded_again(
    surrogate: Surrogate, examples: tuple[Example, ...], tmp_path: Path
) -> None:
    turns = render(surrogate.tokenizer, examples)
    with attached(surrogate.model, SMALL, 0) as adapted:
        train(adapted, turns, EQUAL, SMALL, 0)
        save(adapted, tmp_path)
        with torch.no_grad():
            trained = answer_logits(adapted, turns[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with torch.no_grad():
        plain = answer_logits(surrogate.model, turns[0])
        loaded = answer_logits(PeftModel.from_pretrained(surrogate.model, tmp_path).eval(), turns[0])
    assert torch.equal(loaded, trained)
    assert not torch.equal(loaded, plain)


def test_a_saved_adapter_says_its_rank_scale_and_targets(
    qwen: Surrogate, examples: tuple[Example, ...], tmp_path: Path
) -> None:
    lora = SMALL.model_copy(update={"target_modules": ("q_proj", "up_proj")})
    with attached(qwen.model, lora, 0) as adapted:
        train(adapted, render(qwen.tokenizer, examples), EQUAL, lora, 0)
        save(adapted, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 4, 8)
    assert isinstance(written["lora_alpha"], int)
    assert sorted(written["target_modules"]) == ["q_proj", "up_proj"]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2  # layers x targets x (A, B)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_a_bfloat16_surrogate_learns_float32_adapter_weights(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    model = Surrogate(qwen.model.to(torch.bfloat16), qwen.tokenizer)
    before = Fingerprint(model.model)
    _, learnt = run(model, render(model.tokenizer, examples))
    assert {tensor.dtype for tensor in learnt.values()} == {torch.float32}
    assert any(float(tensor.abs().max()) > 0 for name, tensor in learnt.items() if "lora_B" in name)
    before.assert_equal(Fingerprint(model.model))


def test_the_loss_is_the_weighted_token_nll_of_the_answers_alone(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(qwen.tokenizer, examples[:2])
    weights = {1: 0.5, 2: 1.5}
    lora = SMALL.model_copy(update={"steps": 1, "batch_size": 2, "dropout": 0.0})
    training, _ = run(qwen, turns, lora, weights)
    total, tokens = 0.0, 0
    for turn in turns:
        with torch.no_grad():
            logits = qwen.model(torch.tensor([turn.prompt + turn.answer])).logits[0]
        for place, token in enumerate(turn.answer):
            row = logits[len(turn.prompt) - 1 + place]
            total -= weights[turn.turn] * float(functional.log_softmax(row, dim=0)[token])
            tokens += 1
    assert training.losses[0] == pytest.approx(total / tokens, rel=1e-5)


def test_turn_weights_are_proportional_to_hardness_with_mean_one() -> None:
    assert turn_weights({1: 1.0, 2: 3.0, 5: 2.0}) == pytest.approx({1: 0.5, 2: 1.5, 5: 1.0})
    assert turn_weights({1: 0.0, 2: 0.0}) == {1: 1.0, 2: 1.0}
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(TrainingError, match="found hardness by turn"):
            turn_weights({1: 1.0, 2: wrong})


def test_a_turn_of_weight_zero_teaches_nothing(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    turns = render(qwen.tokenizer, examples)
    lora = SMALL.model_copy(update={"batch_size": 1, "weight_decay": 0.0, "steps": 3})
    _, learnt = run(qwen, turns, lora, dict.fromkeys(EQUAL, 0.0))
    assert all(float(tensor.abs().max()) == 0 for name, tensor in learnt.items() if "lora_B" in name)


def test_equal_seeds_train_equal_adapters_and_leave_the_global_random_state_alone(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(qwen.tokenizer, examples)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = run(qwen, turns)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(2)
    again = run(qwen, turns)
    assert first[0] == again[0]
    assert same(first[1], again[1])
    assert not same(first[1], run(qwen, turns, seed=5)[1])


def test_training_stops_once_the_loss_no_longer_improves(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(qwen.tokenizer, examples)
    lora = SMALL.model_copy(
        update={"steps": 30, "early_stop_patience": 3, "early_stop_min_delta": 100.0, "batch_size": 2}
    )
    training, _ = run(qwen, turns, lora)
    # The first pass of 2 batches sets the mark, 3 steps fail to beat it by 100 nats.
    assert len(training.losses) == 2 + 3
    assert training.stopped_early
    patient, _ = run(qwen, turns, lora.model_copy(update={"early_stop_min_delta": 0.0}))
    assert len(patient.losses) > 5


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 2},
        {"alpha": 4.0},
        {"dropout": 0.5},
        {"target_modules": ("q_proj",)},
        {"steps": 3},
        {"batch_size": 1},
        {"lr": 0.02},
        {"weight_decay": 5.0},
        {"grad_clip": 1e-9},
        {"max_seq_length": 20},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_key_of_lora_changes_what_is_learnt(
    qwen: Surrogate, examples: tuple[Example, ...], change: dict[str, Any]
) -> None:
    turns = render(qwen.tokenizer, examples)
    usual = run(qwen, turns)
    changed = run(qwen, turns, SMALL.model_copy(update=change))
    assert not same(usual[1], changed[1])


def test_nothing_to_learn_from_is_refused(qwen: Surrogate) -> None:
    with pytest.raises(TrainingError, match="no turns"):
        run(qwen, ())


def test_adapter_weights_that_are_not_finite_are_not_saved(qwen: Surrogate, tmp_path: Path) -> None:
    with attached(qwen.model, SMALL, 0) as adapted:
        next(p for p in adapted.parameters() if p.requires_grad).data.fill_(float("inf"))
        with pytest.raises(TrainingError, match="is not finite"):
            save(adapted, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_example_longer_than_the_limit_is_still_learnt_from(qwen: Surrogate) -> None:
    long = render(qwen.tokenizer, [ask(1, "word " * 60, "answer " * 20)])
    training, _ = run(qwen, long, SMALL.model_copy(update={"max_seq_length": 16}), {1: 1.0})
    assert all(loss > 0 for loss in training.losses)
