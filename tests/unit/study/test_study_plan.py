"""What the study plays: fair between arms, drawn from the seed."""

from __future__ import annotations

from study.plan import Block, Load, order, plan, synthetic

ARMS = ("original", "surrogate", "soma")
DIALOGUES = {f"d{n}": tuple(f"turn {t}" for t in range(6)) for n in range(4)}
LOAD = Load(sessions=3, arrival_s=5.0, think_s=2.0)


def blocks(seed: int, repeats: int = 3) -> list[Block]:
    found: list[Block] = plan(DIALOGUES, ARMS, repeats, LOAD, seed, "run")
    return found


def test_within_a_repeat_every_arm_meets_the_same_users() -> None:
    for repeat in range(3):
        users = {
            tuple((v.dialogue, v.turns, v.arrives_s, v.thinks_s) for v in block.visits)
            for block in blocks(0)
            if block.repeat == repeat
        }
        assert len(users) == 1


def test_repeats_differ_in_their_arrivals_and_not_in_their_dialogues() -> None:
    originals = [block for block in blocks(0) if block.arm == "original"]
    assert len({tuple(v.arrives_s for v in block.visits) for block in originals}) == 3
    assert len({tuple(v.dialogue for v in block.visits) for block in originals}) == 1


def test_every_arm_plays_once_in_every_repeat() -> None:
    played = [(block.repeat, block.arm) for block in blocks(0)]
    assert sorted(played) == sorted((repeat, arm) for repeat in range(3) for arm in ARMS)
    assert [arm for _, arm in played] == [arm for arms in order(ARMS, 3, 0) for arm in arms]


def test_another_seed_plays_the_arms_in_another_order() -> None:
    assert [b.arm for b in blocks(0)] == [b.arm for b in blocks(0)]
    assert len({tuple(b.arm for b in blocks(seed)) for seed in range(6)}) > 1


def test_no_two_sessions_share_an_id() -> None:
    names = [visit.session for block in blocks(0) for visit in block.visits]
    assert len(set(names)) == len(names)


def test_sessions_arrive_one_after_the_other_and_the_first_at_once() -> None:
    times = [visit.arrives_s for visit in blocks(1)[0].visits]
    assert times[0] == 0.0
    assert times == sorted(times)


def test_more_sessions_than_dialogues_play_some_again() -> None:
    (block,) = plan(DIALOGUES, ("original",), 1, Load(9, 1.0, 0.0), 0, "run")
    assert {visit.dialogue for visit in block.visits} == set(DIALOGUES)
    assert len(block.visits) == 9
    assert block.planned == 54


def test_made_up_dialogues_have_the_lengths_asked_for() -> None:
    found = synthetic(3, 12, 40, seed=1)
    assert [len(turns) for turns in found.values()] == [12] * 3
    assert {len(turn.split()) for turns in found.values() for turn in turns} == {40}
    assert found == synthetic(3, 12, 40, seed=1)
    assert found != synthetic(3, 12, 40, seed=2)
