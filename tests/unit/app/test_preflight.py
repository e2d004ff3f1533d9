"""Preflight on real folders, ports and this machine's own memory."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from soma_vllm.app.preflight import preflight
from soma_vllm.config import parse_config
from soma_vllm.errors import PreflightError
from soma_vllm.versions import installed_vllm

ARCHITECTURE = {
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    folders = {role: tmp_path / role for role in ("original", "surrogate", "encoder")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
        (folder / "model.safetensors").write_bytes(bytes(1000))
        (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return folders


@pytest.fixture
def document(unused_tcp_port: int) -> dict[str, Any]:
    """A configuration that fits a small machine with the CPU build."""
    return {
        "server": {"port": unused_tcp_port},
        "original": {"kv_cache_gib": 0.01},
        "surrogate": {"kv_cache_gib": 0.01},
    }


def check(document: dict[str, Any], models: dict[str, Path], external: bool = False) -> list[str]:
    original = None if external else models["original"]
    return preflight(parse_config(document, "test"), original, models["surrogate"], models["encoder"])


def problems(document: dict[str, Any], models: dict[str, Path], external: bool = False) -> str:
    with pytest.raises(PreflightError) as error:
        check(document, models, external)
    return str(error.value)


def test_a_fit_machine_gets_a_report(document: dict[str, Any], models: dict[str, Path]) -> None:
    lines = "\n".join(check(document, models))
    assert f"vLLM {installed_vllm()}" in lines
    assert f"127.0.0.1:{document['server']['port']} is free" in lines
    assert "memory: about " in lines
    assert "note: name cpu_cores of both engines" in lines


def test_a_port_in_use_is_told(document: dict[str, Any], models: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        document["server"]["port"] = port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in problems(document, models)


def test_a_host_that_is_not_ours_is_told(document: dict[str, Any], models: dict[str, Path]) -> None:
    document["server"]["host"] = "192.0.2.1"
    assert "cannot listen on 192.0.2.1" in problems(document, models)


def test_a_missing_model_is_told_with_what_it_lacks(document: dict[str, Any], models: dict[str, Path]) -> None:
    (models["original"] / "model.safetensors").unlink()
    (models["encoder"] / "config.json").unlink()
    told = problems(document, models)
    assert "2 problems" in told
    assert f"original: {models['original']} has no *.safetensors" in told
    assert f"encoder: {models['encoder']} has no config.json" in told


def test_a_model_without_a_chat_template_is_told(document: dict[str, Any], models: dict[str, Path]) -> None:
    (models["surrogate"] / "tokenizer_config.json").write_text("{}")
    assert "has no chat template" in problems(document, models)
    (models["surrogate"] / "chat_template.jinja").write_text("{{ messages }}")
    check(document, models)


def test_more_memory_than_the_machine_has_is_told_item_by_item(
    document: dict[str, Any], models: dict[str, Path]
) -> None:
    document["original"]["kv_cache_gib"] = 1e6
    told = problems(document, models)
    assert "1 problem\n" in told
    assert "memory: found " in told
    assert "To fit: lower original.kv_cache_gib from 1e+06 to at most " in told
    assert "original 10737" in told


def test_adapters_and_a_wider_dtype_count(document: dict[str, Any], models: dict[str, Path]) -> None:
    with (models["surrogate"] / "model.safetensors").open("wb") as weights:
        weights.truncate(500_000_000_000)
    document["surrogate"].update(dtype="float32", max_cpu_loras=10_000_000)
    told = problems(document, models)
    assert "surrogate 1002.2" in told
    # 10 million adapters of rank 8, two layers, (128 + 96 + 96 + 128 + 3 * 192) numbers per rank, 2 bytes each
    assert f"adapters {8e7 * 2 * 1024 * 2 / 1e9:.1f}" in told


def test_what_to_lower_and_by_how_much_is_told_where_one_key_is_enough(
    document: dict[str, Any], models: dict[str, Path]
) -> None:
    document["surrogate"]["max_cpu_loras"] = 10_000_000
    found = re.search(
        r"lower surrogate\.max_cpu_loras from 10000000 to at most (\d+)", problems(document, models)
    )
    assert found is not None
    # Half of it, since other programs come and go.
    document["surrogate"]["max_cpu_loras"] = int(int(found[1]) * 0.5)
    check(document, models)
    document["surrogate"].update(max_cpu_loras=64, kv_cache_gib=1000.0)
    found = re.search(
        r"lower surrogate\.kv_cache_gib from 1000 to at most ([\d.]+)", problems(document, models)
    )
    assert found is not None
    document["surrogate"]["kv_cache_gib"] = float(found[1]) * 0.5
    check(document, models)


def test_slots_that_nothing_can_use_and_memory_for_no_more_than_slots_are_noted(
    document: dict[str, Any], models: dict[str, Path]
) -> None:
    document["surrogate"].update(max_loras=8, max_cpu_loras=8, max_num_seqs=4)
    lines = "\n".join(check(document, models))
    assert "surrogate.max_loras: 8 slots, but only 4 requests at once" in lines
    assert "surrogate.max_cpu_loras: as many as slots, 8" in lines


def test_a_draft_model_needs_the_originals_vocabulary_and_memory_of_its_own(
    document: dict[str, Any], models: dict[str, Path]
) -> None:
    document["original"]["draft_tokens"] = 3
    for role, size in (("original", 1000), ("surrogate", 1000)):
        (models[role] / "config.json").write_text(json.dumps({**ARCHITECTURE, "vocab_size": size}))
    assert "the surrogate drafts for the original" in check(document, models)
    (models["surrogate"] / "config.json").write_text(json.dumps({**ARCHITECTURE, "vocab_size": 999}))
    found = problems(document, models)
    assert "original.draft_tokens: found vocabularies of 1000 (original) and 999 (surrogate)" in found


def test_a_context_longer_than_the_models_is_told(document: dict[str, Any], models: dict[str, Path]) -> None:
    document["surrogate"]["max_model_len"] = 5000
    assert "surrogate.max_model_len: found 5000; expected at most 4096" in problems(document, models)


@pytest.mark.parametrize("cores", ["100000", "0-x"])
def test_cores_that_are_not_there_are_told(
    document: dict[str, Any], models: dict[str, Path], cores: str
) -> None:
    document["original"]["cpu_cores"] = cores
    assert "original.cpu_cores: found " in problems(document, models)


def test_engines_on_the_same_cores_are_warned_about(document: dict[str, Any], models: dict[str, Path]) -> None:
    core = str(min(os.sched_getaffinity(0)))
    document["original"]["cpu_cores"] = document["surrogate"]["cpu_cores"] = core
    lines = check(document, models)
    assert f"original runs on cores {core}" in lines
    assert "note: both engines share their cores; each slows the other" in lines


def test_a_rank_that_vllm_rounds_up_is_noted(document: dict[str, Any], models: dict[str, Path]) -> None:
    document["lora"] = {"rank": 12}
    assert any("rank 12 take slots of rank 16" in line for line in check(document, models))


def fake_gpus(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi of our own, first in PATH."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    listed = "".join(f"echo 'GPU {number}: a device'\n" for number in range(count))
    program.write_text(f"#!/bin/sh\n{listed}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_cuda_without_a_gpu_is_told(
    document: dict[str, Any], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(tmp_path / "bin", 0, monkeypatch)
    document["training"] = {"device": "cuda"}
    assert "training.device: found cuda; expected GPUs" in problems(document, models)


def test_a_gpu_that_is_not_listed_and_one_shared_too_greedily_are_told(
    document: dict[str, Any], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(tmp_path / "bin", 2, monkeypatch)
    for role in ("original", "surrogate"):
        document[role].update(device="cuda", gpu="2", gpu_memory_utilization=0.6)
    told = problems(document, models)
    assert "gpu 2 is not among the 2" in told
    assert "take 1.2; expected at most 1" in told


def test_an_external_original_needs_no_folder_but_a_url_and_its_key(
    document: dict[str, Any], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BIG_KEY", raising=False)
    document["original"] = {"url": "https://llm.example/v1"}
    assert "the original is served by llm.example" in check(document, models, external=True)
    document["original"] = {"url": "llm.example/v1", "api_key_env": "BIG_KEY"}
    told = problems(document, models, external=True)
    assert "original.url: found llm.example/v1" in told
    assert "BIG_KEY is not set" in told


def test_every_problem_is_told_at_once(document: dict[str, Any], models: dict[str, Path]) -> None:
    document["server"]["host"] = "192.0.2.1"
    document["original"]["cpu_cores"] = "100000"
    document["surrogate"]["kv_cache_gib"] = 1e6
    (models["encoder"] / "config.json").unlink()
    told = problems(document, models)
    assert "4 problems" in told
    assert told.count("\n  - ") == 4
