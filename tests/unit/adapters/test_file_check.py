"""What is looked at before an engine reads an adapter."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.lora_files import files_of, sign

from soma_vllm.adapters.store.file_check import check_adapter_files
from soma_vllm.errors import EngineUnavailable
from soma_vllm.types import AdapterRef, Signature

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "soma.json"


def test_good_files_pass_and_tell_their_signature(tmp_path: Path) -> None:
    ref = files_of(tmp_path)
    assert check_adapter_files(ref, max_rank=8, base_model="elsewhere/small") is None
    signature = Signature((1, 2, 3), (-1.0, -2.0), (-1.5, -0.5))
    sign(ref, signature)
    assert check_adapter_files(ref) == signature


def cut(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "No such file"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), "No such file"),
    "no configuration": (lambda path: (path / CONFIG).unlink(), "No such file"),
    "empty weights": (lambda path: cut(path / WEIGHTS, 0), "found 0 bytes; expected a header"),
    "a header cut short": (lambda path: cut(path / WEIGHTS, 40), "found 40 bytes; expected a header of"),
    "a tensor cut short": (lambda path: cut(path / WEIGHTS, 400), "found 400 bytes; expected "),
    "more than there was": (
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes() + b"x"),
        "bytes; expected",
    ),
    "a huge header": (lambda path: (path / WEIGHTS).write_bytes(struct.pack("<Q", 2**60)), "expected a header"),
    "a configuration that is no JSON": (lambda path: (path / CONFIG).write_text("{"), "Expecting"),
    "a configuration that is a list": (lambda path: (path / CONFIG).write_text("[]"), "found a list"),
    "a manifest with half a signature": (
        lambda path: (path / MANIFEST).write_text('{"training": {"signature": {"tokens": [1]}}}'),
        "found no 'plain'",
    ),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_not_whole_is_told(tmp_path: Path, spoil: str) -> None:
    ref = files_of(tmp_path)
    how, told = SPOILT[spoil]
    how(Path(ref.path))
    with pytest.raises(EngineUnavailable, match=f"adapter a is not fit to be loaded: .*{told}"):
        check_adapter_files(ref)


def test_a_rank_that_does_not_fit_and_another_models_adapter_are_told(tmp_path: Path) -> None:
    ref = files_of(tmp_path)
    with pytest.raises(EngineUnavailable, match="found rank 4; expected at most 2"):
        check_adapter_files(ref, max_rank=2)
    with pytest.raises(EngineUnavailable, match="found base model small; expected large"):
        check_adapter_files(ref, base_model="models/large")
    with pytest.raises(EngineUnavailable, match=r"found shape \[4, 16\]; expected rank 3"):
        check_adapter_files(files_of(tmp_path, "b", r=3))


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_weights_that_are_no_numbers_are_told(tmp_path: Path, kind: type, spoilt: float) -> None:
    ref = files_of(tmp_path)
    weights = {name: value.astype(kind) for name, value in load_file(Path(ref.path, WEIGHTS)).items()}
    save_file(weights, Path(ref.path, WEIGHTS))
    Path(ref.path, MANIFEST).unlink()
    check_adapter_files(ref)
    next(iter(weights.values()))[1, 2] = spoilt
    save_file(weights, Path(ref.path, WEIGHTS))
    with pytest.raises(EngineUnavailable, match="found values that are not finite"):
        check_adapter_files(ref)


def test_weights_that_are_not_those_published_are_told(tmp_path: Path) -> None:
    ref = files_of(tmp_path)
    weights = Path(ref.path, WEIGHTS)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EngineUnavailable, match="found SHA-256"):
        check_adapter_files(ref)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_damage_to_any_file_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ref = files_of(tmp_path_factory.mktemp("damaged"))
    path = Path(ref.path, data.draw(st.sampled_from([WEIGHTS, CONFIG, MANIFEST])))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content)))
    damaged = (
        content[:position]
        + data.draw(st.binary(max_size=16))
        + content[data.draw(st.integers(0, len(content))) :]
    )
    path.write_bytes(damaged)
    try:
        check_adapter_files(AdapterRef("a", 1, ref.path), max_rank=8, base_model="small")
    except EngineUnavailable:
        return
    assert path.name != WEIGHTS or damaged == content
