"""Keys that do nothing in a mode are named at start, and nothing reads them in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from support.reference_config import REFERENCE
from typer.testing import CliRunner

from soma_vllm.adaptation.training_run import TrainingBudget
from soma_vllm.app.serve import app
from soma_vllm.config import Config, Gate, Lora, Mining, Prefix, parse_config, without_effect
from soma_vllm.config.effect import CONDITIONS
from soma_vllm.method.gap.gap_judge import open_judge
from soma_vllm.method.recipe import Surrogate, adapting
from soma_vllm.sessions.state.gate import Drift
from soma_vllm.sessions.state.prefix import compress
from soma_vllm.types import Candidate, Example, SessionKey

Examples = tuple[Example, ...]
HISTORY = [
    {"role": role, "content": f"{role} says {turn}"} for turn in range(9) for role in ("user", "assistant")
]


class Reads(set[str]):
    """The keys of one section that are read."""

    def of(self, monkeypatch: pytest.MonkeyPatch, section: type[BaseModel], name: str) -> None:
        def read(owner: BaseModel, key: str) -> Any:
            if key in section.model_fields:
                self.add(f"{name}{key}")
            return object.__getattribute__(owner, key)

        monkeypatch.setattr(section, "__getattribute__", read, raising=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[BaseModel], str], Reads]:
    def watch(section: type[BaseModel], name: str) -> Reads:
        found = Reads()
        found.of(monkeypatch, section, name)
        return found

    return watch


def idle(**settings: Any) -> frozenset[str]:
    """The keys whose condition does not hold."""
    config = parse_config(settings, "test")
    return frozenset[str]().union(*(one.keys for one in CONDITIONS if not one.holds(config)))


Watch = Callable[[type[BaseModel], str], Reads]


@pytest.mark.parametrize("enabled", ["auto", False, True])
def test_nothing_of_mining_is_read_where_nothing_is_mined(
    surrogate: Surrogate, examples: Examples, held_out: Examples, reads: Watch, enabled: Any
) -> None:
    mining = Mining(enabled=enabled, soft_len=2, n_candidates=1, iters=1)
    found = reads(Mining, "mining.")
    with adapting(surrogate, examples, held_out, mining, Lora(rank=4, steps=1), 0):
        pass
    named = idle(mining={"enabled": enabled})
    assert not found & named
    assert (found > {"mining.enabled"}) is (enabled is True)
    assert ("mining.hardness" in named) is (enabled is not True)
    if enabled is True:
        assert found == {f"mining.{name}" for name in Mining.model_fields}


@pytest.mark.parametrize("mode", ["full", "sliding", "anchored"])
def test_nothing_of_a_compressed_prefix_is_read_where_the_prefix_is_another(reads: Watch, mode: Any) -> None:
    prefix = Prefix(mode=mode)
    found = reads(Prefix, "prefix.")
    shown = {str(compress([*HISTORY, HISTORY[0]], prefix, turns)) for turns in (1, 5)}
    named = idle(prefix={"mode": mode})
    assert not found & named
    every = {f"prefix.{name}" for name in Prefix.model_fields}
    assert found | (named & every) == every
    assert (len(shown) == 1) is ("compressed_prefix_turns" in named) is (mode == "full")


@pytest.mark.parametrize(("audit", "kinds"), [("generate", ["gap"]), ("score", ["gap", "surprise"])])
def test_an_audit_is_held_to_the_thresholds_of_its_kinds_alone(audit: Any, kinds: list[Any]) -> None:
    """Turns outside the locality are audited by their gap in either mode."""
    named = idle(gate={"audit": audit})
    for key in ("drift_threshold", "surprise_threshold"):
        gates = [Gate(audit=audit, **{key: value}) for value in (0.1, 1.0)]
        drifts = [{Drift().observe(kind, 0.5, gate) for gate in gates} for kind in kinds]
        assert all(len(found) == 1 for found in drifts) is (f"gate.{key}" in named)


@pytest.mark.parametrize("gap", ["facts", "encoder", "cross_encoder", "llm"])
def test_a_judges_keys_are_read_where_it_judges(
    reads: Watch, gap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soma_vllm.method.gap.cross_encoder.CrossEncoderJudge", lambda *given: None)
    gate = {"gap": gap, "judge_model": "m", "judge_url": "http://127.0.0.1:9/v1"}
    config = parse_config({"gate": gate}, "test")
    unused: Any = None
    found = reads(Gate, "gate.")
    open_judge(config, unused)
    keys = {f"gate.judge_{name}" for name in ("model", "url", "api_key_env", "timeout_s")}
    assert keys & idle(gate=gate) == keys - found


@pytest.mark.parametrize("payback", ["always", "never", "auto"])
async def test_what_things_cost_is_asked_only_where_payback_decides(payback: Any) -> None:
    class Asked(Exception):
        """The cost model was asked."""

    class CostModel:
        """All that reads `payback` and `prices`."""

        async def judge(self, session: object) -> None:
            raise Asked

    config = parse_config({"adaptation": {"payback": payback}}, "test")
    unused: Any = type("Registry", (), {"session": lambda self, key: None})()
    budget = TrainingBudget(config.adaptation, unused, unused, CostModel())  # type: ignore[arg-type]
    assert ("prices.trainer_second" in idle(adaptation={"payback": payback})) is (payback != "auto")
    if payback == "auto":
        with pytest.raises(Asked):
            await budget.objection(SessionKey("t", "s"))
    else:
        assert (await budget.objection(SessionKey("t", "s")) is None) is (payback == "always")


def test_every_listed_key_exists_and_belongs_to_a_test_of_this_file() -> None:
    modes = {one.mode for one in CONDITIONS}
    assert modes <= {
        "mining.enabled",
        "prefix.mode",
        "gate.audit",
        "gate.gap",
        "adaptation.payback",
        "adaptation.candidates",
    }
    for condition in CONDITIONS:
        for key in (*condition.keys, condition.mode):
            model: Any = Config
            *sections, leaf = key.split(".")
            for section in sections:
                model = model.model_fields[section].annotation
            assert leaf in model.model_fields


def test_the_sixteen_keys_of_a_reference_configuration_are_named() -> None:
    mining, prefix, drift = without_effect(parse_config(yaml.safe_load(REFERENCE), "reference"))
    keys = [f"mining.{name}" for name in Mining.model_fields if name not in ("enabled", "hardness", "tail")]
    assert len(keys) == 16
    assert mining == f"these keys of your file have no effect with mining.enabled: auto: {', '.join(keys)}"
    assert prefix == "these keys of your file have no effect with prefix.mode: full: compressed_prefix_turns"
    assert "gate.accept_threshold: 0.2 is served on up to a mean gap of gate.drift_threshold: 0.3" in drift


def test_keys_that_are_read_or_that_nobody_gave_are_not_named() -> None:
    steady = {"drift_threshold": 0.1}
    assert not without_effect(parse_config({"gate": steady}, "test"))
    assert not without_effect(parse_config({"gate": steady, "mining": {"enabled": True, "iters": 3}}, "test"))
    plain_only = {"gate": steady, "adaptation": {"candidates": [Candidate.PLAIN]}, "payback": {"weight": 1.0}}
    (line,) = without_effect(parse_config(plain_only, "test"))
    assert line.endswith("adaptation.candidates: [plain]: payback.weight")


def test_soma_serve_says_so_before_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "reference.yaml"
    path.write_text(REFERENCE.replace("_model: null", "_model: /nowhere"))
    done = CliRunner().invoke(app, ["--config", str(path), "--check"])
    assert done.exit_code == 1
    assert "note       these keys of your file have no effect with mining.enabled: auto" in done.output
