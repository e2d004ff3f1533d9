"""Everything that can be wrong with an adapter, tried on a real engine: none of it may end the engine, reach
another session's answer or leave a request stuck. And many adapters coming and going through little memory.

`SOMA_SOAK_SESSIONS` sets how many; some 2,000 by hand.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine_alone import EngineAlone
from support.lora_files import publish
from support.server import TINY, descendants

from soma_vllm.adapters.file_provider import FilesInPlace
from soma_vllm.adapters.loaded import LoadedAdapters
from soma_vllm.adapters.store.manifest import LocalAdapter
from soma_vllm.adapters.store.verify import AdapterFacts, Demands, FileFacts
from soma_vllm.config import load_config
from soma_vllm.engines.adapter_probe import logprobs_read, reading_body
from soma_vllm.engines.engine import ChatCall
from soma_vllm.engines.surrogate import SurrogateEngine
from soma_vllm.errors import AdapterRejected, EngineUnavailable
from soma_vllm.types import CONFIG, WEIGHTS, AdapterRef, Example, Signature

SLOTS, PLACES = 2, 4
SESSIONS = int(os.environ.get("SOMA_SOAK_SESSIONS", "150"))


class Services:
    """An engine, what keeps its memory, and adapters to try."""

    def __init__(self, alone: EngineAlone, trained: Path, signature: Signature, folder: Path) -> None:
        from soma_vllm.engines.vllm.internals import PrivateChat

        self.alone = alone
        self.signature = signature
        self.serving = PrivateChat(alone.client, alone.state)
        self.held: set[str] = set()
        self.loaded = LoadedAdapters(
            self.serving,
            PLACES - 1,
            in_use=self.held.__contains__,
            files=FilesInPlace(Demands(max_rank=4, base_model="tiny-surrogate")),
        )
        self.engine = SurrogateEngine(alone.name, self.serving, loaded=self.loaded)
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
        return publish(ref, **({"signature": asdict(self.signature)} if signed else {}))

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
        assert self.alone.run(self.inside()) == {ref.number for ref in self.loaded.resident()}

    plain: tuple[float, ...] = ()


def distance(these: Sequence[float], those: Sequence[float]) -> float:
    """Root mean square, nats."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(these, those, strict=True)) / len(these))


@pytest.fixture(scope="module")
def services(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("faults")
    settings = [f"surrogate.max_loras={SLOTS}", f"surrogate.max_cpu_loras={PLACES}", "lora.steps=30"]
    config = load_config(TINY, settings)
    model = tiny_models / "tiny-surrogate"
    (folder / "trained").mkdir()
    made = trained(model, config, folder / "trained")
    with EngineAlone(config, model) as alone:
        services = Services(alone, folder / "trained", made, folder)
        services.plain = alone.run(services.reading(None))
        yield services


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


def test_a_trained_adapter_is_served_as_it_was_trained(services: Services) -> None:
    ref = services.adapter()
    assert distance(services.alone.run(services.reading(ref)), services.signature.adapted) < 0.1
    assert distance(services.signature.adapted, services.signature.plain) > 0.3
    services.is_well()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_an_adapter_at_another_scale_than_it_was_trained_at_is_rejected(
    services: Services, factor: float
) -> None:
    alpha = json.loads((services.trained / CONFIG).read_text())["lora_alpha"]
    with pytest.raises(AdapterRejected, match="does not serve what was trained"):
        services.alone.run(services.reading(services.adapter(lora_alpha=alpha * factor)))
    services.is_well()


@pytest.mark.parametrize("module", ["q_proj", "down_proj", "layers.0."])
def test_an_adapter_that_lost_a_module_is_rejected(services: Services, module: str) -> None:
    weights = load_file(services.trained / WEIGHTS)
    left = {name: weight for name, weight in weights.items() if module not in name}
    assert len(left) < len(weights)
    with pytest.raises(AdapterRejected, match="does not serve what was trained"):
        services.alone.run(services.reading(services.rewritten(services.adapter(), left)))
    services.is_well()


def test_weights_that_are_no_numbers_never_reach_the_engine(services: Services) -> None:
    weights = {name: weight * float("nan") for name, weight in load_file(services.trained / WEIGHTS).items()}
    with pytest.raises(EngineUnavailable, match="holds values that are not finite"):
        services.alone.run(services.reading(services.rewritten(services.adapter(), weights)))
    services.is_well()


def test_files_deleted_under_an_adapter_in_the_engine_are_not_missed_until_it_has_to_come_back(
    services: Services,
) -> None:
    ref = services.adapter(seed=2)
    before = services.alone.run(services.reading(ref))
    shutil.rmtree(ref.path)
    others = [services.adapter(seed=seed) for seed in (3, 4, 5)]

    async def used_beside_others() -> tuple[float, ...]:
        services.held.add(ref.name)
        for other in others:  # more than there is room for: one that is held is not among those that go
            await services.engine.load(other)
            assert await services.answer(ref)
        found = await services.read(ref.name)
        services.held.clear()
        return found

    assert distance(services.alone.run(used_beside_others()), before) < 0.1
    for other in others:
        services.alone.run(services.engine.load(other))
    with pytest.raises(EngineUnavailable, match=r"not fit to be loaded: .*soma\.json is missing"):
        services.alone.run(services.reading(ref))
    services.is_well()


def test_a_file_cut_short_before_it_is_read_again_never_reaches_the_engine(services: Services) -> None:
    ref = services.adapter(seed=6)
    services.alone.run(services.reading(ref))
    services.alone.run(services.loaded.unload(ref))
    weights = Path(ref.path, WEIGHTS)
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(EngineUnavailable, match=r"not fit to be loaded: .*adapter_model\.safetensors: found"):
        services.alone.run(services.reading(ref))
    services.is_well()


class Unchecked:
    """Files that nobody has looked at."""

    async def ensure_local(self, ref: AdapterRef) -> LocalAdapter:
        unknown = FileFacts("", 0)
        return LocalAdapter(ref, AdapterFacts(1, 1.0, (), "", unknown, unknown), None)


@pytest.mark.parametrize("what", ["rank", "width", "cut", "gone", "nonsense"])
def test_what_the_engine_is_given_unchecked_costs_it_nothing_but_a_refusal(
    services: Services, what: str
) -> None:
    ref = services.adapter(seed=7)
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
    unchecked = LoadedAdapters(services.serving, PLACES - 1, files=Unchecked())
    for resident in services.loaded.resident():
        services.alone.run(services.loaded.unload(resident))
    with pytest.raises(EngineUnavailable, match=f"could not load adapter {ref.name}"):
        services.alone.run(unchecked.load(ref))
    services.is_well()


def test_adapters_come_while_another_answers_and_its_answer_stays_its_own(services: Services) -> None:
    speaker = services.adapter(seed=8)
    newcomers = [services.adapter(seed=seed) for seed in range(9, 15)]

    async def alone() -> str:
        await services.engine.load(speaker)
        return await services.answer(speaker, 200)

    async def beside() -> str:
        services.held.add(speaker.name)
        await services.engine.load(speaker)
        speaking = asyncio.create_task(services.answer(speaker, 200))
        for newcomer in newcomers:
            await services.reading(newcomer)
        assert not speaking.done(), "the answer was over before the adapters had come"
        services.held.discard(speaker.name)
        return await speaking

    expected = services.alone.run(alone())
    # Its first words; later ones may fall otherwise where the batch rounds otherwise.
    assert services.alone.run(beside())[:20] == expected[:20]
    services.is_well()


def test_many_sessions_come_and_go_through_little_memory(services: Services) -> None:
    """Adapters are made, used, used again, removed; each answer is its own; memory and open files stay flat."""
    live: dict[AdapterRef, tuple[float, ...]] = {}
    footprints: list[tuple[int, int]] = []

    async def session(number: int) -> None:
        ref = services.adapter(seed=1000 + number)
        live[ref] = await services.reading(ref)
        nearest = min((distance(live[ref], other) for one, other in live.items() if one != ref), default=9.0)
        assert nearest > 0.2, "adapters that cannot be told apart would prove nothing"
        returning = list(live)[:: max(1, len(live) // SLOTS)][:SLOTS]
        readings = await asyncio.gather(*(services.reading(one) for one in returning))
        for one, found in zip(returning, readings, strict=True):
            assert distance(found, live[one]) < 0.1
        if len(live) > 8:
            gone = next(iter(live))
            del live[gone]
            await services.engine.unload(gone)
            shutil.rmtree(gone.path)

    for number in range(SESSIONS):
        services.alone.run(session(number))
        assert len(services.alone.run(services.inside())) <= PLACES - 1
        if number % 10 == 9:
            footprints.append(footprint())
    settled = footprints[len(footprints) // 3 :]
    memory, handles = ([found[which] for found in settled] for which in (0, 1))
    assert max(memory) - min(memory) < 64 * 1024**2, f"resident memory went {memory}"
    assert max(handles) - min(handles) <= 4, f"open files went {handles}"
    services.is_well()


def footprint() -> tuple[int, int]:
    """(resident bytes, open files) of the engine's processes and this one."""
    memory = handles = 0
    for pid in descendants(os.getpid()):
        memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        handles += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return memory, handles
