"""Turns that share a history, in one sequence: every answer as if it were read alone."""

from __future__ import annotations

import random

import pytest
import torch
from support.method_models import ask, dialogue, read_alone, tiny_model

from soma_vllm.method import packing
from soma_vllm.method.activation_cache import Trunk
from soma_vllm.method.decoder import Decoder
from soma_vllm.method.packing import batches, pack
from soma_vllm.method.recipe import Surrogate
from soma_vllm.method.rendering import Rendered, render

CPU = torch.device("cpu")
SEEDS = range(12)


def random_turns(seed: int) -> list[Rendered]:
    """Turns that extend, repeat or ignore one another, in no order."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5) for _ in range(rng.randint(least, most)))

    turns: list[Rendered] = []
    for number in range(1, rng.randint(2, 9)):
        kind = rng.choice(["new", "next", "same", "half"])
        if kind == "new" or not turns:
            turn = Rendered(number, tokens(1, 6), tokens(1, 4))
        else:
            past = rng.choice(turns)
            whole = past.prompt + past.answer
            prompt = {"next": whole + tokens(0, 4), "same": past.prompt, "half": whole[: len(whole) // 2 + 1]}
            turn = Rendered(number, prompt[kind], tokens(1, 4))
        turns.append(turn)
    rng.shuffle(turns)
    return turns


@pytest.mark.parametrize("seed", SEEDS)
def test_every_turn_is_in_exactly_one_strand_and_sees_its_own_tokens(seed: int) -> None:
    turns = random_turns(seed)
    strands = pack(turns)
    packed = [turn for strand in strands for turn in strand.turns]
    assert sorted(turn.turn for turn in packed) == sorted(turn.turn for turn in turns)
    for batch in batches(turns, CPU):
        read: set[tuple[int, int]] = set()
        for turn, row, positions in batch.rows():
            places = range(positions.start, positions.stop)
            assert len(places) == len(turn.answer)
            assert tuple(batch.ids[row, : positions.stop].tolist()) == turn.inputs
            assert batch.mask is None or bool(batch.mask[row, : positions.stop].all())
            # No position is read for two answers.
            assert read.isdisjoint((row, place) for place in places)
            read |= {(row, place) for place in places}


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_packed_answers_logits_are_those_of_the_turn_read_alone(architecture: str, seed: int) -> None:
    model = tiny_model(architecture)
    turns = random_turns(seed)
    found = {
        turn.turn: logits for read in Trunk.grow(Decoder(model), turns, cut=1).read() for turn, logits in read
    }
    assert found.keys() == {turn.turn for turn in turns}
    for turn in turns:
        torch.testing.assert_close(found[turn.turn], read_alone(model, turn), rtol=1e-4, atol=1e-4)


def test_a_dialogue_with_its_full_history_is_one_strand(qwen: Surrogate) -> None:
    turns = render(
        qwen.tokenizer, dialogue(("Hi?", "Yes."), ("And?", "No."), ("So?", "Perhaps."), ("Ok?", "Ok."))
    )
    (strand,) = pack(turns)
    assert strand.turns == turns
    assert strand.ids == turns[-1].inputs


def test_unrelated_prompts_are_strands_of_their_own(qwen: Surrogate) -> None:
    turns = render(qwen.tokenizer, [ask(1, "What is a crane?", "A bird."), ask(2, "And a bat?", "A mammal.")])
    assert sorted(strand.turns[0].turn for strand in pack(turns)) == [1, 2]


def test_equal_inputs_are_read_twice() -> None:
    turns = [Rendered(1, (1, 2, 3), (4, 5)), Rendered(2, (1, 2, 3), (4, 9))]
    assert turns[0].inputs == turns[1].inputs
    assert len(pack(turns)) == 2


def test_a_prompt_that_ends_with_anothers_answer_joins_it_and_one_that_ends_sooner_does_not() -> None:
    first = Rendered(1, (1, 2), (3, 4))  # reads 1 2 3
    assert len(pack([first, Rendered(2, (1, 2, 3, 4), (5,))])) == 1
    # Its own first token is predicted where the other's last one is.
    assert len(pack([first, Rendered(2, (1, 2, 3), (5, 6))])) == 2


def test_an_answer_of_one_token_is_predicted_by_the_prompts_last_position() -> None:
    (batch,) = batches([Rendered(1, (1, 2, 3), (4,))], CPU)
    assert batch.ids.tolist() == [[1, 2, 3]]
    assert [(row, positions) for _, row, positions in batch.rows()] == [(0, slice(2, 3))]
    assert [positions for _, _, positions in batch.rows(shift=5)] == [slice(7, 8)]


def test_strands_of_like_length_share_a_batch_and_padding_stays_little(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [
        Rendered(n, (n, *range(20, 20 + length)), (1,)) for n, length in enumerate((9, 90, 9, 88, 10), start=1)
    ]
    sizes = [sorted(turn.turn for turn, _, _ in batch.rows()) for batch in batches(turns, CPU)]
    assert sizes == [[1, 3, 5], [2, 4]]
    for batch in batches(turns, CPU):
        assert batch.mask is not None
        assert batch.ids.numel() <= packing._WASTE * int(batch.mask.sum())
    monkeypatch.setattr(packing, "_BATCH_TOKENS", 25)
    assert [len(batch.strands) for batch in batches(turns, CPU)] == [2, 1, 1, 1]
