"""Command lines, read back by the parser of the installed vLLM."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import pytest

from soma_vllm.config import Config, Original, parse_config
from soma_vllm.engines.vllm.arguments import (
    LORA_RANKS,
    child_command,
    child_environment,
    original_arguments,
    slot_rank,
    surrogate_arguments,
    vllm_arguments,
    vllm_environment,
)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    cli_args = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return cli_args.make_arg_parser(FlexibleArgumentParser())


def test_a_childs_command_line_says_to_vllm_what_the_config_says(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    original = Original(
        dtype="bfloat16", max_model_len=2048, max_num_seqs=3, kv_cache_gib=0.5, extra_args=("--seed", "7")
    )
    command = child_command(vllm_arguments(original, "/models/big", "big"), tmp_path / "original.sock")
    assert command[1:3] == ["-m", "vllm.entrypoints.launchers.api_server.entry"]
    args = parser.parse_args(command[3:])
    assert (args.model, args.served_model_name, args.dtype) == ("/models/big", ["big"], "bfloat16")
    assert (args.max_model_len, args.max_num_seqs, args.seed) == (2048, 3, 7)
    assert args.kv_cache_memory_bytes == 512 * 1024**2
    assert args.block_size == 32
    assert args.enforce_eager is True
    assert args.enable_prefix_caching is True
    assert args.scheduling_policy == "priority"
    assert args.enable_log_requests is False
    assert args.disable_uvicorn_access_log is True
    assert args.uds == str(tmp_path / "original.sock")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_surrogate_drafts_for_the_original_where_the_config_says_so(
    parser: argparse.ArgumentParser, device: str
) -> None:
    config = parse_config({"original": {"device": device, "draft_tokens": 4}}, "test")
    args = parser.parse_args(original_arguments(config, "/models/big", "big", "/models/small"))
    assert args.speculative_config == {
        "method": "draft_model",
        "model": "/models/small",
        "num_speculative_tokens": 4,
    }
    assert args.model == "/models/big"


def test_nothing_drafts_unless_it_is_asked_for(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(original_arguments(Config(), "/models/big", "big", "/models/small"))
    assert args.speculative_config is None


def test_on_a_gpu_the_engine_takes_a_share_of_its_memory(parser: argparse.ArgumentParser) -> None:
    original = Original(device="cuda", gpu_memory_utilization=0.4)
    args = parser.parse_args(vllm_arguments(original, "/models/big", "big"))
    assert args.gpu_memory_utilization == 0.4
    assert args.kv_cache_memory_bytes is None


@pytest.mark.parametrize(
    ("device", "asked", "eager"),
    [("cpu", None, True), ("cuda", None, False), ("cuda", True, True), ("cpu", False, False)],
)
def test_a_gpu_replays_graphs_unless_the_config_says_otherwise(
    parser: argparse.ArgumentParser, device: str, asked: bool | None, eager: bool
) -> None:
    original = Original.model_validate({"device": device, "enforce_eager": asked})
    assert parser.parse_args(vllm_arguments(original, "/models/big", "big")).enforce_eager is eager


def test_the_surrogates_command_line_makes_room_for_adapters(parser: argparse.ArgumentParser) -> None:
    config = parse_config(
        {
            "lora": {"rank": 12, "target_modules": ["q_proj", "v_proj"]},
            "surrogate": {"max_loras": 2, "max_cpu_loras": 5},
        },
        "test",
    )
    args = parser.parse_args(surrogate_arguments(config, "/models/small", "small"))
    assert args.enable_lora is True
    assert (args.max_loras, args.max_cpu_loras, args.max_lora_rank) == (2, 5, 16)
    assert args.lora_target_modules == ["q_proj", "v_proj"]
    assert args.model == "/models/small"
    assert args.scheduling_policy == "priority"


def test_extra_arguments_overrule_the_configs_own(parser: argparse.ArgumentParser) -> None:
    original = Original(max_model_len=2048, extra_args=("--max-model-len", "1024"))
    assert parser.parse_args(vllm_arguments(original, "/m", "m")).max_model_len == 1024


def test_the_allowed_ranks_are_vllms_own() -> None:
    lora = pytest.importorskip("vllm.config.lora")
    assert get_args(lora.MaxLoRARanks) == LORA_RANKS


@pytest.mark.parametrize(("rank", "slot"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_a_rank_is_rounded_up_to_a_slot_vllm_has(rank: int, slot: int) -> None:
    assert slot_rank(rank) == slot


def test_a_rank_no_slot_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="found 513; expected at most 512"):
        slot_rank(513)


def test_the_environment_binds_threads_on_a_cpu_and_devices_on_a_gpu() -> None:
    on_cpu = vllm_environment(Original(cpu_cores="0-3", gpu="1"), "org/model")
    assert on_cpu["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu
    on_gpu = vllm_environment(Original(device="cuda", cpu_cores="0-3", gpu="1"), "org/model")
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "1"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in on_gpu


def test_a_local_model_keeps_the_hub_out(tmp_path: Path) -> None:
    assert vllm_environment(Original(), str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in vllm_environment(Original(), "org/model")


def test_a_child_loads_the_engine_plugin_and_asks_for_no_key() -> None:
    environment = child_environment(Original(), "org/model")
    assert environment["VLLM_PLUGINS"] == "soma_engine"
    assert environment["VLLM_API_KEY"] == ""
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"


def test_the_default_config_makes_a_command_line(parser: argparse.ArgumentParser) -> None:
    assert parser.parse_args(surrogate_arguments(Config(), "/m", "m")).max_lora_rank == 8
