"""What is played on machines of different speeds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from soma_vllm.config import Config, load_config
from soma_vllm.tools.replay.dialogues import Dialogues, Script, load_dialogues
from soma_vllm.tools.replay.plan import Plan, make_plan
from soma_vllm.tools.replay.probe import (
    Machine,
    Product,
    Speed,
    count_weights,
    machine_of,
    measure_speed,
    parse_speed,
)

ROOT = Path(__file__).parents[3]
FIRST = ("topic-change", "house-style", "rainfall-table")


def product(gflops: float, gb_per_s: float, bytes_each: int = 2, shares: bool = True) -> Product:
    """One core of so many operations and bytes a second; without sharing, rows cost the same each."""
    step_s = bytes_each / gb_per_s
    return Product("bfloat16", step_s, step_s if shares else 4 * step_s, 2 / gflops)


FAST = product(220, 11)
MIDDLING = product(60, 11)
SLOW = product(17, 9, shares=False)
CRAWLING = product(5, 4, shares=False)


def machine(product: Product) -> Machine:
    return Machine(product, product, import_s=3.0, original=1.54, surrogate=0.49, surrogate_layers=24)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(ROOT / "configs" / "cpu_demo.yaml", ["adaptation.payback=always"])


@pytest.fixture(scope="module")
def dialogues() -> Dialogues:
    return load_dialogues(ROOT / "dialogues" / "demo.json")


def planned(dialogues: Dialogues, config: Config, product: Product, minutes: float = 15) -> Plan:
    script = Script(dialogues, frozenset(["house-style"]), concurrency=3, think_s=2.0)
    return make_plan(script, config, machine(product), 60 * minutes, FIRST)


def played(plan: Plan) -> list[str]:
    """What there is time for, in order."""
    return [name for name in plan.script.dialogues if name not in plan.script.spare]


@pytest.mark.parametrize("product", [FAST, MIDDLING], ids=["avx512_bf16", "avx2"])
def test_a_machine_that_is_fast_enough_plays_everything_as_it_is(
    dialogues: Dialogues, config: Config, product: Product
) -> None:
    plan = planned(dialogues, config, product)
    assert set(played(plan)) == set(dialogues)
    assert (plan.overrides, plan.notes) == ((), ())
    assert (plan.script.concurrency, plan.script.max_tokens) == (3, config.max_new_tokens)
    assert plan.total_s < 15 * 60


@pytest.mark.parametrize("product", [FAST, MIDDLING, SLOW, CRAWLING])
def test_what_a_replay_is_asked_to_begin_with_comes_first_on_every_machine(
    dialogues: Dialogues, config: Config, product: Product
) -> None:
    assert tuple(played(planned(dialogues, config, product)))[:3] == FIRST


def test_a_slow_machine_plays_fewer_dialogues_two_at_once_and_says_so(
    dialogues: Dialogues, config: Config
) -> None:
    plan = planned(dialogues, config, SLOW)
    assert len(FIRST) <= len(played(plan)) < len(dialogues)
    assert set(plan.script.dialogues) == set(dialogues)
    assert plan.script.concurrency == 2
    assert plan.script.max_tokens < config.max_new_tokens
    assert any("only if there is time left" in note for note in plan.notes)


def test_what_a_plan_leaves_out_is_played_last_and_only_in_time_to_spare(
    dialogues: Dialogues, config: Config
) -> None:
    plan = planned(dialogues, config, SLOW)
    spare = plan.script.spare
    assert spare
    assert set(list(plan.script.dialogues)[-len(spare) :]) == spare


def test_less_time_leaves_more_out(dialogues: Dialogues, config: Config) -> None:
    less, more = (planned(dialogues, config, MIDDLING, minutes) for minutes in (4, 10))
    assert len(played(less)) < len(played(more))


def test_a_training_that_would_take_too_long_is_made_smaller_and_others_are_skipped(
    dialogues: Dialogues, config: Config
) -> None:
    plan = planned(dialogues, config, CRAWLING)
    assert "lora.steps=2" in plan.overrides
    assert "adaptation.payback=never" in plan.overrides
    assert "only house-style trains an adapter" in plan.notes
    smaller = load_config(ROOT / "configs" / "cpu_demo.yaml", list(plan.overrides))
    assert smaller.lora.checkpoints == (2,)
    assert smaller.max_new_tokens == plan.script.max_tokens


def test_the_servers_time_limit_is_never_near_a_training_that_is_expected(
    dialogues: Dialogues, config: Config
) -> None:
    plan = planned(dialogues, config, CRAWLING, 60)
    smaller = load_config(ROOT / "configs" / "cpu_demo.yaml", list(plan.overrides))
    assert smaller.adaptation.train_timeout_s >= 9 * plan.expected.training_s


def test_the_first_switch_comes_within_five_minutes_on_two_middling_cores(
    dialogues: Dialogues, config: Config
) -> None:
    assert planned(dialogues, config, MIDDLING).first_switch_s < 300


def test_a_slower_product_is_expected_to_take_longer(dialogues: Dialogues, config: Config) -> None:
    plans = [planned(dialogues, config, product, 600) for product in (FAST, MIDDLING, SLOW, CRAWLING)]
    totals = [plan.total_s for plan in plans]
    assert totals == sorted(totals)
    assert [plan.script.spare for plan in plans] == [frozenset()] * 4


PRINTED = {
    "import_s": 3.0,
    "bfloat16": {"1": 0.12, "4": 0.48, "64": 7.5},
    "float32": {"1": 0.25, "4": 0.26, "64": 1.7},
}


def test_what_the_probe_prints_becomes_a_speed() -> None:
    speed = parse_speed(json.dumps(PRINTED))
    assert speed is not None
    assert speed.import_s == 3.0
    assert speed.products["float32"].gflops == pytest.approx(75.3, abs=0.1)
    assert speed.products["bfloat16"].step_of(4) == pytest.approx(0.48)
    assert speed.describe() == "bf16 17 GFLOP/s, float32 75 GFLOP/s"


def test_engines_use_the_compiled_kernel_where_it_was_measured_unless_they_are_told_float32() -> None:
    speed = parse_speed(json.dumps(PRINTED))
    assert speed is not None
    assert speed.engines_product("bfloat16").arithmetic == "bfloat16"
    speed = parse_speed(json.dumps(PRINTED | {"packed": {"1": 0.2, "4": 0.2, "64": 1.6}}))
    assert speed is not None
    assert speed.engines_product("auto").arithmetic == "packed"
    assert speed.engines_product("float32").arithmetic == "float32"


@pytest.mark.parametrize(
    "printed", ["", "[]", "{}", '{"import_s": 1}', '{"import_s": 1, "bfloat16": {"1": 2}}']
)
def test_what_no_probe_prints_is_no_speed(printed: str) -> None:
    assert parse_speed(printed) is None


def test_a_probe_that_fails_costs_the_plan_alone() -> None:
    assert measure_speed((sys.executable, "-c", "raise SystemExit(1)")) is None
    assert measure_speed(("/nonexistent",)) is None


def test_models_that_are_elsewhere_leave_nothing_to_plan_with(config: Config) -> None:
    speed = Speed(3.0, {"bfloat16": FAST, "float32": replace(FAST, arithmetic="float32")})
    remote = config.model_copy(update={"original_model": "org/model"})
    assert machine_of(remote, speed) is None


def test_a_folder_is_as_many_weights_as_its_files_say(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 4000)
    assert count_weights(tmp_path) == pytest.approx(2e-6)
