"""What a configuration that says nothing gets."""

from __future__ import annotations

from soma_vllm.config import Config


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


def test_the_yardstick_is_not_the_surrogate() -> None:
    config = Config(surrogate_model="small")
    assert config.encoder.model not in (config.surrogate_model, config.original_model)
