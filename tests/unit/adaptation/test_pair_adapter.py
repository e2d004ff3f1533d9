"""Where sessions start from a pair's adapter: only from one that their own tenant, or the operator, taught."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.services import Build

from soma_vllm.errors import TrainingError
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.training.pair import ANYONE, owner_of


def adapter_of(tenant: str, root: Path) -> Path:
    root.mkdir()
    (root / "soma.json").write_text(json.dumps({"tenant": tenant}))
    return root


def tenant(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("owner", "starts"),
    [(ANYONE, True), (tenant("k"), True), (tenant("another key"), False), ("public", False)],
)
async def test_a_session_starts_from_its_own_tenants_adapter_or_from_the_operators(
    build: Build, tmp_path: Path, owner: str, starts: bool
) -> None:
    directory = adapter_of(owner, tmp_path / "pair")
    services = build(lora={"init_from": str(directory)})
    await services.registry.start()
    services.surrogate.answers = ["different", "same"]
    history: list[dict[str, Any]] = []
    for number in (1, 2):
        await services.say(history, f"question {number}", key="k")
    await services.settled()
    (request,) = services.trainer.requests
    assert request.lora.init_from == (str(directory) if starts else None)
    assert services.session().phase is Phase.SWITCHED


def test_an_adapter_that_does_not_say_whose_it_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"soma\.json: found no manifest with a tenant .* soma distill"):
        owner_of(tmp_path)
