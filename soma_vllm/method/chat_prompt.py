"""The prompt of a chat request, by vLLM's own parsing of messages and its own use of the chat template.

An engine that runs is asked instead (`AdapterEngine.prompt`). This is for where there is none, as in
`soma distill` and `soma evaluate`: it reads as vLLM's server does with its default arguments, and text alone.
vLLM is imported with the first prompt, which takes some six seconds.

What it relies on (vLLM 0.32): to read text, `parse_chat_messages`, `resolve_chat_template_content_format` and
`safe_apply_chat_template` ask of a model's configuration what `_TEXT_MODEL` has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from soma_vllm.errors import TrainingError
from soma_vllm.types import Message, chat_body

_TEXT_MODEL = SimpleNamespace(
    multimodal_config=None,
    is_multimodal_model=False,
    enable_prompt_embeds=False,
    hf_config=SimpleNamespace(model_type=""),
    model="",
    tokenizer="",
    revision=None,
    tokenizer_revision=None,
    code_revision=None,
    trust_remote_code=False,
    allowed_local_media_path="",
    allowed_media_domains=None,
)
"""What vLLM asks of a model's configuration to read text."""


def prompt_ids(
    tokenizer: Any, messages: Sequence[Message], fields: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Token ids of a chat request, generation prompt included; `fields` are the request's others.

    Raises:
        TrainingError: vLLM would refuse it, or it holds more than text.
    """
    # Late: most processes never need it.
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import chat_utils, hf

    config: Any = _TEXT_MODEL
    try:
        request = ChatCompletionRequest.model_validate(
            deepcopy(chat_body(messages, fields or {}))  # vLLM's parsing writes into calls of tools
        )
        if chat_utils.has_non_text_content(request.messages):
            raise ValueError("expected content parts of text only")
        tools = [tool.model_dump() for tool in request.tools] if request.tools else None
        params = request.build_chat_params(None, "auto").with_defaults({"tools": tools})
        kwargs = params.get_apply_chat_template_kwargs()
        form = hf.resolve_chat_template_content_format(
            params.chat_template, tools, "auto", tokenizer, model_config=config
        )
        conversation, _, _ = chat_utils.parse_chat_messages(request.messages, config, form)
        text = hf.safe_apply_chat_template(config, tokenizer, conversation, **kwargs, tokenize=False)
    except Exception as error:  # vLLM's parsing raises whatever it stumbles over
        raise TrainingError(f"vLLM refuses the prompt: {type(error).__name__}: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=request.add_special_tokens)["input_ids"]
    return tuple(ids)
