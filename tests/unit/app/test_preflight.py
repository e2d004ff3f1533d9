"""Preflight on real folders, ports and this machine's own memory."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.adapter_files import RANK, WIDTH, write_adapter

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


def write_weights(path: Path, size: int) -> None:
    """A whole safetensors file."""
    head = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(size))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    folders = {role: tmp_path / role for role in ("original", "surrogate", "encoder")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
        write_weights(folder / "model.safetensors", 1000)
        (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return folders


@pytest.fixture
def document(unused_tcp_port: int, tmp_path: Path) -> dict[str, Any]:
    """A configuration that fits a small machine with the CPU build."""
    return {
        "original_model": "org/original",
        "surrogate_model": "org/surrogate",
        "server": {"port": unused_tcp_port},
        "storage": {"url": f"sqlite+aiosqlite:///{tmp_path}/sessions.db"},
        "adapters": {"root": f"{tmp_path}/adapters"},
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
    with (models["surrogate"] / "model.safetensors").open("r+b") as weights:
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


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://x", "found mysql; expected sqlite+aiosqlite or postgresql+asyncpg"),
        ("sqlite:///{tmp}/s.db", "found sqlite; expected"),
        ("nonsense", "found something else (ArgumentError); expected an SQLAlchemy URL"),
        ("sqlite+aiosqlite:////proc/none/sessions.db", "/proc/none cannot be written"),
        ("sqlite+aiosqlite:///{tmp}/other.db", "other.db: file is not a database"),
        ("sqlite+aiosqlite:///{tmp}/other.db/sessions.db", "other.db cannot be written"),
        ("sqlite+aiosqlite:///{tmp}", "cannot be opened: Is a directory"),
        ("postgresql+asyncpg://u:secret@127.0.0.1:9/x", "does not answer (ConnectionRefusedError)"),
    ],
)
def test_a_session_database_that_cannot_be_opened_is_told(
    url: str, told: str, document: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "other.db").write_bytes(b"no database at all\n" * 100)
    document["storage"]["url"] = url.replace("{tmp}", str(tmp_path))
    found = problems(document, models)
    assert "1 problem\n" in found
    assert told in found
    assert "secret" not in found


def test_a_session_database_is_made_or_taken(document: dict[str, Any], models: dict[str, Path]) -> None:
    document["storage"]["url"] = document["storage"]["url"].replace("sessions.db", "new/folder/sessions.db")
    assert any(line.startswith("sessions in sqlite+aiosqlite:///") for line in check(document, models))
    file = Path(document["storage"]["url"].removeprefix("sqlite+aiosqlite:///"))
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE t (x)")
    check(document, models)


@pytest.mark.parametrize(
    ("root", "told"),
    [
        ("{tmp}/file", "adapters.root: {tmp}/file cannot be written"),
        ("/proc/none", "adapters.root: /proc/none cannot be written"),
        ("nothing://bucket", "adapters.root: found nothing://bucket; expected a directory or a URL"),
    ],
)
def test_an_adapter_store_that_cannot_be_opened_is_told(
    root: str, told: str, document: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    document["adapters"] = {"root": root.replace("{tmp}", str(tmp_path)), "cache": f"{tmp_path}/cache"}
    assert told.replace("{tmp}", str(tmp_path)) in problems(document, models)


def first_adapter(folder: Path, **config: Any) -> dict[str, Any]:
    write_adapter(folder, base_model_name_or_path="surrogate", **config)
    (folder / "soma.json").write_text('{"tenant": "*"}')
    return {"init_from": str(folder), "rank": RANK, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def test_an_adapter_to_start_from_has_to_be_there_and_to_fit(
    document: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    document["lora"] = {"init_from": "/nowhere"}
    assert "lora.init_from: adapter nowhere rejected: adapter_config.json is missing" in problems(
        document, models
    )
    document["lora"] = first_adapter(tmp_path / "first")
    assert "model.layers.0.self_attn.q_proj: expected a module of the base model" in problems(document, models)
    names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "qv"]
    size = {**ARCHITECTURE, "hidden_size": WIDTH, "num_attention_heads": 1, "num_key_value_heads": 1}
    (models["surrogate"] / "config.json").write_text(json.dumps(size))
    save_file({name: torch.zeros(1) for name in names}, models["surrogate"] / "model.safetensors")
    assert f"sessions start from {tmp_path / 'first'}" in check(document, models)
    document["lora"] |= {"rank": 8, "alpha": 16}
    found = problems(document, models)
    assert "found rank 4; expected 8" in found
    assert "found alpha 8.0; expected 16" in found


def test_an_adapter_that_scales_otherwise_is_none_to_start_from(
    document: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "qv"]
    size = {**ARCHITECTURE, "hidden_size": WIDTH, "num_attention_heads": 1, "num_key_value_heads": 1}
    (models["surrogate"] / "config.json").write_text(json.dumps(size))
    save_file({name: torch.zeros(1) for name in names}, models["surrogate"] / "model.safetensors")
    document["lora"] = first_adapter(tmp_path / "first", use_rslora=True)
    assert "found use_rslora; expected one alpha / rank" in problems(document, models)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_file_of_a_model_that_is_cut_off_is_told(
    file: str, document: dict[str, Any], models: dict[str, Path]
) -> None:
    path = models["surrogate"] / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = problems(document, models)
    assert f"surrogate: {path}: " in found


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"original_model": "a/model", "surrogate_model": "b/model"}, "found 'model' for both models"),
        ({"original_model": "a/soma"}, "original.name: found 'soma'"),
        ({"surrogate": {"name": "soma:x"}}, "surrogate.name: found 'soma:x'"),
    ],
)
def test_names_that_clients_could_not_tell_apart_are_told(
    names: dict[str, Any], told: str, document: dict[str, Any], models: dict[str, Path]
) -> None:
    document["surrogate"] |= names.pop("surrogate", {})
    assert told in problems(document | names, models)


def test_a_server_that_others_reach_without_a_key_is_noted(
    document: dict[str, Any], models: dict[str, Path]
) -> None:
    assert "access.mode is open" not in "\n".join(check(document, models))
    document["server"]["host"] = "0.0.0.0"
    assert "note: access.mode is open, and 0.0.0.0 may be reached" in "\n".join(check(document, models))
    document["access"] = {"mode": "keys"}
    assert "access.mode is open" not in "\n".join(check(document, models))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_a_server_is_reached_from_this_machine_wherever_it_listens(host: str, url: str) -> None:
    assert parse_config({"server": {"host": host}}, "test").server.url == url


@pytest.mark.slow
def test_arguments_that_vllm_does_not_know_are_told_by_role(
    document: dict[str, Any], models: dict[str, Path]
) -> None:
    document["original"]["extra_args"] = ["--nonsense-flag"]
    document["surrogate"]["extra_args"] = ["--max-logprobs", "many"]
    found = problems(document, models)
    assert "arguments of the original (extra_args, parsers): unrecognized arguments: --nonsense-flag" in found
    assert "arguments of the surrogate (extra_args, parsers): argument --max-logprobs: " in found
    document["original"]["extra_args"] = document["surrogate"]["extra_args"] = ["--max-logprobs", "30"]
    assert "vLLM takes the arguments of the original" in check(document, models)


def test_models_that_are_not_here_are_told_with_everything_else(
    document: dict[str, Any], models: dict[str, Path]
) -> None:
    document["server"]["host"] = "192.0.2.1"
    with pytest.raises(PreflightError) as error:
        preflight(parse_config(document, "test"), None, None, models["encoder"], ["model a: no", "model b: no"])
    assert "3 problems" in str(error.value)


def test_every_problem_is_told_at_once(document: dict[str, Any], models: dict[str, Path]) -> None:
    document["server"]["host"] = "192.0.2.1"
    document["original"]["cpu_cores"] = "100000"
    document["surrogate"]["kv_cache_gib"] = 1e6
    (models["encoder"] / "config.json").unlink()
    told = problems(document, models)
    assert "4 problems" in told
    assert told.count("\n  - ") == 4


def test_a_judge_without_its_model_is_told(document: dict[str, Any], models: dict[str, Path]) -> None:
    folder = models["encoder"]
    document["gate"] = {"gap": "cross_encoder", "judge_model": str(folder)}
    assert "gate.judge_model: found None; expected a model for sequence classification" in problems(
        document, models
    )
    named = {"architectures": ["BertForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE | named))
    assert any(line.startswith("gate.judge_model: encoder, ") for line in check(document, models))
    document["gate"]["judge_model"] = str(folder / "none")
    assert "gate.judge_model: " in problems(document, models)


def test_a_judge_whose_endpoint_cannot_be_asked_is_told(
    document: dict[str, Any], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {
        "gap": "llm",
        "judge_model": "m",
        "judge_url": "nowhere",
        "judge_api_key_env": "SOMA_TEST_JUDGE_KEY",
    }
    document["gate"] = gate
    told = problems(document, models)
    assert "gate.judge_url: found nowhere; expected http(s)://host[:port]/v1" in told
    assert "gate.judge_api_key_env: the environment variable SOMA_TEST_JUDGE_KEY is not set" in told
    monkeypatch.setenv("SOMA_TEST_JUDGE_KEY", "k")
    gate["judge_url"] = "https://judge.example/v1"
    assert "answers are compared by, and sent to, judge.example" in check(document, models)
