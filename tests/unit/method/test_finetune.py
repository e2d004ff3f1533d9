"""LoRA training that leaves no trace in the surrogate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.method_models import ask, dialogue, in_float64, read_alone, tiny_model, with_teachers
from torch.nn import functional

from soma_vllm.config import Lora
from soma_vllm.errors import TrainingError
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.finetune import Training, attached, first_adapted_layer, save, train, turn_weights
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import Rendered, render
from soma_vllm.method.scoring import pooled, score_turns
from soma_vllm.method.stopping import Judge
from soma_vllm.types import Agreement, Example

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
    held_out: tuple[Rendered, ...] = (),
) -> tuple[Training, dict[str, torch.Tensor]]:
    """A training, and the LoRA weights it ended with."""
    with attached(surrogate.decoder, lora, seed) as adapted:
        training = train(surrogate.decoder, turns, held_out, weights, lora, seed)
        return training, learning(adapted)


def learning(adapted: Any) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights."""
    return {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}


def agreement(surrogate: Surrogate, turns: tuple[Rendered, ...]) -> Agreement:
    return pooled(score_turns(surrogate.decoder, turns))


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
    with attached(qwen.decoder, SMALL, 0):
        with pytest.raises(TrainingError, match="already carries an adapter"), attached(qwen.decoder, SMALL, 0):
            pass
        assert any("lora_" in name for name, _ in qwen.model.named_parameters())


def test_a_missing_target_is_refused_before_the_model_is_touched(qwen: Surrogate) -> None:
    before = Fingerprint(qwen.model)
    wrong = SMALL.model_copy(update={"target_modules": ("q_proj", "c_attn")})
    with pytest.raises(TrainingError, match=r"found \['c_attn'\].*q_proj"), attached(qwen.decoder, wrong, 0):
        pass
    before.assert_equal(Fingerprint(qwen.model))


def test_training_lowers_the_nll_of_its_own_examples(
    surrogate: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(surrogate.tokenizer, examples)
    lora = SMALL.model_copy(update={"steps": 20})
    plain = agreement(surrogate, turns)
    with attached(surrogate.decoder, lora, 0):
        assert agreement(surrogate, turns) == plain
        training = train(surrogate.decoder, turns, (), EQUAL, lora, 0)
        learnt = agreement(surrogate, turns)
    assert learnt.nll < 0.8 * plain.nll
    assert len(training.losses) == 20
    assert training.losses[-1] < training.losses[0]
    assert agreement(surrogate, turns) == plain


def test_a_saved_adapter_gives_the_trained_logits_when_loaded_again(
    surrogate: Surrogate, examples: tuple[Example, ...], tmp_path: Path
) -> None:
    turns = render(surrogate.tokenizer, examples)
    with attached(surrogate.decoder, SMALL, 0) as adapted:
        train(surrogate.decoder, turns, (), EQUAL, SMALL, 0)
        save(adapted, tmp_path)
        with torch.no_grad():
            trained = read_alone(adapted, turns[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with torch.no_grad():
        plain = read_alone(surrogate.model, turns[0])
        loaded = read_alone(PeftModel.from_pretrained(surrogate.model, tmp_path).eval(), turns[0])
    assert torch.equal(loaded, trained)
    assert not torch.equal(loaded, plain)


def test_a_saved_adapter_says_its_rank_scale_and_targets(
    qwen: Surrogate, examples: tuple[Example, ...], tmp_path: Path
) -> None:
    lora = SMALL.model_copy(update={"target_modules": ("q_proj", "up_proj")})
    with attached(qwen.decoder, lora, 0) as adapted:
        train(qwen.decoder, render(qwen.tokenizer, examples), (), EQUAL, lora, 0)
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
    model = Surrogate(Decoder(qwen.model.to(torch.bfloat16)), qwen.tokenizer)
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
        {"early_stop_patience": 1, "early_stop_min_delta": 100.0},
        {"early_stop_min_delta": 100.0, "early_stop_patience": 2},
        {"objective": "nll"},
        {"top_layers": 1},
        {"checkpoints": (1, 3)},
        {"init_from": "saved"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_key_of_lora_changes_what_is_learnt(
    qwen: Surrogate,
    examples: tuple[Example, ...],
    held_out: tuple[Example, ...],
    tmp_path: Path,
    change: dict[str, Any],
) -> None:
    turns, judged = with_teachers(render(qwen.tokenizer, examples)), render(qwen.tokenizer, held_out)
    usual = run(qwen, turns, held_out=judged)
    if change == {"init_from": "saved"}:
        with attached(qwen.decoder, SMALL, seed=4) as adapted:
            train(qwen.decoder, turns[:1], (), EQUAL, SMALL, seed=4)
            save(adapted, tmp_path)
        change = {"init_from": str(tmp_path)}
    changed = run(qwen, turns, SMALL.model_copy(update=change), held_out=judged)
    assert not same(usual[1], changed[1])


def test_the_parametrised_changes_name_every_key_of_lora() -> None:
    (mark,) = (
        mark for mark in test_every_key_of_lora_changes_what_is_learnt.pytestmark if mark.name == "parametrize"
    )
    assert {next(iter(change)) for change in mark.args[1]} == set(Lora.model_fields)


def naive_training(
    model: Any,
    adapted: Any,
    turns: tuple[Rendered, ...],
    weights: Mapping[int, float],
    lora: Lora,
    loss_of: Callable[[torch.Tensor, Rendered], torch.Tensor],
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Eq. 4 by the book: every turn alone through the whole model, nothing packed, nothing kept."""
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lora.lr, weight_decay=lora.weight_decay)
    tokens = sum(len(turn.answer) for turn in turns)
    losses = []
    for _ in range(lora.steps):
        optimizer.zero_grad()
        total = sum(weights[turn.turn] * loss_of(read_alone(model, turn), turn) for turn in turns) / tokens
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, lora.grad_clip)
        optimizer.step()
        losses.append(float(total.detach()))
    return losses, learning(adapted)


def naive_nll(logits: torch.Tensor, turn: Rendered) -> torch.Tensor:
    shares = torch.softmax(logits, dim=1)
    return -sum(shares[place, token].log() for place, token in enumerate(turn.answer))


def naive_kl(logits: torch.Tensor, turn: Rendered) -> torch.Tensor:
    assert turn.teacher is not None
    total = torch.zeros((), dtype=logits.dtype)
    for row, ids, logprobs in zip(torch.softmax(logits, dim=1), *turn.teacher, strict=True):
        p = torch.tensor(logprobs, dtype=logits.dtype).exp()
        q = row[torch.tensor(ids).long()]
        p, q = torch.cat([p, 1 - p.sum().view(1)]), torch.cat([q, 1 - q.sum().view(1)])
        total = total + (p * (p.log() - q.log())).sum()
    return total


@pytest.mark.parametrize("objective", ["nll", "kd"])
@pytest.mark.parametrize("top_layers", [None, 1])
@pytest.mark.parametrize("history", [True, False], ids=["one strand", "padded strands"])
def test_packed_above_a_cached_trunk_it_learns_what_full_passes_over_single_turns_teach(
    surrogate: Surrogate, objective: str, top_layers: int | None, history: bool
) -> None:
    exchanges = (
        ("What is a crane?", "A bird, or a machine."),
        ("And a bat?", "A club."),
        ("So?", "Wax; or not."),
    )
    told = (
        dialogue(*exchanges) if history else tuple(ask(n, *pair) for n, pair in enumerate(exchanges, start=1))
    )
    turns = with_teachers(render(surrogate.tokenizer, told))
    double = Surrogate(Decoder(in_float64(surrogate.model)), surrogate.tokenizer)
    lora = Lora(
        rank=4,
        alpha=8,
        dropout=0.0,
        steps=5,
        lr=5e-3,
        grad_clip=0.5,
        top_layers=top_layers,
        objective=objective,
    )
    weights = {1: 0.5, 2: 1.7, 3: 0.8}
    training, learnt = run(double, turns, lora, weights)
    with attached(double.decoder, lora, seed=0) as adapted:
        losses, slow = naive_training(
            double.model, adapted, turns, weights, lora, naive_nll if objective == "nll" else naive_kl
        )
    assert training.losses == pytest.approx(losses, rel=1e-7)
    assert learnt.keys() == slow.keys()
    assert all(".layers.1." in name for name in learnt) == (top_layers == 1)
    for name, tensor in slow.items():
        torch.testing.assert_close(learnt[name], tensor, rtol=1e-5, atol=1e-7)


def test_distilling_falls_back_to_the_words_where_a_turn_has_no_teacher(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    plain = render(qwen.tokenizer, examples)
    taught = with_teachers(plain)
    lora = SMALL.model_copy(update={"steps": 1, "dropout": 0.0})
    first = {
        name: run(qwen, turns, lora.model_copy(update={"objective": objective}))[0].losses[0]
        for name, turns, objective in (
            ("words", plain, "nll"),
            ("no teacher", plain, "kd"),
            ("teacher unused", taught, "nll"),
            ("distilled", taught, "kd"),
            ("mixed", (*taught[:1], *plain[1:]), "kd"),
        )
    }
    assert first["words"] == first["no teacher"] == first["teacher unused"]
    alone = {
        turn.turn: (float(naive_kl(logits, turn)), float(naive_nll(logits, turn)))
        for turn in taught
        for logits in [read_alone(qwen.model, turn)]
    }
    tokens = sum(len(turn.answer) for turn in plain)
    assert first["distilled"] == pytest.approx(sum(kl for kl, _ in alone.values()) / tokens, rel=1e-4)
    mixed = alone[1][0] + alone[2][1] + alone[3][1]
    assert first["mixed"] == pytest.approx(mixed / tokens, rel=1e-4)


def test_all_turns_make_one_step_where_no_batch_size_is_given(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(qwen.tokenizer, examples)
    lora = SMALL.model_copy(update={"dropout": 0.0})
    _, all_at_once = run(qwen, turns, lora)
    _, by_three = run(qwen, turns, lora.model_copy(update={"batch_size": 3}))
    _, by_two = run(qwen, turns, lora.model_copy(update={"batch_size": 2}))
    assert same(all_at_once, by_three)
    assert not same(all_at_once, by_two)


def test_only_the_upper_layers_carry_lora_where_top_layers_says_so(qwen: Surrogate, tmp_path: Path) -> None:
    deep = Surrogate(Decoder(tiny_model("llama", num_hidden_layers=5)), qwen.tokenizer)
    for top, first in ((None, 0), (2, 3), (5, 0), (9, 0)):
        lora = SMALL.model_copy(update={"top_layers": top})
        assert first_adapted_layer(deep.decoder, lora) == first
        with attached(deep.decoder, lora, 0) as adapted:
            layers = {int(name.split(".layers.")[1].split(".")[0]) for name in learning(adapted)}
        assert layers == set(range(first, 5))


# A rate at which a few steps help on other turns and many hurt.
JUDGED = Lora(rank=4, alpha=8, dropout=0.0, steps=40, lr=0.02, checkpoints=(1, 2, 4, 8, 16, 40))


def test_the_checkpoint_that_is_best_on_held_out_turns_is_kept_and_training_ends_once_they_get_worse(
    surrogate: Surrogate, examples: tuple[Example, ...], held_out: tuple[Example, ...]
) -> None:
    turns, judged = (render(surrogate.tokenizer, told) for told in (examples, held_out))
    plain = agreement(surrogate, judged)
    with attached(surrogate.decoder, JUDGED, 0) as adapted:
        training = train(surrogate.decoder, turns, judged, EQUAL, JUDGED, 0)
        kept, left = learning(adapted), agreement(surrogate, judged)
    seen = {point.steps: point.agreement for point in training.checkpoints}
    steps = list(seen)
    assert seen[0] == plain
    assert steps == [0, *JUDGED.checkpoints][: len(steps)]
    # Every checkpoint but the last was better than the one before, and the last is why training ended.
    assert training.stopped_early
    assert len(training.losses) == steps[-1] < JUDGED.steps
    nlls = [seen[step].nll for step in steps[1:]]
    assert nlls[:-1] == sorted(nlls[:-1], reverse=True)
    assert nlls[-1] >= nlls[-2]
    assert training.steps == steps[-2]
    # What is kept is what a training of that many steps makes, and it scores as its checkpoint did.
    alone = JUDGED.model_copy(update={"steps": training.steps, "checkpoints": ()})
    assert same(kept, run(surrogate, turns, alone)[1])
    assert left == seen[training.steps]
    for step in steps[1:]:
        lora = JUDGED.model_copy(update={"steps": step, "checkpoints": ()})
        with attached(surrogate.decoder, lora, 0):
            train(surrogate.decoder, turns, (), EQUAL, lora, 0)
            assert agreement(surrogate, judged).nll == pytest.approx(seen[step].nll, rel=1e-5)


def test_a_training_whose_first_checkpoint_is_no_better_than_none_ends_there_and_keeps_nothing(
    surrogate: Surrogate,
    examples: tuple[Example, ...],
    held_out: tuple[Example, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, judged = (render(surrogate.tokenizer, told) for told in (examples, held_out))
    plain = agreement(surrogate, judged)
    monkeypatch.setattr(Judge, "agreement", lambda self: Agreement(1.0, 0.5, 10))
    lora = JUDGED.model_copy(update={"checkpoints": (2, 4, 40)})
    with attached(surrogate.decoder, lora, 0):
        training = train(surrogate.decoder, turns, judged, EQUAL, lora, 0)
        assert agreement(surrogate, judged) == plain
    assert (training.steps, len(training.losses), training.stopped_early) == (0, 2, True)
    assert [point.steps for point in training.checkpoints] == [0, 2]


def test_judging_leaves_the_training_as_it_is(
    qwen: Surrogate, examples: tuple[Example, ...], held_out: tuple[Example, ...]
) -> None:
    """Dropout, its random numbers and the order of turns are those of a training that nobody judges."""
    turns, judged = (render(qwen.tokenizer, told) for told in (examples, held_out))
    lora = SMALL.model_copy(update={"batch_size": 2, "dropout": 0.3, "lr": 1e-4})
    unjudged = run(qwen, turns, lora)
    improving = run(qwen, turns, lora.model_copy(update={"checkpoints": (2, 4, 6)}), held_out=turns)
    assert [point.steps for point in improving[0].checkpoints] == [0, 2, 4, 6]
    assert improving[0].losses == unjudged[0].losses
    assert same(improving[1], unjudged[1])
    at_the_end = run(qwen, turns, lora, held_out=judged)
    assert [point.steps for point in at_the_end[0].checkpoints] == [0, 6]
    assert same(at_the_end[1], unjudged[1])


def test_no_step_is_taken_that_could_not_be_kept(qwen: Surrogate, examples: tuple[Example, ...]) -> None:
    turns = render(qwen.tokenizer, examples)
    lora = SMALL.model_copy(update={"checkpoints": (1, 2), "lr": 1e-4, "dropout": 0.0})
    training, _ = run(qwen, turns, lora, held_out=turns)
    assert (len(training.losses), training.steps, training.stopped_early) == (2, 2, False)
    # Without anything to judge by, checkpoints mean nothing.
    unjudged, _ = run(qwen, turns, lora)
    assert (len(unjudged.losses), unjudged.steps, unjudged.checkpoints) == (6, 6, ())


def test_a_training_out_of_patience_is_judged_where_it_stopped(
    qwen: Surrogate, examples: tuple[Example, ...]
) -> None:
    turns = render(qwen.tokenizer, examples)
    lora = SMALL.model_copy(
        update={
            "steps": 30,
            "checkpoints": (2, 20, 30),
            "early_stop_patience": 4,
            "early_stop_min_delta": 100.0,
            "lr": 1e-3,
        }
    )
    training, _ = run(qwen, turns, lora, held_out=turns)
    assert [point.steps for point in training.checkpoints] == [0, 2, 5]
    assert (training.steps, training.stopped_early) == (5, True)


def saved(surrogate: Surrogate, turns: tuple[Rendered, ...], lora: Lora, to: Path) -> dict[str, torch.Tensor]:
    with attached(surrogate.decoder, lora, seed=4) as adapted:
        train(surrogate.decoder, turns, (), EQUAL, lora, seed=4)
        save(adapted, to)
        return learning(adapted)


def test_a_training_starts_from_a_saved_adapter_and_forgets_it_afterwards(
    surrogate: Surrogate, examples: tuple[Example, ...], tmp_path: Path
) -> None:
    turns = render(surrogate.tokenizer, examples)
    made = saved(surrogate, turns[:2], SMALL, tmp_path)
    before = Fingerprint(surrogate.model)
    lora = SMALL.model_copy(update={"init_from": str(tmp_path)})
    with attached(surrogate.decoder, lora, seed=0) as adapted:
        assert same(learning(adapted), made)
        started = agreement(surrogate, turns)
        training = train(surrogate.decoder, turns, turns, EQUAL, lora, 0)
    assert training.checkpoints[0].agreement == started
    before.assert_equal(Fingerprint(surrogate.model))
    assert started != agreement(surrogate, turns)
    with attached(surrogate.decoder, SMALL, seed=0) as adapted:
        assert all(not bool(tensor.any()) for name, tensor in learning(adapted).items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, r"28 weights do not fit, such as .*found \[4, 64\]; expected \[2, 64\]"),
        ({"target_modules": ("q_proj",)}, r"found \[4, 64\]; expected none"),
        ({"top_layers": 1}, r"14 weights do not fit.*layers.0.*expected none"),
        ({"alpha": 4.0}, r"found alpha 8; expected 4.0"),
    ],
    ids=["rank", "targets", "layers", "alpha"],
)
def test_a_saved_adapter_of_another_shape_is_refused(
    qwen: Surrogate, examples: tuple[Example, ...], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    saved(qwen, render(qwen.tokenizer, examples), SMALL, tmp_path)
    before = Fingerprint(qwen.model)
    lora = SMALL.model_copy(update={**change, "init_from": str(tmp_path)})
    with pytest.raises(TrainingError, match=f"lora.init_from: .*{message}"), attached(qwen.decoder, lora, 0):
        pass
    before.assert_equal(Fingerprint(qwen.model))


@pytest.mark.parametrize(
    "key", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}, {"rank_pattern": {"q_proj": 4}}]
)
def test_a_saved_adapter_that_scales_otherwise_is_refused(
    qwen: Surrogate, examples: tuple[Example, ...], tmp_path: Path, key: dict[str, Any]
) -> None:
    saved(qwen, render(qwen.tokenizer, examples), SMALL, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **key}))
    lora = SMALL.model_copy(update={"init_from": str(tmp_path)})
    message = f"found {next(iter(key))}; expected one alpha / rank"
    with pytest.raises(TrainingError, match=message), attached(qwen.decoder, lora, 0):
        pass


def test_a_folder_without_a_readable_adapter_is_refused(qwen: Surrogate, tmp_path: Path) -> None:
    lora = SMALL.model_copy(update={"init_from": str(tmp_path)})
    with pytest.raises(TrainingError, match="found no adapter"), attached(qwen.decoder, lora, 0):
        pass
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(TrainingError, match="found no adapter"), attached(qwen.decoder, lora, 0):
        pass


def test_nothing_to_learn_from_is_refused(qwen: Surrogate) -> None:
    with pytest.raises(TrainingError, match="no turns"):
        run(qwen, ())


def test_adapter_weights_that_are_not_finite_are_not_saved(qwen: Surrogate, tmp_path: Path) -> None:
    with attached(qwen.decoder, SMALL, 0) as adapted:
        next(p for p in adapted.parameters() if p.requires_grad).data.fill_(float("inf"))
        with pytest.raises(TrainingError, match="is not finite"):
            save(adapted, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_example_longer_than_the_limit_is_still_learnt_from(qwen: Surrogate) -> None:
    long = render(qwen.tokenizer, [ask(1, "word " * 60, "answer " * 20)])
    training, _ = run(qwen, long, SMALL.model_copy(update={"max_seq_length": 16}), {1: 1.0})
    assert all(loss > 0 for loss in training.losses)
