"""Which type engines and trainers compute in, on processors of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from soma_vllm.config import Config, parse_config
from soma_vllm.engines import arithmetic
from soma_vllm.engines.arithmetic import settle
from soma_vllm.machine import InstructionSet

HALF_A_TERABYTE = 500_000_000_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    return tmp_path


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "available_memory", lambda: HALF_A_TERABYTE)


def processor(monkeypatch: pytest.MonkeyPatch, level: InstructionSet, built: bool = True) -> None:
    monkeypatch.setattr("soma_vllm.machine.instruction_set", lambda: level)
    monkeypatch.setattr(arithmetic, "instruction_set", lambda: level)
    monkeypatch.setattr(arithmetic, "_is_built", lambda module: built)


def types(config: Config) -> tuple[str, str, str]:
    return config.original.dtype, config.surrogate.dtype, config.training.dtype


def settled(model: Path, **document: Any) -> tuple[Config, str]:
    config, lines = settle(parse_config(document, "test"), model, model)
    return config, "\n".join(lines)


def test_bf16_in_hardware_leaves_the_engines_to_vllm_and_trains_in_bf16(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, InstructionSet.AVX512_BF16)
    config, said = settled(model)
    assert types(config) == (
        "auto",
        "auto",
        "bfloat16",
    )
    assert "original: the model's own type (avx512_bf16)" in said


def test_avx2_takes_bf16_weights_with_float32_products_and_trains_in_float32(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, InstructionSet.AVX2)
    config, said = settled(model)
    assert (config.original.dtype, config.surrogate.dtype) == ("bfloat16", "bfloat16")
    assert config.training.dtype == "float32"
    assert "surrogate: bfloat16 weights, float32 products: no bf16 in this processor" in said
    assert "trainers: float32" in said


def test_without_a_compiler_avx2_takes_float32_and_says_what_is_missing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, InstructionSet.AVX2, built=False)
    config, said = settled(model)
    assert (config.original.dtype, config.surrogate.dtype) == ("float32", "float32")
    assert "is there a g++?" in said


def test_where_float32_does_not_fit_bf16_stays_and_is_called_slow(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, InstructionSet.AVX2, built=False)
    monkeypatch.setattr(arithmetic, "available_memory", lambda: 1000)
    config, said = settled(model)
    assert {config.original.dtype, config.surrogate.dtype, config.training.dtype} == {"bfloat16"}
    assert said.count("bfloat16, slow") == 3


def test_a_type_that_the_configuration_names_is_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, InstructionSet.AVX2)
    config, said = settled(
        model, original={"dtype": "float32"}, surrogate={"dtype": "float16"}, training={"dtype": "bfloat16"}
    )
    assert (config.original.dtype, config.surrogate.dtype) == ("float32", "float16")
    assert config.training.dtype == "bfloat16"
    assert said.count("as configured") == 3


def test_a_gpu_is_left_to_vllm_whatever_the_processor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, InstructionSet.AVX2)
    devices = {name: {"device": "cuda"} for name in ("original", "surrogate", "training")}
    config, _ = settled(model, **devices)
    assert types(config) == (
        "auto",
        "auto",
        "bfloat16",
    )


def test_an_endpoint_of_somebody_elses_has_no_type_to_choose(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, InstructionSet.AVX2)
    config, lines = settle(parse_config({}, "test"), None, model)
    assert config.original.dtype == "auto"
    assert not any(line.startswith("original") for line in lines)
