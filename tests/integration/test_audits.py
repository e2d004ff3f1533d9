"""Audits by a real vLLM original: what it says of an answer is what the model itself says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support.server import Dialogue, Running

from soma_vllm.engines.engine import ChatCall
from soma_vllm.engines.original import OriginalEngine
from soma_vllm.errors import EngineRefused
from soma_vllm.types import Agreement, Message

HISTORY: tuple[Message, ...] = (
    {"role": "system", "content": "Answer with care."},
    {"role": "user", "content": "What is a wind?"},
    {"role": "assistant", "content": "Moving air."},
    {"role": "user", "content": "And a light?"},
)


def read_by_the_model(folder: Path, messages: tuple[Message, ...], answer: str) -> Agreement:
    """The slow and obvious way: one forward pass, every probability of the answer looked up by hand."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # In float32: the rounding of a bf16 pass is as large as what is allowed below.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
    opening = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    total, hits = 0.0, 0
    for position in range(opening, len(ids)):
        row = logprobs[position - 1]
        total -= float(row[ids[position]])
        hits += int(row.argmax()) == ids[position]
    count = len(ids) - opening
    return Agreement(total / count, hits / count, count)


@pytest.mark.parametrize("answer", ["It lets us see things.\n", "  a light, a light  ", "X"])
async def test_the_originals_score_is_the_models_own(
    tiny_server: Running, tiny_models: Path, answer: str
) -> None:
    engine = OriginalEngine(
        "tiny-original", "http://original/v1", socket=tiny_server.run_dir / "original.sock", speaks_vllm=True
    )
    call = ChatCall({"messages": HISTORY}, background=True)
    # Twice: what the first one left in the prefix cache must not change the second.
    found = [await engine.score(call, answer) for _ in range(2)]
    await engine.close()
    expected = read_by_the_model(tiny_models / "tiny-original", HISTORY, answer)
    assert found[0].tokens == found[1].tokens == expected.tokens
    assert found[0].nll == pytest.approx(expected.nll, abs=0.05)
    assert found[1].nll == pytest.approx(found[0].nll, abs=1e-3)
    assert found[0].top1 == pytest.approx(expected.top1)


async def test_an_answer_beyond_the_context_is_refused(tiny_server: Running) -> None:
    engine = OriginalEngine(
        "tiny-original", "http://original/v1", socket=tiny_server.run_dir / "original.sock", speaks_vllm=True
    )
    with pytest.raises(EngineRefused):
        await engine.score(ChatCall({"messages": HISTORY}, background=True), "a wind and a light " * 2000)
    await engine.close()


def test_a_switched_session_is_audited_by_one_prefill_of_the_original(tiny_server: Running) -> None:
    dialogue = Dialogue(tiny_server, "audited", **{"X-SOMA-Force": "plain"})
    for number in range(1, 4):
        dialogue.say(f"question {number}")
    tiny_server.until("audited", "SWITCHED")
    dialogue.say("question 4")
    assert dialogue.headers["X-SOMA-Engine"] == "surrogate"
    found = tiny_server.until("audited", "SWITCHED")
    (audit,) = (event["data"] for event in found["events"] if event["kind"] == "audited")
    assert (audit["kind"], audit["turn"], audit["gap"]) == ("surprise", 4, None)
    # Both are random: about the logarithm of the vocabulary's size.
    assert 1.0 < audit["surprise"] < 3 * math.log(1024)
    assert found["turns"][3]["surprise"] == audit["surprise"]
