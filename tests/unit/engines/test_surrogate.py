"""The surrogate's engine over a stand-in for vLLM's serving object: when it fails, and what it loads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.lora_files import files_of, sign

from soma_vllm.adapters.file_provider import FilesInPlace
from soma_vllm.adapters.loaded import LoadedAdapters
from soma_vllm.adapters.store.manifest import LocalAdapter
from soma_vllm.engines.engine import ChatCall, Salts
from soma_vllm.engines.surrogate import SurrogateEngine
from soma_vllm.errors import AdapterRejected, EngineRefused, EngineUnavailable
from soma_vllm.types import AdapterRef, Agreement, Signature

REF = AdapterRef("a", 1, "nowhere")


@pytest.fixture
def here(tmp_path: Path) -> AdapterRef:
    """An adapter whose files are there."""
    ref: AdapterRef = files_of(tmp_path)
    return ref


class Serving:
    """Answers with the given events and remembers what it was asked."""

    def __init__(self, *events: str) -> None:
        self.events = events
        self.bodies: list[Mapping[str, Any]] = []
        self.added: list[str] = []
        self.removed: list[str] = []
        self.closed = False
        self.reads: dict[str, list[float]] = {}
        """By model: log-probabilities of a prompt's tokens but the first."""

    async def prompt_tokens(self, body: Mapping[str, Any]) -> list[int]:
        self.bodies.append(body)
        return [1, 2]

    async def complete_text(self, body: Mapping[str, Any], http: Any) -> Any:
        self.bodies.append(body)
        tokens = body["prompt"][1:]
        entries = [{token: {"logprob": x}} for token, x in zip(tokens, self.reads[body["model"]], strict=True)]
        return {"choices": [{"prompt_logprobs": [None, *entries]}]}

    async def complete(self, body: Mapping[str, Any], http: Any) -> Any:
        self.bodies.append(body)
        if body.get("prompt_logprobs"):
            # As vLLM's own response object holds them: token ids are numbers.
            found = [{token: {"logprob": -0.5, "rank": token - 6}} for token in (7, 8)]
            return {"choices": [], "prompt_token_ids": [1, 2, 7, 8], "prompt_logprobs": [None, {}, *found]}
        return self._stream() if body.get("stream") else {"model": body["model"], "choices": []}

    async def _stream(self) -> AsyncGenerator[str, None]:
        try:
            for event in self.events:
                yield event
        finally:
            self.closed = True

    async def add(self, ref: AdapterRef) -> None:
        await asyncio.sleep(0)
        self.added.append(ref.name)

    async def remove(self, ref: AdapterRef) -> None:
        self.removed.append(ref.name)


async def test_an_adapter_must_be_loaded_before_it_serves() -> None:
    engine = SurrogateEngine("small", Serving())
    with pytest.raises(EngineUnavailable, match="not loaded"):
        await engine.chat(ChatCall({"messages": []}, REF))


async def test_an_adapter_without_files_never_reaches_the_engine() -> None:
    serving = Serving()
    with pytest.raises(EngineUnavailable, match=r"adapter a is not fit to be loaded: .*soma\.json is missing"):
        await SurrogateEngine("small", serving).load(REF)
    assert serving.added == []


async def test_a_renewed_salt_makes_what_a_tenant_has_cached_unreachable() -> None:
    serving, salts = Serving(), Salts()
    engine = SurrogateEngine("small", serving, salts)
    for tenant in ("one", "other"):
        await engine.chat(ChatCall({"messages": []}, tenant=tenant))
    salts.renew("one")
    for tenant in ("one", "other"):
        await engine.chat(ChatCall({"messages": []}, tenant=tenant))
    before, other_before, after, other_after = (body["cache_salt"] for body in serving.bodies)
    assert before != after
    assert other_before == other_after


async def test_two_loads_at_once_are_one(here: AdapterRef) -> None:
    serving = Serving()
    engine = SurrogateEngine("small", serving)
    await asyncio.gather(engine.load(here), engine.load(here))
    assert serving.added == ["a"]
    await engine.unload(here)
    await engine.unload(here)
    assert serving.removed == ["a"]


class Files:
    """Files that a machine has to fetch first, or cannot."""

    def __init__(self, here: AdapterRef | None) -> None:
        self.here = here
        self.asked = 0

    async def ensure_local(self, ref: AdapterRef) -> LocalAdapter:
        self.asked += 1
        if self.here is None:
            raise EngineUnavailable("damaged")
        return await FilesInPlace().ensure_local(self.here)


async def test_an_adapter_is_loaded_from_where_its_files_are_on_this_machine(here: AdapterRef) -> None:
    serving, files = Serving(), Files(here)
    engine = SurrogateEngine("small", serving, loaded=LoadedAdapters(serving, room=4, files=files))
    await engine.load(AdapterRef("a", 1, "/another/machine"))
    assert engine.loaded() == (here,)
    await engine.load(here)
    assert files.asked == 1


async def test_an_adapter_whose_files_are_damaged_never_reaches_the_engine() -> None:
    serving, files = Serving(), Files(None)
    engine = SurrogateEngine("small", serving, loaded=LoadedAdapters(serving, room=4, files=files))
    with pytest.raises(EngineUnavailable, match="damaged"):
        await engine.load(REF)
    assert (serving.added, engine.loaded()) == ([], ())


async def test_the_adapters_name_stays_inside_and_the_tenant_salts_the_cache(here: AdapterRef) -> None:
    serving = Serving()
    engine = SurrogateEngine("small", serving)
    await engine.load(here)
    reply = await engine.chat(ChatCall({"model": "soma", "messages": []}, here, "tenant-1"))
    assert serving.bodies[0]["model"] == "a"
    assert serving.bodies[0]["cache_salt"] == "tenant-1"
    assert reply.body is not None
    assert reply.body["model"] == "small"


async def test_an_error_as_first_event_is_an_exception_and_not_a_reply() -> None:
    serving = Serving('data: {"error": {"type": "InternalServerError"}}\n\n')
    with pytest.raises(EngineUnavailable, match="before its first token"):
        await SurrogateEngine("small", serving).chat(ChatCall({"stream": True}))
    assert serving.closed


async def test_a_refusal_as_first_event_is_the_clients_to_read() -> None:
    serving = Serving('data: {"error": {"type": "BadRequestError", "message": "logprobs", "code": 400}}\n\n')
    with pytest.raises(EngineRefused) as refused:
        await SurrogateEngine("small", serving).chat(ChatCall({"stream": True}))
    assert refused.value.status == 400
    assert refused.value.body["error"]["message"] == "logprobs"
    assert serving.closed


async def test_a_stream_that_ends_at_once_is_an_exception() -> None:
    with pytest.raises(EngineUnavailable):
        await SurrogateEngine("small", Serving()).chat(ChatCall({"stream": True}))


async def test_an_error_in_the_middle_breaks_the_stream() -> None:
    serving = Serving('data: {"choices":[]}\n\n', 'data: {"error": {"type": "Boom"}}\n\n')
    reply = await SurrogateEngine("small", serving).chat(ChatCall({"stream": True}))
    assert reply.events is not None
    assert await anext(reply.events)
    with pytest.raises(EngineUnavailable, match="Boom"):
        await anext(reply.events)


async def test_users_come_before_the_background_whatever_a_client_asks_for() -> None:
    serving = Serving()
    engine = SurrogateEngine("small", serving)
    await engine.chat(ChatCall({"messages": [], "priority": -5}))
    await engine.chat(ChatCall({"messages": []}, background=True))
    assert [body["priority"] for body in serving.bodies] == [0, 1]


async def test_an_answer_is_read_behind_all_users_and_only_its_own_tokens_count() -> None:
    serving = Serving()
    call = ChatCall({"messages": [{"role": "user", "content": "why?"}]}, tenant="t", background=True)
    assert await SurrogateEngine("small", serving).score(call, "so") == Agreement(0.5, 0.5, 2)
    asked, read = serving.bodies
    assert len(asked["messages"]) == 1
    assert (read["priority"], read["cache_salt"], read["messages"][-1]["content"]) == (1, "t", "so")


SIGNATURE = Signature((5, 6, 7, 8), (-1.0, -2.0, -3.0), (-0.5, -3.0, -1.0))


async def test_an_adapter_that_is_served_as_trained_is_read_once(here: AdapterRef) -> None:
    sign(here, SIGNATURE)
    serving = Serving()
    # The engine rounds otherwise, in the plain model and under the adapter alike.
    serving.reads = {"small": [-1.1, -2.1, -3.0], "a": [-0.6, -3.1, -1.02]}
    engine = SurrogateEngine("small", serving)
    await asyncio.gather(engine.load(here), engine.load(here))
    await engine.load(here)
    assert [body["model"] for body in serving.bodies] == ["small", "a"]


@pytest.mark.parametrize(
    "served",
    [[-1.0, -2.0, -3.0], [0.0, -4.0, 1.0], [-0.5, -2.0, -3.0], [float("nan"), -3.0, -1.0]],
    ids=["not at all", "at twice its scale", "without a part", "as no number"],
)
async def test_an_adapter_that_is_not_served_as_trained_is_rejected_every_time(
    here: AdapterRef, served: list[float]
) -> None:
    sign(here, SIGNATURE)
    serving = Serving()
    serving.reads = {"small": list(SIGNATURE.plain), "a": served}
    engine = SurrogateEngine("small", serving)
    for _ in range(2):
        with pytest.raises(AdapterRejected, match=r"does not serve what was trained: found trained_shift 1\.3"):
            await engine.load(here)
    assert len(serving.bodies) == 2


async def test_an_adapter_without_a_noticeable_effect_passes_where_nothing_is_served(here: AdapterRef) -> None:
    sign(here, Signature((5, 6, 7, 8), (-1.0, -2.0, -3.0), (-1.01, -2.01, -2.99)))
    serving = Serving()
    serving.reads = {"small": [-1.0, -2.0, -3.0], "a": [-1.0, -2.0, -3.0]}
    await SurrogateEngine("small", serving).load(here)
