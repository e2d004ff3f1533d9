"""The table of variants: what is measured, against what, and how it would be trained."""

from __future__ import annotations

import pytest

from soma_vllm.config import Config
from soma_vllm.errors import ConfigError
from soma_vllm.tools.evaluate.variants import Variant, as_configured, choose

ANCHORED = Config.model_validate({"prefix": {"mode": "anchored"}})
FROM_PAIR = Config.model_validate({"prefix": {"mode": "anchored"}, "lora": {"init_from": "pair"}})


def names(config: Config, *asked: str) -> list[str]:
    return [variant.name for variant in choose(asked, config)]


def test_all_is_every_plain_prefix_and_every_training_under_the_configured_one() -> None:
    assert names(ANCHORED) == [
        "plain@full",
        "plain@anchored",
        "plain@sliding",
        "uniform@anchored",
        "soma-reference@anchored",
        "soma@anchored",
        "kd@anchored",
        "soma-kd@anchored",
    ]


def test_the_pair_adapter_is_a_variant_only_where_there_is_one() -> None:
    assert "kd-init@anchored" in names(FROM_PAIR)
    with pytest.raises(ConfigError, match="expected --init DIR"):
        names(ANCHORED, "kd-init@anchored")


def test_what_is_asked_for_brings_its_baselines() -> None:
    assert names(ANCHORED, "kd@sliding") == ["plain@full", "plain@anchored", "plain@sliding", "kd@sliding"]
    assert names(Config(), "plain@full") == ["plain@full"]


def test_every_unknown_name_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        names(ANCHORED, "kd@nothing", "best@full", "kd", "plain@full")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "--variant kd@nothing",
        "--variant best@full",
        "--variant kd",
    ]


def test_a_variant_changes_what_its_row_says_and_nothing_else() -> None:
    lora, mining = FROM_PAIR.lora, FROM_PAIR.mining
    assert Variant("uniform", "full").lora(lora).objective == "nll"
    assert Variant("kd", "full").lora(lora).init_from is None
    assert Variant("kd-init", "full").lora(lora) == lora.model_copy(update={"objective": "kd"})
    reference = Variant("soma-reference", "full").mining(mining)
    assert reference == mining.model_copy(update={"enabled": True, "hardness": "reference"})
    assert Variant("uniform", "full").mining(mining).enabled is False
    assert Variant("kd", "sliding").config(FROM_PAIR).prefix.mode == "sliding"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "kd@full"),
        ({"mining": {"enabled": True}}, "soma-kd@full"),
        ({"lora": {"objective": "nll"}, "prefix": {"mode": "anchored"}}, "uniform@anchored"),
        ({"lora": {"objective": "nll"}, "mining": {"enabled": True}}, "soma@full"),
        (
            {"lora": {"objective": "nll"}, "mining": {"enabled": True, "hardness": "reference"}},
            "soma-reference@full",
        ),
        ({"lora": {"init_from": "pair"}}, "kd-init@full"),
    ],
)
def test_the_gate_judges_the_variant_a_server_would_train(settings: dict[str, object], expected: str) -> None:
    assert as_configured(Config.model_validate(settings)).name == expected
