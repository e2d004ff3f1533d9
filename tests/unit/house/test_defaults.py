"""What a configuration that says nothing gets."""

from __future__ import annotations

from pathlib import Path

import soma_vllm
from soma_vllm.config import Config, load_config

CONFIGS = Path(soma_vllm.__file__).parent.parent / "configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "prices.yaml")


def test_the_defaults_lie_in_the_ranges_the_paper_states() -> None:
    config = Config()
    assert 3 <= config.warm_window <= 12
    assert 4 <= config.mining.soft_len <= 64
    assert 3 <= config.mining.n_candidates <= 5
    assert 0.02 <= config.mining.beta_anti_degen <= 0.15
    assert 0.05 <= config.gate.accept_threshold <= 0.12
    assert 2 <= config.gate.consecutive_to_rollback <= 3


def test_hardness_is_not_the_inverted_form_unless_asked_for() -> None:
    assert Config().mining.hardness == "divergence"


def test_the_yardstick_is_no_model_of_any_pair() -> None:
    configs = [Config(), *(load_config(path) for path in SHIPPED)]
    pairs = {name for config in configs for name in (config.original_model, config.surrogate_model)} - {None}
    assert len(pairs) >= 4
    assert not pairs & {config.encoder.model for config in configs}
