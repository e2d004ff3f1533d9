"""The configuration: strict, complete, compatible, and told all at once."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import pytest
from support.config_reads import unread
from support.reference_config import REFERENCE

import soma_vllm
from soma_vllm.config import Config, Gate, load_config, parse_config
from soma_vllm.errors import ConfigError

ROOT = Path(soma_vllm.__file__).parent.parent
SHIPPED = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "prices.yaml")

READ_THROUGH = {
    "storage.url": ("app/server.py", "storage.location"),
    "surrogate.name": ("config/root.py", "self.surrogate.name"),
    "sessions.headers": ("sessions/state/identity.py", "names.headers"),
    "sessions.body_fields": ("sessions/state/identity.py", "names.body_fields"),
    "access.max_body_mib": ("api/auth/access.py", "quotas.access.max_body_mib"),
    **{
        f"adapters.{name}": ("adapters/eviction_policy.py", f"budgets.{name}")
        for name in ("max_count", "max_bytes", "tenant_max_count", "tenant_max_bytes", "ttl_s")
    },
}
"""Keys that are read through an object of another module, with the file and the expression that reads them."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_file_loads(path: Path) -> None:
    load_config(path)


def test_there_are_shipped_files() -> None:
    names = {path.name for path in SHIPPED}
    assert {"default.yaml", "small_demo.yaml", "cpu_demo.yaml", "cpu_weak.yaml", "tiny.yaml"} <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_thresholds_lie_in_the_ranges_the_paper_states(path: Path) -> None:
    config = load_config(path)
    assert 3 <= config.warm_window <= 12
    assert 2 <= config.gate.consecutive_to_rollback <= 3
    if path.name != "tiny.yaml":  # random models agree on nothing
        assert 0.05 <= config.gate.accept_threshold <= 0.12


def test_a_configuration_of_the_reference_implementation_loads_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "reference.yaml"
    path.write_text(REFERENCE)
    config = load_config(path)
    assert config.mining.lambda_P == 1e-4
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.gate.accept_threshold == 0.2


def test_several_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"warm_window": True, "gate": {"accept": 0.1}, "lora": {"rank": 0}, "foo": 1}, "it")
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for part in ("warm_window: found True", "gate.accept: unknown key", "lora.rank: found 0", "foo: unknown"):
        assert part in text


def test_a_mistyped_override_is_told_with_its_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("warm_window: 4\n")
    with pytest.raises(ConfigError, match=r"--set gate\.accept_threshold: expected key=value"):
        load_config(path, ["gate.accept_threshold"])


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("gate: {accept_threshold: 0.05}\n")
    assert load_config(path, ["gate.accept_threshold=0.1"]).gate.accept_threshold == 0.1


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_holding_out_the_whole_warm_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves nothing of warm_window"):
        parse_config({"warm_window": 2, "acceptance_min_turns": 2}, "it")


def test_slots_need_a_place_in_memory_each_and_a_queue_that_is_asked_for_needs_room() -> None:
    wrong = {"max_loras": 4, "max_cpu_loras": 3, "overflow": "wait", "queue_limit": 0}
    with pytest.raises(ConfigError) as caught:
        parse_config({"surrogate": wrong}, "it")
    text = str(caught.value)
    assert "surrogate.max_cpu_loras: 3 is below surrogate.max_loras: 4; expected at least as many" in text
    assert "surrogate.queue_limit: found 0 with overflow: wait; expected at least 1" in text


def test_a_server_needs_its_models_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({}, "it").for_serving()
    assert len(caught.value.problems) == 2


def test_scoring_audits_need_an_original_that_is_a_vllm() -> None:
    settings = {"original_model": "big", "surrogate_model": "small", "gate": {"audit": "score"}}
    endpoint = {"url": "http://127.0.0.1:1/v1"}
    parse_config(settings, "it").for_serving()
    parse_config({**settings, "original": {**endpoint, "api": "vllm"}}, "it").for_serving()
    with pytest.raises(ConfigError, match=r"found 'score' with original\.api: 'openai'; expected"):
        parse_config({**settings, "original": endpoint}, "it").for_serving()


def test_an_external_endpoint_takes_no_draft_model() -> None:
    original = {"url": "http://127.0.0.1:1/v1", "name": "big", "draft_tokens": 4}
    with pytest.raises(ConfigError, match=r"original\.draft_tokens: found 4 with original\.url; expected 0"):
        parse_config({"surrogate_model": "small", "original": original}, "it").for_serving()


def package_sources() -> list[str]:
    package = ROOT / "soma_vllm"
    return [p.read_text(encoding="utf-8") for p in package.rglob("*.py") if p.parent.name != "config"]


def test_no_key_exists_that_nothing_reads() -> None:
    assert set(unread(package_sources())) <= READ_THROUGH.keys()
    for file, expression in READ_THROUGH.values():
        assert expression in (ROOT / "soma_vllm" / file).read_text(encoding="utf-8")


def test_a_key_that_nothing_reads_is_found() -> None:
    class Larger(Gate):
        """Keys that nothing reads, though other objects have attributes of these names."""

        name: str = ""
        steps: int = 1

    class Whole(Config):
        gate: Larger = Larger()
        url: str = ""

    assert {"gate.name", "gate.steps", "url"} <= set(unread(package_sources(), Whole))
    assert "gate.audit_rate" not in unread(package_sources(), Whole)


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("def f(config: Config): return config.lora.steps", True),
        ("def f(self): return self._config.lora.steps", True),
        ("def f(parts): return parts.config.lora.steps", True),
        ("def f(config):\n    lora, seed = config.lora, 1\n    return lora.steps", True),
        ("from soma_vllm.config import Lora\ndef f(settings: Lora | None): return settings.steps", True),
        ("from soma_vllm.config import Lora\ndef g() -> Lora: ...\ndef f(): return g().steps", True),
        ("def f(config): return config.gate, made.steps", False),
        ("def f(config): return config.mining.steps", False),
        ("def f(lora): return lora.steps", False),
        ("from peft import Lora\ndef f(settings: Lora): return settings.steps", False),
        ("# config.lora.steps", False),
    ],
)
def test_a_key_counts_as_read_from_its_own_section_only(source: str, read: bool) -> None:
    assert ("lora.steps" not in unread([source])) is read


def test_every_key_says_what_it_does() -> None:
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "soma_vllm" / "config").glob("*.py")]
    bare = []
    for node in (
        node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)
    ):
        for field, after in pairwise([*node.body, ast.Pass()]):
            if isinstance(field, ast.AnnAssign) and not isinstance(field.value, ast.Call):
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                bare += [] if said else [f"{node.name}.{ast.unparse(field.target)}"]
    assert not bare
