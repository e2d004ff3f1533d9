"""vLLM's serving classes and server, behind a version check. This room holds every import of vLLM.

vLLM's serving classes have no stability promise. What this module relies on (vLLM 0.32):

* `OpenAIServingChat.create_chat_completion(request, raw_request)` returns an ErrorResponse, a whole
  response, or an async generator of server-sent events, and finds its LoRA in `self.models.lora_requests`;
  `render_chat_request(request)` returns the conversation and its tokenised prompts, or an ErrorResponse.
* `AsyncLLM.logger_manager.stat_loggers` has the Prometheus logger; it leaves a `gauge_lora_info` of None alone.
* Its request models look into parameters before these are checked: `structured_outputs: true` is an
  AttributeError there, not a ValidationError, and would be a 500. Integers beyond 64 bits pass, and fail in
  the engine.
* `init_app_state` has put both serving objects into the application's state when plugins initialise.

The copy made here has a registry of its own, so that adapters are reachable through soma_vllm's dispatch only
and never become public model names on vLLM's other routes.
"""

from __future__ import annotations

import asyncio
import copy
from argparse import Namespace
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any

from jinja2 import TemplateError
from prometheus_client import REGISTRY
from pydantic import ValidatorFunctionWrapHandler, WrapValidator
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation
from vllm.exceptions import VLLMClientError, VLLMServerError
from vllm.lora.request import LoRARequest
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from soma_vllm.errors import EngineRefused, EngineUnavailable, PreflightError
from soma_vllm.types import AdapterRef
from soma_vllm.versions import SUPPORTED_VLLM, installed_vllm, vllm_is_supported

__all__ = [
    "REFUSALS",
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "PrivateChat",
    "TokenizeBody",
    "read_body",
    "run_server",
    "validate_api_server_args",
    "validate_json_request",
    "with_cancellation",
]

if not vllm_is_supported():
    raise PreflightError(f"vLLM {installed_vllm()} is installed; expected {SUPPORTED_VLLM}x")


READ_POLL_S = 0.01
"""How often workers are asked whether they have read an adapter; each question waits for the step under way."""

REFUSALS = (VLLMClientError, ValueError, TypeError, OverflowError, NotImplementedError, TemplateError)
"""What vLLM raises, rather than returns, for a request that is wrong: too long, or against its template."""


def read_body(body: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """A body as vLLM reads it; whatever a wrong parameter makes vLLM raise becomes a validation error."""
    try:
        for name, value in body.items() if isinstance(body, dict) else ():
            if name != "messages" and (large := _too_large(value)) is not None:
                bits = large.bit_length()
                raise ValueError(
                    f"{name[:100]}: found an integer of {bits} bits; expected at most 64 with its sign"
                )
        return read(body)
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(f"found a parameter of the wrong type ({error})") from error


def _too_large(value: Any) -> int | None:
    """An integer, anywhere in a value, that vLLM cannot send to its engine."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return next((found for each in inside if (found := _too_large(each)) is not None), None)
    return value if isinstance(value, int) and not INT64.start <= value < INT64.stop else None


INT64 = range(-(2**63), 2**63)

ChatBody = Annotated[ChatCompletionRequest, WrapValidator(read_body)]
"""A chat completion's body, as vLLM reads it."""

CompletionBody = Annotated[CompletionRequest, WrapValidator(read_body)]
"""A text completion's."""

TokenizeBody = Annotated[TokenizeRequest, WrapValidator(read_body)]
"""A text's or a chat's that is to be tokenized."""

DetokenizeBody = Annotated[DetokenizeRequest, WrapValidator(read_body)]
"""One of tokens."""


def parse_arguments(arguments: Sequence[str]) -> Namespace:
    """vLLM's own reading of a `vllm serve` command line."""
    namespace: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    validate_parsed_serve_args(namespace)
    return namespace


class PrivateChat:
    """vLLM's chat serving with a registry of adapters that no other route sees."""

    def __init__(self, engine_client: Any, state: Any) -> None:
        self._engine_client = engine_client
        self._models = copy.copy(state.openai_serving_models)
        self._models.lora_requests = {}
        self._models.lora_resolvers = []
        self._chat = copy.copy(state.openai_serving_chat)
        self._chat.models = self._models
        # vLLM would let a client's header overrule the priority that the body was given.
        self._chat._get_priority = lambda request, raw_request: request.priority
        self._completion = copy.copy(state.openai_serving_completion)
        self._completion.models = self._models
        self._completion._get_priority = self._chat._get_priority

    async def complete(
        self, body: Mapping[str, Any], http: Any
    ) -> Mapping[str, Any] | AsyncGenerator[str, None]:
        """A whole response body, or its events; `body["model"]` is the base model's or an adapter's name.

        Raises:
            EngineRefused: vLLM found the request wrong.
            EngineUnavailable: the engine is dead or could not generate.
        """
        return await _answered(ChatCompletionRequest, self._chat.create_chat_completion, body, http)

    async def complete_text(
        self, body: Mapping[str, Any], http: Any
    ) -> Mapping[str, Any] | AsyncGenerator[str, None]:
        """The same for a text completion."""
        return await _answered(CompletionRequest, self._completion.create_completion, body, http)

    async def prompt_tokens(self, body: Mapping[str, Any]) -> list[int]:
        """The prompt that a chat request comes to; the engine is not asked.

        Raises:
            EngineRefused: vLLM found the request wrong.
        """
        try:
            # vLLM's parsing writes into calls of tools, and these messages are a session's.
            request = ChatCompletionRequest.model_validate(copy.deepcopy(dict(body)))
            rendered = await self._chat.render_chat_request(request)
        except REFUSALS as error:
            raise EngineRefused(400, _error_body(str(error)), cause=refusal_cause(error)) from error
        if isinstance(rendered, ErrorResponse):
            raise EngineRefused(rendered.error.code, rendered.model_dump())
        _, (prompt, *_) = rendered
        return list(prompt["prompt_token_ids"])

    async def add(self, ref: AdapterRef) -> None:
        """Load an adapter into the engine and make it servable by its name.

        Raises:
            EngineUnavailable: the engine could not load it.
        """
        request = LoRARequest(lora_name=ref.name, lora_int_id=ref.number, lora_path=ref.path)
        try:
            loaded = await add_adapter(self._engine_client, request)
        except Exception as error:  # what the engine process raised arrives as a bare Exception
            raise EngineUnavailable(f"the engine could not load adapter {ref.name}") from error
        if not loaded:
            raise EngineUnavailable(f"the engine refused adapter {ref.name}")
        self._models.lora_requests[ref.name] = request

    async def remove(self, ref: AdapterRef) -> None:
        """Take an adapter out of service and out of the engine's memory; nothing happens where it is not there.

        Raises:
            EngineUnavailable: the engine did not answer.
        """
        self._models.lora_requests.pop(ref.name, None)
        try:
            await self._engine_client.remove_lora(ref.number)
        except Exception as error:  # as in `add`
            raise EngineUnavailable(f"the engine could not remove adapter {ref.name}") from error


async def add_adapter(engine_client: Any, request: LoRARequest) -> bool:
    """Load an adapter into an engine whose workers read adapters aside (`worker_extension.py`); False where it
    refuses. Others' requests wait for the copy into a slot only.

    Raises:
        Exception: the engine could not load it.
    """
    named = (request.lora_name, request.lora_int_id, request.lora_path)
    await engine_client.collective_rpc("soma_read_adapter", args=named)
    while not all(await engine_client.collective_rpc("soma_adapter_is_read", args=(request.lora_int_id,))):
        await asyncio.sleep(READ_POLL_S)
    added: bool = await engine_client.add_lora(request)
    return added


def keep_adapters_out_of_metrics(engine_client: Any) -> None:
    """Remove the series that names adapters: it shows them to every reader of /metrics, and grows with every
    combination of adapters for as long as the process lives."""
    manager = engine_client.logger_manager
    for stats in () if manager is None else manager.stat_loggers:
        gauge = getattr(stats, "gauge_lora_info", None)
        if gauge is not None:
            stats.gauge_lora_info = None
            REGISTRY.unregister(gauge)


def tokenize_request(body: Mapping[str, Any]) -> Any:
    """A chat that is to be tokenized, as vLLM reads it. Raises EngineRefused."""
    try:
        return TokenizeChatRequest.model_validate(body)
    except REFUSALS as error:
        raise EngineRefused(400, _error_body(str(error))) from error


async def tokenizer_answer(state: Any, path: str, request: Any, http: Any) -> dict[str, Any]:
    """What the surrogate's tokenizer answers at `tokenize` or `detokenize`.

    Raises:
        EngineRefused: vLLM found the request wrong.
    """
    serving = state.serving_tokenization
    serve = serving.create_tokenize if path == "tokenize" else serving.create_detokenize
    try:
        answer = await serve(request, http)
    except REFUSALS as error:
        raise EngineRefused(400, _error_body(str(error))) from error
    if isinstance(answer, ErrorResponse):
        raise EngineRefused(answer.error.code, answer.model_dump())
    found: dict[str, Any] = answer.model_dump()
    return found


async def _answered(
    kind: Any, serve: Any, body: Mapping[str, Any], http: Any
) -> Mapping[str, Any] | AsyncGenerator[str, None]:
    """What one of vLLM's serving objects answers, with its failures as ours."""
    try:
        answer = await serve(kind.model_validate(body), http)
    except (VLLMServerError, EngineDeadError, EngineGenerateError) as error:
        raise EngineUnavailable(f"the surrogate's engine failed: {type(error).__name__}") from error
    except REFUSALS as error:
        raise EngineRefused(400, _error_body(str(error))) from error
    if isinstance(answer, ErrorResponse):
        raise EngineRefused(answer.error.code, answer.model_dump())
    if isinstance(answer, ChatCompletionResponse | CompletionResponse):
        whole: dict[str, Any] = answer.model_dump()
        return whole
    events: AsyncGenerator[str, None] = answer
    return events


def refusal_cause(error: Exception) -> str:
    """A code for why vLLM refuses a chat request."""
    if getattr(error, "parameter", None) in ("input_tokens", "input_text"):
        return "context_length_exceeded"
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, TemplateError):
            return "chat_template_refused"
        found = found.__cause__ or found.__context__
    return "content_not_supported"


def _error_body(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
