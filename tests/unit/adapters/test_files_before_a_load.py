"""What is looked at before an engine reads an adapter."""

from __future__ import annotations

import asyncio
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.lora_files import files_of, publish, sign

from soma_vllm.adapters.file_provider import FilesInPlace
from soma_vllm.adapters.store.verify import Demands
from soma_vllm.errors import EngineUnavailable
from soma_vllm.types import CONFIG, MANIFEST, WEIGHTS, AdapterRef, Signature


def check(ref: AdapterRef, **demands: Any) -> Signature | None:
    return asyncio.run(FilesInPlace(Demands(**demands)).ensure_local(ref)).signature


def test_good_files_pass_and_tell_their_signature(tmp_path: Path) -> None:
    ref = files_of(tmp_path)
    assert check(ref, max_rank=8, base_model="elsewhere/small") is None
    signature = Signature((1, 2, 3), (-1.0, -2.0), (-1.5, -0.5))
    sign(ref, signature)
    assert check(ref) == signature


def cut(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "soma.json is missing"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "no configuration": (lambda path: (path / CONFIG).unlink(), "adapter_config.json is missing"),
    "empty weights": (lambda path: cut(path / WEIGHTS, 0), "found 0 bytes; expected "),
    "a header cut short": (lambda path: cut(path / WEIGHTS, 40), "found 40 bytes; expected "),
    "a tensor cut short": (lambda path: cut(path / WEIGHTS, 400), "found 400 bytes; expected "),
    "more than there was": (
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes() + b"x"),
        "bytes; expected",
    ),
    "a huge header": (lambda path: (path / WEIGHTS).write_bytes(struct.pack("<Q", 2**60)), "not a whole"),
    "a configuration that is no JSON": (lambda path: (path / CONFIG).write_text("{"), "Expecting"),
    "a configuration that is a list": (lambda path: (path / CONFIG).write_text("[]"), "found a list"),
    "a manifest with half a signature": (
        lambda path: publish(AdapterRef("a", 1, str(path)), signature={"tokens": [1]}),
        r"found no whole signature: KeyError\('plain'\)",
    ),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_not_whole_is_told(tmp_path: Path, spoil: str) -> None:
    ref = files_of(tmp_path)
    how, told = SPOILT[spoil]
    how(Path(ref.path))
    with pytest.raises(EngineUnavailable, match=f"adapter a is not fit to be loaded: .*{told}"):
        check(ref)


def test_a_rank_that_does_not_fit_and_another_models_adapter_are_told(tmp_path: Path) -> None:
    ref = files_of(tmp_path)
    with pytest.raises(EngineUnavailable, match="r: found 4; expected at most 2"):
        check(ref, max_rank=2)
    with pytest.raises(EngineUnavailable, match="found 'models/small'; expected 'models/large'"):
        check(ref, base_model="models/large")
    with pytest.raises(EngineUnavailable, match=r"found rank 4 in shape \(4, 16\); expected 3"):
        check(files_of(tmp_path, "b", r=3))


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_weights_that_are_no_numbers_are_told(tmp_path: Path, kind: type, spoilt: float) -> None:
    ref = files_of(tmp_path)
    weights = {name: value.astype(kind) for name, value in load_file(Path(ref.path, WEIGHTS)).items()}
    save_file(weights, Path(ref.path, WEIGHTS))
    check(publish(ref))
    next(iter(weights.values()))[1, 2] = spoilt
    save_file(weights, Path(ref.path, WEIGHTS))
    publish(ref)
    with pytest.raises(EngineUnavailable, match="holds values that are not finite"):
        check(ref)


def test_weights_that_are_not_those_published_are_told(tmp_path: Path) -> None:
    ref = files_of(tmp_path)
    weights = Path(ref.path, WEIGHTS)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EngineUnavailable, match="expected SHA-256"):
        check(ref)


@pytest.mark.parametrize("left", [0, 5, 40, 400])
def test_weights_cut_short_before_they_were_published_are_told(tmp_path: Path, left: int) -> None:
    ref = files_of(tmp_path)
    cut(Path(ref.path, WEIGHTS), left)
    with pytest.raises(EngineUnavailable, match="is not a whole safetensors file"):
        check(publish(ref))


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
        check(AdapterRef("a", 1, ref.path), max_rank=8, base_model="small")
    except EngineUnavailable:
        return
    assert path.name != WEIGHTS or damaged == content
