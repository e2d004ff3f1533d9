"""The soft prompt, its bounds and its words."""

from __future__ import annotations

import pytest
import torch

from soma_vllm.method import soft_prompt
from soma_vllm.method.soft_prompt import SoftPrompt, nearest_tokens, verbalize


def test_the_prompt_is_the_squashed_parameter() -> None:
    prompt = SoftPrompt(4, 6, init_std=3.0, scale=0.25, seed=0)
    assert prompt().shape == (4, 6)
    assert prompt().dtype == torch.float32
    assert torch.equal(prompt(), 0.25 * torch.tanh(prompt.parameter))
    assert float(prompt().detach().abs().max()) <= 0.25


def test_a_seed_decides_the_start_and_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (SoftPrompt(3, 5, 0.02, 0.25, seed)().detach() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_start_has_the_configured_spread() -> None:
    prompt = SoftPrompt(64, 64, init_std=0.02, scale=0.25, seed=0)
    assert float(prompt.parameter.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_verbalizing_scaled_embeddings_gives_their_tokens() -> None:
    embedding = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert verbalize(0.01 * embedding[[7, 39, 0]], embedding).tolist() == [7, 39, 0]


def test_the_nearest_tokens_are_the_same_however_the_vocabulary_is_sliced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding, vectors = torch.randn(53, 6, generator=generator), torch.randn(5, 6, generator=generator)
    excluded = torch.tensor([0, 10, 20, 30, 52])
    whole = nearest_tokens(vectors, embedding, 9, excluded)
    monkeypatch.setattr(soft_prompt, "_SLICE", 7)
    sliced = nearest_tokens(vectors, embedding, 9, excluded)
    assert torch.equal(whole[0], sliced[0])
    assert torch.allclose(whole[1], sliced[1])
    assert not bool((whole[0] == excluded.unsqueeze(1)).any())
    brute = torch.cosine_similarity(vectors.unsqueeze(1), embedding.unsqueeze(0), dim=2)
    brute[torch.arange(5), excluded] = -2
    assert whole[0].tolist() == brute.argsort(dim=1, descending=True)[:, :9].tolist()
