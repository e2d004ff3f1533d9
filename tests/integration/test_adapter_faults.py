"""Everything that can be wrong with an adapter, tried on a real engine: none of it may end the engine, reach
another session's answer or leave a request stuck. And many adapters coming and going through little memory.

`SOMA_SOAK_SESSIONS` sets how many; some 2,000 by hand.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_alone import EngineAlone  # type: ignore[import-not-found]
from running import TINY, descendants  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file

from soma_vllm.config import load_config
from soma_vllm.engines.adapter_files import check_adapter_files
from soma_vllm.engines.base import ChatCall
from soma_vllm.engines.residency import Residency
from soma_vllm.engines.signature import logprobs_read, reading_body
from soma_vllm.engines.surrogate import SurrogateEngine
from soma_vllm.errors import AdapterRejected, EngineUnavailable
from soma_vllm.types import AdapterRef, Example, Signature

SLOTS, PLACES = 2, 4
CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "soma.json"
SESSIONS = int(os.environ.get("SOMA_SOAK_SESSIONS", "150"))


class House:
    """An engine, what keeps its memory, and adapters to try."""

    def __init__(self, alone: EngineAlone, trained: Path, signature: Signature, folder: Path) -> None:
        from soma_vllm.engines.vllm_internals import PrivateChat

        self.alone = alone
        self.signature = signature
        self.serving = PrivateChat(alone.client, alone.state)
        self.held: set[str] = set()
        self.residency = Residency(
            self.serving,
            PLACES - 1,
            in_use=self.held.__contains__,
            check=partial(check_adapter_files, max_rank=4, base_model="tiny-surrogate"),
        )
        self.engine = SurrogateEngine(alone.name, self.serving, residency=self.residency)
        self.trained = trained
        self._folder = folder
        self._numbers = 0

    def adapter(self, seed: int | None = None, **config: Any) -> AdapterRef:
        """The trained adapter under a new name; with a seed, one of noise that nobody trained."""
        self._numbers += 1
        path = self._folder / f"adapter-{self._numbers}"
        path.mkdir()
        weights = load_file(self.trained / WEIGHTS)
        if seed is not None:
            dice = torch.Generator().manual_seed(seed)
            weights = {n: 0.25 * torch.randn(w.shape, generator=dice) for n, w in sorted(weights.items())}
        document = json.loads((self.trained / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**document, **config}))
        return self.rewritten(AdapterRef(path.name, self._numbers, str(path)), weights, signed=seed is None)

    def rewritten(self, ref: AdapterRef, weights: dict[str, torch.Tensor], signed: bool = True) -> AdapterRef:
        """The adapter with other weights, published as if they were right."""
        path = Path(ref.path)
        save_file(weights, path / WEIGHTS)
        manifest: dict[str, Any] = {
            "weights": {"sha256": hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()}
        }
        if signed:
            manifest["training"] = {"signature": asdict(self.signature)}
        (path / MANIFEST).write_text(json.dumps(manifest))
        return ref

    async def reading(self, ref: AdapterRef | None) -> tuple[float, ...]:
        """How likely the engine finds the signature's text under an adapter, which is held meanwhile."""
        if ref is None:
            return await self.read(self.alone.name)
        self.held.add(ref.name)
        try:
            await self.engine.load(ref)
            return await self.read(ref.name)
        finally:
            self.held.discard(ref.name)

    async def read(self, model: str) -> tuple[float, ...]:
        body = await self.serving.complete_text(reading_body(model, self.signature), None)
        assert isinstance(body, dict)
        return logprobs_read(body, self.signature)

    async def answer(self, ref: AdapterRef | None, tokens: int = 24) -> str:
        body = {
            "messages": [{"role": "user", "content": "How are you today?"}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        reply = await self.engine.chat(ChatCall(body, ref))
        assert reply.body is not None
        return str(reply.body["choices"][0]["message"]["content"])

    async def inside(self) -> set[int]:
        """Numbers of the adapters in the engine, as the engine has them."""
        return set(await self.alone.client.list_loras())

    def is_well(self) -> None:
        """The engine lives, answers as it did, and holds what we think it holds."""
        assert distance(self.alone.run(self.reading(None)), self.plain) < 0.1
        assert self.alone.run(self.inside()) == {ref.number for ref in self.residency.resident()}

    plain: tuple[float, ...] = ()


def distance(these: Sequence[float], those: Sequence[float]) -> float:
    """Root mean square, nats."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(these, those, strict=True)) / len(these))


@pytest.fixture(scope="module")
def house(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("faults")
    settings = [f"surrogate.max_loras={SLOTS}", f"surrogate.max_cpu_loras={PLACES}", "lora.steps=30"]
    config = load_config(TINY, settings)
    model = tiny_models / "tiny-surrogate"
    (folder / "trained").mkdir()
    made = trained(model, config, folder / "trained")
    with EngineAlone(config, model) as alone:
        house = House(alone, folder / "trained", made, folder)
        house.plain = alone.run(house.reading(None))
        yield house


def trained(model: Path, config: Any, out: Path) -> Signature:
    """A really trained adapter, in float32, beside an engine in bfloat16."""
    from soma_vllm.config import Mining
    from soma_vllm.method.recipe import adapt, load_surrogate

    surrogate = load_surrogate(model, "float32", "cpu", 1)
    turns = [
        Example(n, ({"role": "user", "content": f"question {n}, how are you?"},), "wind wind wind wind")
        for n in (1, 2, 3)
    ]
    made = adapt(surrogate, tuple(turns[:2]), tuple(turns[2:]), Mining(enabled=False), config.lora, 0, out)
    assert made.signature is not None
    return made.signature


def test_a_trained_adapter_is_served_as_it_was_trained(house: House) -> None:
    ref = house.adapter()
    assert distance(house.alone.run(house.reading(ref)), house.signature.adapted) < 0.1
    assert distance(house.signature.adapted, house.signature.plain) > 0.3
    house.is_well()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_an_adapter_at_another_scale_than_it_was_trained_at_is_rejected(house: House, factor: float) -> None:
    alpha = json.loads((house.trained / CONFIG).read_text())["lora_alpha"]
    with pytest.raises(AdapterRejected, match="does not serve what was trained"):
        house.alone.run(house.reading(house.adapter(lora_alpha=alpha * factor)))
    house.is_well()


@pytest.mark.parametrize("module", ["q_proj", "down_proj", "layers.0."])
def test_an_adapter_that_lost_a_module_is_rejected(house: House, module: str) -> None:
    weights = load_file(house.trained / WEIGHTS)
    left = {name: weight for name, weight in weights.items() if module not in name}
    assert len(left) < len(weights)
    with pytest.raises(AdapterRejected, match="does not serve what was trained"):
        house.alone.run(house.reading(house.rewritten(house.adapter(), left)))
    house.is_well()


def test_weights_that_are_no_numbers_never_reach_the_engine(house: House) -> None:
    weights = {name: weight * float("nan") for name, weight in load_file(house.trained / WEIGHTS).items()}
    with pytest.raises(EngineUnavailable, match="found values that are not finite"):
        house.alone.run(house.reading(house.rewritten(house.adapter(), weights)))
    house.is_well()


def test_files_deleted_under_an_adapter_in_the_engine_are_not_missed_until_it_has_to_come_back(
    house: House,
) -> None:
    ref = house.adapter(seed=2)
    before = house.alone.run(house.reading(ref))
    shutil.rmtree(ref.path)
    others = [house.adapter(seed=seed) for seed in (3, 4, 5)]

    async def used_beside_others() -> tuple[float, ...]:
        house.held.add(ref.name)
        for other in others:  # more than there is room for: one that is held is not among those that go
            await house.engine.load(other)
            assert await house.answer(ref)
        found = await house.read(ref.name)
        house.held.clear()
        return found

    assert distance(house.alone.run(used_beside_others()), before) < 0.1
    for other in others:
        house.alone.run(house.engine.load(other))
    with pytest.raises(EngineUnavailable, match="not fit to be loaded: No such file"):
        house.alone.run(house.reading(ref))
    house.is_well()


def test_a_file_cut_short_before_it_is_read_again_never_reaches_the_engine(house: House) -> None:
    ref = house.adapter(seed=6)
    house.alone.run(house.reading(ref))
    house.alone.run(house.residency.unload(ref))
    weights = Path(ref.path, WEIGHTS)
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(EngineUnavailable, match=r"not fit to be loaded: adapter_model\.safetensors: found"):
        house.alone.run(house.reading(ref))
    house.is_well()


@pytest.mark.parametrize("what", ["rank", "width", "cut", "gone", "nonsense"])
def test_what_the_engine_is_given_unchecked_costs_it_nothing_but_a_refusal(house: House, what: str) -> None:
    ref = house.adapter(seed=7)
    path = Path(ref.path)
    weights = load_file(path / WEIGHTS)
    if what == "rank":
        wide = {n: w.repeat(16, 1) if "lora_A" in n else w.repeat(1, 16) for n, w in weights.items()}
        save_file(wide, path / WEIGHTS)
        (path / CONFIG).write_text(json.dumps({**json.loads((path / CONFIG).read_text()), "r": 64}))
    elif what == "width":  # as of a model that is wider
        save_file(
            {n: w.repeat(1, 2) if "lora_A" in n else w.repeat(2, 1) for n, w in weights.items()}, path / WEIGHTS
        )
    elif what == "cut":
        os.truncate(path / WEIGHTS, 100)
    elif what == "gone":
        shutil.rmtree(path)
    else:
        save_file({"model.nothing.weight": torch.zeros(2, 2)}, path / WEIGHTS)
    unchecked = Residency(house.serving, PLACES - 1, check=lambda ref: None)
    for resident in house.residency.resident():
        house.alone.run(house.residency.unload(resident))
    with pytest.raises(EngineUnavailable, match=f"could not load adapter {ref.name}"):
        house.alone.run(unchecked.load(ref))
    house.is_well()


def test_adapters_come_while_another_answers_and_its_answer_stays_its_own(house: House) -> None:
    speaker = house.adapter(seed=8)
    newcomers = [house.adapter(seed=seed) for seed in range(9, 15)]

    async def alone() -> str:
        await house.engine.load(speaker)
        return await house.answer(speaker, 200)

    async def beside() -> str:
        house.held.add(speaker.name)
        await house.engine.load(speaker)
        speaking = asyncio.create_task(house.answer(speaker, 200))
        for newcomer in newcomers:
            await house.reading(newcomer)
        assert not speaking.done(), "the answer was over before the adapters had come"
        house.held.discard(speaker.name)
        return await speaking

    expected = house.alone.run(alone())
    # Its first words; later ones may fall otherwise where the batch rounds otherwise.
    assert house.alone.run(beside())[:20] == expected[:20]
    house.is_well()


def test_many_sessions_come_and_go_through_little_memory(house: House) -> None:
    """Adapters are made, used, used again, removed; each answer is its own; memory and open files stay flat."""
    live: dict[AdapterRef, tuple[float, ...]] = {}
    footprints: list[tuple[int, int]] = []

    async def session(number: int) -> None:
        ref = house.adapter(seed=1000 + number)
        live[ref] = await house.reading(ref)
        nearest = min((distance(live[ref], other) for one, other in live.items() if one != ref), default=9.0)
        assert nearest > 0.2, "adapters that cannot be told apart would prove nothing"
        returning = list(live)[:: max(1, len(live) // SLOTS)][:SLOTS]
        readings = await asyncio.gather(*(house.reading(one) for one in returning))
        for one, found in zip(returning, readings, strict=True):
            assert distance(found, live[one]) < 0.1
        if len(live) > 8:
            gone = next(iter(live))
            del live[gone]
            await house.engine.unload(gone)
            shutil.rmtree(gone.path)

    for number in range(SESSIONS):
        house.alone.run(session(number))
        assert len(house.alone.run(house.inside())) <= PLACES - 1
        if number % 10 == 9:
            footprints.append(footprint())
    settled = footprints[len(footprints) // 3 :]
    memory, handles = ([found[which] for found in settled] for which in (0, 1))
    assert max(memory) - min(memory) < 64 * 1024**2, f"resident memory went {memory}"
    assert max(handles) - min(handles) <= 4, f"open files went {handles}"
    house.is_well()


def footprint() -> tuple[int, int]:
    """(resident bytes, open files) of the engine's processes and this one."""
    memory = handles = 0
    for pid in descendants(os.getpid()):
        memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        handles += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return memory, handles
