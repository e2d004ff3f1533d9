"""Arms, their hardware and servers; blocks that are kept; options that become a study."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import throughput
from study import arms, kept
from study.client import Answered, Played
from study.kept import Kept
from study.meter import Reading
from study.plan import Block, Load, Visit, plan, quicker
from study.prepare import pairs, prepared
from study.report import IncompleteRun
from study.run import Player
from study.server import Server

import soma_vllm
from soma_vllm.config import load_config
from soma_vllm.errors import ConfigError

ROOT = Path(soma_vllm.__file__).parent.parent
DEMO = load_config(ROOT / "configs" / "cpu_demo.yaml")
WORKLOADS = str(ROOT / "benchmarks" / "workloads")
CORES = len(os.sched_getaffinity(0))


def studies(*arguments: str) -> list[Any]:
    return [prepared(one) for one in pairs(throughput.parsed(arguments))]


def test_the_original_has_every_core_and_its_other_arm_has_one() -> None:
    assert arms.hardware("original", DEMO) == {"original": CORES, "surrogate": CORES}
    assert arms.hardware("original_one_core", DEMO) == {"original": 1, "surrogate": 1}
    assert any("original.cpu_cores" in override for override in arms.overrides("original", DEMO))
    assert arms.overrides("soma", DEMO) == ()
    assert arms.count("0-3,5") == 5


def test_every_configuration_that_an_arm_asks_for_is_one() -> None:
    for name in arms.ARMS:
        config = load_config(ROOT / "configs" / "cpu_demo.yaml", arms.overrides(name, DEMO))
        if name == "soma_paper":
            assert config.mining.enabled is True
            assert config.mining.tail == "positions"
            assert config.prefix.mode == "sliding"
            assert config.lora.objective == "nll"


def test_arms_of_like_settings_share_a_server_and_random_follows_soma() -> None:
    found = arms.together(["random", "original", "soma", "surrogate", "speculative"], DEMO)
    assert found == [["original", "surrogate"], ["soma", "random"], ["speculative"]]


def test_everybody_is_switched_after_the_warm_start_and_nobody_whom_random_did_not_draw() -> None:
    assert arms.policies("switch_all", 3, 2) == ("original", "original", "surrogate")
    assert arms.policies("random", 3, 2, switched=False) == ("original",) * 3
    assert arms.policies("soma", 2, 1) == ("soma", "soma")
    assert arms.policies("original_one_core", 2, 1) == ("original", "original")
    assert arms.policies("routellm", 1, 1) == ("routellm",)


def test_random_draws_the_share_it_was_told() -> None:
    assert sum(arms.drawn(9, 0.67, "a")) == 6
    assert arms.drawn(9, 0.5, "a") == arms.drawn(9, 0.5, "a")
    assert any(arms.drawn(9, 0.5, "a") != arms.drawn(9, 0.5, str(seed)) for seed in range(9))


def test_repeats_in_turn_play_every_dialogue_once() -> None:
    dialogues = {f"d{n}": ("a", "b", "c") for n in range(7)}
    blocks = plan(dialogues, ("original",), 3, Load(3, 1.0, 1.0), 0, "run", in_turn=True)
    played = [visit.dialogue for block in blocks for visit in block.visits]
    assert set(played) == set(dialogues)
    assert len(played) == 9


def test_a_quicker_block_has_the_same_sessions_closer_together() -> None:
    (block,) = plan({"d": ("a", "b")}, ("soma",), 1, Load(3, 1.0, 1.0), 0, "run")
    found = quicker(block, 2.0, "x")
    assert [v.arrives_s * 2 for v in found.visits] == [v.arrives_s for v in block.visits]
    assert [v.thinks_s for v in found.visits] == [v.thinks_s for v in block.visits]
    assert not {v.session for v in found.visits} & {v.session for v in block.visits}


BLOCK = Block(0, "soma", (Visit("v", "d", ("q",), 0.0, (), ("soma",)),))


def test_a_kept_block_comes_back_as_it_was_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    turn = Answered(1, "original", None, "warm", 0.0, 0.1, 1.0, 10, 5, 3, "secret", None)
    session = Played(BLOCK.visits[0], (turn,), ({"kind": "judged", "data": {"gap": 0.1}},))
    reading = Reading(1.0, {"original": 2.0}, {"original": 1.0}, {"original": {"prompt": 10.0}})
    store = Kept(tmp_path / "blocks")
    store.write("key", kept.written([session], 3.0, reading, {"server": 0.1}))
    found = store.read("key")
    assert found is not None
    assert kept.played(found, BLOCK) == ([session], 3.0, reading, {"server": 0.1})
    assert (tmp_path / "blocks" / "key.json").stat().st_mode & 0o077 == 0
    assert store.read("other") is None
    assert Kept(None).read("key") is None


def test_a_block_of_other_inputs_is_not_taken_up() -> None:
    visit = BLOCK.visits[0]
    key = kept.inputs(BLOCK, {"config": 1})
    renamed = replace(BLOCK, visits=(replace(visit, session="other"),))
    assert kept.inputs(renamed, {"config": 1}) == key
    for change in ({"turns": ("r",)}, {"arrives_s": 1.0}, {"policies": ("original",)}, {"dialogue": "e"}):
        assert kept.inputs(replace(BLOCK, visits=(replace(visit, **change),)), {"config": 1}) != key
    assert kept.inputs(BLOCK, {"config": 2}) != key
    assert kept.inputs(replace(BLOCK, arm="original"), {"config": 1}) != key


def test_the_test_part_alone_is_played_and_all_of_it() -> None:
    (study,) = studies("--workloads", WORKLOADS, "--out", "nowhere")
    assert {visit.dialogue for block in study.blocks for visit in block.visits} == set(study.dialogues)
    assert len(study.dialogues) == 36
    (tuning,) = studies("--workloads", WORKLOADS, "--part", "tuning", "--quick")
    assert not set(tuning.dialogues) & set(study.dialogues)
    assert study.frozen is not None
    assert tuning.frozen is None
    assert study.options.keep == Path("nowhere") / "blocks"


def test_a_test_part_with_another_threshold_is_not_played() -> None:
    with pytest.raises(ConfigError, match=r"gate.accept_threshold: found 0.3; expected"):
        studies("--workloads", WORKLOADS, "--quick", "--set", "gate.accept_threshold=0.3")
    studies("--workloads", WORKLOADS, "--quick", "--part", "tuning", "--set", "gate.accept_threshold=0.3")


def test_both_pairs_are_played_by_one_command() -> None:
    configs = [
        word for name in ("cpu_demo", "cpu_weak") for word in ("--config", str(ROOT / f"configs/{name}.yaml"))
    ]
    first, second = studies("--workloads", WORKLOADS, *configs)
    assert (first.options.config.stem, second.options.config.stem) == ("cpu_demo", "cpu_weak")
    assert {"soma", "soma_paper", "random", "switch_all", "original_one_core"} <= set(first.options.arms)


def test_sessions_with_a_change_go_over_to_another_workload() -> None:
    (study,) = studies("--workloads", WORKLOADS)
    drift = [block for stage in study.stages for block in stage.drift]
    assert {block.arm for block in drift} == {"soma", "soma_paper"}
    for visit in drift[0].visits:
        at = study.changes[visit.dialogue]
        assert at == DEMO.warm_window + 4
        (after,) = [name for name, turns in study.dialogues.items() if turns == visit.turns[at - 1 :]]
        assert after.partition(".")[0] not in visit.dialogue


def test_capacity_is_looked_for_once_while_the_last_repeat_s_servers_run() -> None:
    (study,) = studies("--workloads", WORKLOADS)
    ladders = [block for stage in study.stages for block in stage.ladders]
    assert sorted(block.arm for block in ladders) == ["original", "soma"]
    assert {block.repeat for block in ladders} == {max(block.repeat for block in study.blocks)}


def test_free_dialogues_are_played_beside_workloads_without_a_truth(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"chat": [f"turn {n}" for n in range(8)]}))
    (study,) = studies("--workloads", WORKLOADS, "--dialogues", str(path))
    assert "free.chat" in study.dialogues
    assert "free.chat" not in study.checks


def test_random_without_soma_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected soma beside random"):
        studies("--workloads", WORKLOADS, "--arms", "original,random")


def test_one_server_cannot_be_two() -> None:
    with pytest.raises(ConfigError, match="expected servers of our own"):
        studies("--url", "http://127.0.0.1:1/v1", "--arms", "original,soma_paper")


class FakeUsers:
    """Answers every turn of a block at once; `error` breaks its sessions off."""

    def __init__(self, error: str | None = None) -> None:
        self.error = error
        self.removed = 0

    async def play(self, block: Block) -> tuple[list[Played], float]:
        turn = Answered(1, "original", None, "", 0.0, 0.1, 1.0, 10, 5, 3, "four", None)
        return [Played(visit, (turn,), (), self.error) for visit in block.visits], 2.0

    async def remove(self, played: list[Played]) -> None:
        self.removed += len(played)


class FakeMeter:
    def __init__(self) -> None:
        self.idling: dict[str, float] = {}

    async def read(self) -> Reading:
        return Reading(1.0, {"server": 0.0}, {"original": 1.0}, {})


def a_server(users: FakeUsers) -> Any:
    (study,) = studies("--workloads", WORKLOADS, "--quick")
    server = Server(study, study.stages[0], AsyncExitStack(), lambda line: None, lambda one: None)
    process = SimpleNamespace(alive=lambda: True, exit_code=lambda: None)
    server._open = users, FakeMeter(), process  # type: ignore[assignment]
    return server


async def test_a_block_that_was_played_is_kept_whole_and_its_sessions_are_removed() -> None:
    users = FakeUsers()
    found = await a_server(users).play(BLOCK)
    assert found["wall_s"] == 2.0
    assert [len(one["turns"]) for one in found["sessions"]] == [1]
    assert users.removed == 1


async def test_a_block_whose_session_broke_off_is_not_kept() -> None:
    with pytest.raises(IncompleteRun, match="soma, repeat 0: gone"):
        await a_server(FakeUsers("gone")).play(BLOCK)


async def test_a_block_without_an_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    users = FakeUsers()

    async def never(block: Block) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(users, "play", never)
    monkeypatch.setattr("study.server.BLOCK_S", 0.05)
    with pytest.raises(IncompleteRun, match="expected fewer --sessions"):
        await a_server(users).play(BLOCK)


async def test_a_run_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ("--quick", "--capacity", "1")
    (study,) = studies("--workloads", WORKLOADS, *quick, "--keep", str(tmp_path / "blocks"))
    played: list[str] = []

    async def play(self: Server, block: Block) -> dict[str, Any]:
        if len(played) == 2:
            raise IncompleteRun("ended")
        played.append(block.arm)
        users: Any = FakeUsers()
        meter: Any = FakeMeter()
        return await self._measured(block, users, meter)

    monkeypatch.setattr(Server, "play", play)
    player = Player(study, Kept(study.options.keep), lambda line: None)
    with pytest.raises(IncompleteRun):
        await player.stage(study.stages[0])
    assert sorted(played) == ["original", "surrogate"]  # ended at the first rung of the original's capacity
    played.clear()
    player = Player(study, Kept(study.options.keep), lambda line: None)
    await player.stage(study.stages[0])
    assert played == ["original"]  # that rung alone
    assert [one.block.arm for one in player.measured] == [block.arm for block in study.stages[0].blocks]
    assert {turn.correct for one in player.measured for turn in one.turns} == {False}  # "four" was graded


async def test_every_block_of_an_arm_asks_for_its_policy_those_with_a_change_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (study,) = studies("--workloads", WORKLOADS, "--arms", "original,soma,soma_paper", "--sessions", "36")
    asked: list[tuple[str, str]] = []

    async def play(self: Server, block: Block) -> dict[str, Any]:
        asked.extend((block.arm, policy) for visit in block.visits for policy in visit.policies)
        users: Any = FakeUsers()
        meter: Any = FakeMeter()
        return await self._measured(block, users, meter)

    monkeypatch.setattr(Server, "play", play)
    player = Player(study, Kept(None), lambda line: None)
    stage = next(stage for stage in study.stages if stage.blocks[0].arm == "soma_paper")
    await player.stage(replace(stage, ladders=()))
    assert set(asked) == {("soma_paper", "soma")}
    assert [block.block.arm for block in player.drift["soma_paper"]] == ["soma_paper"]
