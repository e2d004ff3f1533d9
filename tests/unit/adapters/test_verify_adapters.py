"""What an adapter's files must be, one spoiled file at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support.adapter_files import BASE_MODEL, RANK, WIDTH, module, tensors, write_adapter

from soma_vllm.adapters.store.base_model import shapes_of
from soma_vllm.adapters.store.verify import Demands, FileFacts, verify
from soma_vllm.errors import AdapterError, AdapterRejected

Q_A = f"{module(0, 'q_proj')}.lora_A.weight"


def problems_of(directory: Path, **demands: Any) -> str:
    with pytest.raises(AdapterRejected) as caught:
        verify(directory, Demands(**demands))
    return "; ".join(caught.value.problems)


def test_a_sound_adapter_passes_and_its_facts_are_told(tmp_path: Path) -> None:
    demands = Demands(max_rank=RANK, base_model="/elsewhere/tiny-surrogate")
    facts, _ = verify(write_adapter(tmp_path), demands)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert (facts.rank, facts.alpha, facts.modules) == (RANK, 8.0, ("q_proj", "v_proj"))
    assert facts.base_model == BASE_MODEL
    assert facts.weights == FileFacts(hashlib.sha256(weights).hexdigest(), len(weights))


def test_what_peft_itself_saves_passes(tmp_path: Path) -> None:
    model = torch.nn.Sequential()
    model.add_module("q_proj", torch.nn.Linear(WIDTH, WIDTH))
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    facts, _ = verify(tmp_path, Demands(max_rank=RANK))
    assert (facts.rank, facts.modules) == (RANK, ("q_proj",))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type: found 'IA3'; expected 'LORA'"),
        ({"r": 0}, "r: found 0; expected a positive integer"),
        ({"r": "4"}, "r: found '4'; expected a positive integer"),
        ({"lora_alpha": -1}, "lora_alpha: found -1"),
        ({"target_modules": []}, "target_modules: found []"),
        ({"target_modules": ["q_proj"]}, "adapted modules: found ['q_proj', 'v_proj']; expected ['q_proj']"),
        ({"use_dora": True}, "use_dora: found True; expected False"),
        ({"bias": "all"}, "bias: found 'all'; expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: found ['lm_head']"),
        ({"rank_pattern": {"q_proj": 64}}, "rank_pattern: found {'q_proj': 64}"),
        ({"use_qalora": True}, "use_qalora: found True; expected None"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: found [1, 2]; expected None"),
        ({"target_parameters": ["experts.w"]}, "target_parameters: found ['experts.w']; expected None"),
        ({"alora_invocation_tokens": [7]}, "alora_invocation_tokens: found [7]; expected None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: found 'pissa_niter_4'"),
        ({"of_a_later_peft": {"x": 1}}, "of_a_later_peft: found {'x': 1}; expected None"),
        ({"r": 2}, f"{Q_A}: found rank 4 in shape (4, 16); expected 2"),
    ],
)
def test_a_configuration_that_is_not_a_plain_lora_is_refused(
    config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert expected in problems_of(write_adapter(tmp_path, **config))


def test_what_vllm_scales_by_and_what_is_switched_off_passes(tmp_path: Path) -> None:
    verify(write_adapter(tmp_path, use_rslora=True, use_qalora=False, target_parameters=None, loftq_config={}))


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model.", "transformer."])
def test_modules_that_the_base_model_lacks_are_refused(prefix: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"hidden_size": WIDTH, "num_hidden_layers": 2}))
    names = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors()}
    save_file({f"{name}.weight": torch.zeros(1) for name in names}, base / "model.safetensors")
    demands = Demands(shapes=shapes_of(base))
    verify(write_adapter(tmp_path / "sound"), demands)
    whole = "base_model.model."
    moved = {name.replace(whole, whole + prefix, 1): found for name, found in tensors().items()}
    with pytest.raises(AdapterRejected, match="which has none of that name"):
        verify(write_adapter(tmp_path / "moved", moved), demands)


def test_a_configuration_nested_without_end_is_told(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "adapter_config.json").write_text("[" * 100_000)
    assert "levels of nesting" in problems_of(tmp_path)


def test_a_rank_above_the_engines_is_refused(tmp_path: Path) -> None:
    assert problems_of(write_adapter(tmp_path), max_rank=2) == "r: found 4; expected at most 2"


def test_an_adapter_of_another_base_model_is_refused(tmp_path: Path) -> None:
    assert "expected 'other'" in problems_of(write_adapter(tmp_path), base_model="other")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    weights = tensors()
    weights[Q_A][1, 2] = value
    assert problems_of(write_adapter(tmp_path, weights)) == f"{Q_A}: holds values that are not finite"


@pytest.mark.parametrize("name", ["adapter_model.bin", "WEIGHTS.BIN", "optimizer.pt", "state.pkl"])
def test_a_pickle_is_refused_even_beside_sound_weights(name: str, tmp_path: Path) -> None:
    (write_adapter(tmp_path) / name).write_bytes(b"\x80\x04.")
    assert problems_of(tmp_path) == f"found {name}; expected weights as safetensors only"


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(keep: int, tmp_path: Path) -> None:
    weights = write_adapter(tmp_path) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "is not a whole safetensors file" in problems_of(tmp_path)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    weights = tensors()
    del weights[Q_A]
    assert problems_of(write_adapter(tmp_path, weights)) == "model.layers.0.self_attn.q_proj: lora_A is missing"


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("base_model.model.lm_head.weight", torch.ones(4, 4), "expected only tensors named"),
        (Q_A, torch.ones(RANK, WIDTH, 2), "expected a matrix of floats"),
        (Q_A, torch.ones(RANK, WIDTH, dtype=torch.int8), "expected a matrix of floats"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(
    name: str, tensor: torch.Tensor, expected: str, tmp_path: Path
) -> None:
    assert expected in problems_of(write_adapter(tmp_path, tensors() | {name: tensor}))


def test_no_tensors_at_all_are_refused(tmp_path: Path) -> None:
    assert "holds no tensors" in problems_of(write_adapter(tmp_path, {}))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.unlink(), "adapter_config.json is missing"),
        (lambda path: path.write_text("{", encoding="utf-8"), "adapter_config.json is not JSON"),
        (lambda path: path.write_bytes(b"\xff"), "adapter_config.json found the byte 0xff in line 1"),
        (lambda path: path.write_text("[]", encoding="utf-8"), "found a list; expected an object"),
        (lambda path: path.write_text("{}", encoding="utf-8"), "peft_type: found None"),
    ],
)
def test_an_unreadable_configuration_is_refused(
    spoil: Callable[[Path], object], expected: str, tmp_path: Path
) -> None:
    spoil(write_adapter(tmp_path) / "adapter_config.json")
    assert expected in problems_of(tmp_path)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, r=99)
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").touch()
    document = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    assert document["r"] == 99
    found = problems_of(directory, max_rank=8)
    assert found == (
        "found adapter_model.bin; expected weights as safetensors only; r: found 99; expected at most 8; "
        "adapter_model.safetensors is missing"
    )


def base_model(folder: Path, **changes: Any) -> Path:
    """A model's folder, of which there is the configuration alone."""
    folder.mkdir()
    config = {
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def fitting(kind: str, inside: int, outside: int, layer: int = 0) -> dict[str, torch.Tensor]:
    where = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
    return {
        f"{where}.lora_A.weight": torch.ones(RANK, inside),
        f"{where}.lora_B.weight": torch.ones(outside, RANK),
    }


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        ("q_proj", 16, 16),
        ("k_proj", 16, 8),
        ("v_proj", 16, 8),
        ("o_proj", 16, 16),
        ("gate_proj", 16, 32),
        ("up_proj", 16, 32),
        ("down_proj", 32, 16),
        ("c_attn", 5, 7),
    ],
)
def test_widths_follow_from_the_base_models_configuration(
    kind: str, inside: int, outside: int, tmp_path: Path
) -> None:
    demands = Demands(shapes=shapes_of(base_model(tmp_path / "base")))
    sound = write_adapter(tmp_path / "a", fitting(kind, inside, outside), target_modules=[kind])
    verify(sound, demands)
    if kind == "c_attn":  # of an architecture with names of its own: its widths are not judged
        return
    wide = write_adapter(tmp_path / "b", fitting(kind, inside + 1, outside + 2), target_modules=[kind])
    found = problems_of(wide, shapes=demands.shapes)
    assert f"lora_A: found in width {inside + 1} in shape ({RANK}, {inside + 1}); expected {inside}" in found
    assert f"lora_B: found out width {outside + 2} in shape ({outside + 2}, {RANK})" in found


def test_a_layer_that_the_base_model_does_not_have_is_refused(tmp_path: Path) -> None:
    shapes = shapes_of(base_model(tmp_path / "base"))
    found = problems_of(
        write_adapter(tmp_path / "a", fitting("q_proj", 16, 16, layer=2), target_modules=["q_proj"]),
        shapes=shapes,
    )
    assert "model.layers.2.self_attn.q_proj: found layer 2; expected one of 0 to 1" in found


def test_heads_without_a_width_of_their_own_share_the_hidden_width(tmp_path: Path) -> None:
    shapes = shapes_of(base_model(tmp_path / "base", head_dim=None, num_key_value_heads=None))
    assert shapes is not None
    assert shapes.widths["k_proj"] == (WIDTH, WIDTH)


def test_the_text_part_of_a_model_of_several_kinds_counts(tmp_path: Path) -> None:
    text = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 9}
    shapes = shapes_of(base_model(tmp_path / "base", head_dim=None, text_config=text))
    assert shapes is not None
    assert (shapes.layers, shapes.widths["q_proj"]) == (9, (64, 64))


def test_of_a_model_that_says_nothing_nothing_is_judged(tmp_path: Path) -> None:
    assert shapes_of(tmp_path) is None
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    verify(write_adapter(tmp_path / "a"), Demands(shapes=shapes_of(tmp_path)))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(AdapterError, match=r"config\.json: is not JSON"):
        Demands.of_model(tmp_path)


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    config = write_adapter(tmp_path / "a") / "adapter_config.json"
    config.rename(tmp_path / "elsewhere.json")
    config.symlink_to(tmp_path / "elsewhere.json")
    assert problems_of(tmp_path / "a") == (
        "adapter_config.json is a link; expected a file of the adapter's own"
    )
    config.unlink()
    config.symlink_to(tmp_path / "nowhere")
    assert "adapter_config.json is missing" in problems_of(tmp_path / "a")
