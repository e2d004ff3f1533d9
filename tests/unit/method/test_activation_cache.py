"""Turns above their frozen lower layers."""

from __future__ import annotations

import pytest
import torch
from support.method_models import ask, dialogue, read_alone

from soma_vllm.config import Lora
from soma_vllm.method.activation_cache import Trunk
from soma_vllm.method.finetune import attached
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import Rendered, render

Turns = tuple[Rendered, ...]


@pytest.fixture
def turns(surrogate: Surrogate) -> Turns:
    """Two strands of like length: a dialogue, and a turn of its own."""
    told = dialogue(("Hi?", "Yes."), ("And a bat?", "A club."))
    return render(
        surrogate.tokenizer, (*told, ask(3, "What is a crane, and what would it lift, if it did?", "Wax."))
    )


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("wanted", [None, {1}, {3}, {1, 3}, {2, 3}])
@torch.no_grad()
def test_the_wanted_turns_and_no_others_are_read_as_if_alone(
    surrogate: Surrogate, turns: Turns, cut: int, wanted: set[int] | None
) -> None:
    trunk = Trunk.grow(surrogate.decoder, turns, cut)
    assert len(trunk.batches) == 1
    found = {turn.turn: logits for read in trunk.read(wanted) for turn, logits in read}
    assert found.keys() == (wanted or {1, 2, 3})
    for turn in turns:
        if turn.turn in found:
            torch.testing.assert_close(
                found[turn.turn], read_alone(surrogate.model, turn), rtol=1e-4, atol=1e-4
            )


def test_a_trunk_knows_its_turns_and_counts_a_shared_history_once(surrogate: Surrogate, turns: Turns) -> None:
    trunk = Trunk.grow(surrogate.decoder, turns)
    assert sorted(turn.turn for turn in trunk.turns()) == [1, 2, 3]
    read = sum(len(strand.ids) for batch, _ in trunk.batches for strand in batch.strands)
    assert read == len(turns[1].inputs) + len(turns[2].inputs)


def test_a_trunk_stays_valid_while_the_layers_above_it_learn(surrogate: Surrogate, turns: Turns) -> None:
    lora = Lora(rank=2, dropout=0.0, top_layers=1)
    trunk = Trunk.grow(surrogate.decoder, turns, cut=1)
    before = [states.clone() for _, states in trunk.batches]
    with attached(surrogate.decoder, lora, seed=0) as adapted:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(generator=torch.Generator().manual_seed(1))
        found = {turn.turn: logits for read in trunk.read() for turn, logits in read}
        for turn in turns:
            whole = read_alone(surrogate.model, turn)
            torch.testing.assert_close(found[turn.turn], whole, rtol=1e-3, atol=1e-3)
            assert found[turn.turn].requires_grad
    assert all(torch.equal(a, states) for a, (_, states) in zip(before, trunk.batches, strict=True))
    assert not any(states.requires_grad for _, states in trunk.batches)
    plain = {turn.turn: logits for read in trunk.read() for turn, logits in read}
    assert not torch.allclose(plain[1], found[1], atol=0.1)
