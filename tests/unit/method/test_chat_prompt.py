"""The prompt that a trainer makes by itself, against the one that vLLM's server makes for the same request."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Config

from soma_vllm.errors import TrainingError
from soma_vllm.method.chat_prompt import prompt_ids

pytestmark = pytest.mark.slow

TEMPLATES = Path(__file__).parents[2] / "data" / "chat_templates"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "Ö", "parameters": {"type": "object"}}}]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def texts(*found: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in found]


def called(arguments: Any, result: Any = "5") -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        user("How warm?"),
        said(None, tool_calls=[call]),
        {"role": "tool", "tool_call_id": "c", "content": result},
    ]


SYSTEM, DEVELOPER = ({"role": role, "content": f"Be a {role}."} for role in ("system", "developer"))
HISTORIES: dict[str, list[dict[str, Any]]] = {
    "one question": [user("Hello  there \n")],
    "alternating": [user("Hello"), said("Hi."), user("Well?")],
    "system": [SYSTEM, user("Hello")],
    "developer": [DEVELOPER, user("Hello")],
    "system and developer": [SYSTEM, DEVELOPER, user("Hello")],
    "system in the middle": [user("Hello"), said("Hi."), SYSTEM, user("Well?")],
    "developer in the middle": [user("Hello"), said("Hi."), DEVELOPER, user("Well?")],
    "two questions in a row": [user("Hello"), user("Well?")],
    "text parts": [user(texts("one", "two"))],
    "system in parts": [{"role": "system", "content": texts("one", "two")}, user("Hello")],
    "no parts": [user([])],
    "null content": [user("Hello"), said(None), user("Well?")],
    "refusal": [user("Hello"), said(None, refusal="No."), user("Well?")],
    "refusal part": [user("Hello"), said([{"type": "refusal", "refusal": "No."}]), user("Well?")],
    "thinking part": [
        user("Hello"),
        said([{"type": "thinking", "thinking": "Hm.", "signature": "x"}, *texts("No.")]),
        user("Well?"),
    ],
    "reasoning": [user("Hello"), said("Hi.", reasoning="Hm."), user("Well?")],
    "thoughts in the text": [user("Hello"), said("<think>\nHm.\n</think>\n\nHi."), user("Well?")],
    "spoken": [user("Hello"), said(None, audio={"id": "a"}), user("Well?")],
    "call": called('{"a": 1, "b": ["ö"]}'),
    "call without arguments": called(""),
    "call cut off": called('{"a": '),
    "call with a list": called("[1]"),
    "result in parts": called("{}", texts("5", "6")),
    "no calls": [user("Hello"), said("Hi.", tool_calls=[]), user("Well?")],
    "name": [{**user("Hello"), "name": "Ann"}],
    "emoji and marks": [user("👩‍👩‍👧 \u202eab\u202c <|im_end|> [/INST] {{ x }}")],
}
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tools": {"tools": TOOLS},
    "no thinking": {"chat_template_kwargs": {"enable_thinking": False}},
    "effort": {"reasoning_effort": "low"},
    "documents": {"documents": [{"title": "t", "text": "d"}]},
}


@pytest.fixture(scope="module", params=sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def model(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    """A tokenizer in a folder of its own, with one of the templates."""
    folder = tmp_path_factory.mktemp(request.param)
    own = copy.deepcopy(tokenizer)
    own.bos_token, own.chat_template = "<|pad|>", (TEMPLATES / f"{request.param}.jinja").read_text()
    own.save_pretrained(folder)
    Qwen2Config(architectures=["Qwen2ForCausalLM"], max_position_embeddings=4096).save_pretrained(folder)
    found: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return found


class ServersReading:
    """vLLM's server up to its engine."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from types import SimpleNamespace

        from vllm.config import ModelConfig
        from vllm.renderers.hf import HfRenderer
        from vllm.renderers.online_renderer import OnlineRenderer
        from vllm.tokenizers import get_tokenizer

        folder = tokenizer.name_or_path
        config = ModelConfig(model=folder, tokenizer=folder, dtype="float32", max_model_len=4096)
        self._renderer: Any = HfRenderer(
            SimpleNamespace(
                model_config=config, parallel_config=SimpleNamespace(_api_process_rank=0), cache_config=None
            ),
            get_tokenizer(folder),
        )
        self._online = OnlineRenderer(
            config,
            self._renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )

    async def prompt(self, messages: list[dict[str, Any]], fields: dict[str, Any]) -> list[int] | None:
        """The token ids that go to the engine; None where the request is refused."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.exceptions import VLLMClientError

        body = copy.deepcopy({"messages": messages, "tool_choice": "none", **fields})
        try:
            found = await self._online.render_chat(ChatCompletionRequest.model_validate(body))
        except VLLMClientError:
            return None
        assert isinstance(found, tuple), found
        _, (prompt, *_) = found
        return list(prompt["prompt_token_ids"])


def test_a_trainer_reads_every_history_as_the_engine_is_sent_it(model: PreTrainedTokenizerFast) -> None:
    server = ServersReading(model)

    async def all_prompts() -> dict[tuple[str, str], list[int] | None]:
        return {
            (name, with_): await server.prompt(messages, fields)
            for name, messages in HISTORIES.items()
            for with_, fields in FIELDS.items()
        }

    sent = asyncio.run(all_prompts())
    differ, refused = [], 0
    for (name, with_), theirs in sent.items():
        before = copy.deepcopy(HISTORIES[name])
        try:
            ours = list(prompt_ids(model, HISTORIES[name], FIELDS[with_]))
        except TrainingError:
            ours = None
            refused += 1
        assert HISTORIES[name] == before
        if ours != theirs:
            shown = [None if ids is None else model.decode(ids) for ids in (theirs, ours)]
            differ.append(f"{name}, {with_}: the engine reads {shown[0]!r}, the trainer {shown[1]!r}")
    assert not differ, "\n".join(differ)
    assert refused < len(sent) * 0.7


def test_what_is_no_text_is_refused_and_nothing_is_fetched(tokenizer: PreTrainedTokenizerFast) -> None:
    picture = [user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/none"}}])]
    with pytest.raises(TrainingError, match="content parts of text only"):
        prompt_ids(tokenizer, picture)
