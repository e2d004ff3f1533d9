"""The `soma` endpoint plugin of vLLM: its chat route and model list replace vLLM's own.

vLLM builds plugins with no arguments and initialises them with the server's parsed arguments; soma-serve puts
its host there under `HOST`. Without one (someone started plain vLLM and named this plugin) start-up fails.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from soma_vllm.engines.base import Events
from soma_vllm.engines.vllm_internals import ChatCompletionRequest, validate_json_request, with_cancellation
from soma_vllm.errors import BadRequest, EngineRefused, EngineUnavailable, NotFound, PreflightError
from soma_vllm.scheduler.dispatcher import Answer, Dispatcher, Incoming
from soma_vllm.scheduler.view import view
from soma_vllm.session.identity import tenant_of
from soma_vllm.types import SessionKey

HOST = "soma_host"
"""Attribute of the server's arguments under which soma-serve leaves its host."""


class Host(Protocol):
    """soma-serve, as the plugin sees it."""

    async def begin(self, engine_client: Any, state: Any) -> Dispatcher:
        """Called when vLLM's engine and serving objects are ready; returns once dispatch can begin."""
        ...

    def models(self) -> list[str]:
        """Names that may be asked for."""
        ...


class SomaEndpointPlugin:
    """`vllm.endpoint_plugins` entry point."""

    name = "soma"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes; those vLLM has too are replaced."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start what dispatch needs.

        Raises:
            PreflightError: this vLLM was not started by soma-serve, or something did not start.
        """
        host: Host | None = getattr(args, HOST, None)
        if host is None:
            raise PreflightError("the soma endpoint plugin runs inside soma-serve; start that instead of vLLM")
        state.soma_host = host
        state.soma = await host.begin(engine_client, state)


router = APIRouter()


class DialogueStream(StreamingResponse):
    """A stream that is closed when the response is over, also when the client left before it began."""

    def __init__(self, events: Events, headers: Mapping[str, str]) -> None:
        super().__init__(events, headers=dict(headers), media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, then close them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


@router.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)])
@with_cancellation  # type: ignore[untyped-decorator]
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's chat completion, dispatched. `request` is vLLM's own reading: it has validated the body."""
    incoming = Incoming(await raw_request.json(), raw_request.headers, raw_request)
    try:
        answer = await dispatcher(raw_request).chat(incoming)
    except BadRequest as error:
        return failure(HTTPStatus.BAD_REQUEST, str(error), error.param)
    except EngineRefused as error:
        return JSONResponse(error.body, status_code=error.status)
    except EngineUnavailable as error:
        retry = {"Retry-After": str(math.ceil(error.retry_after))}
        return failure(HTTPStatus.SERVICE_UNAVAILABLE, str(error), None, retry)
    return response(answer)


@router.get("/v1/models")
async def list_models(raw_request: Request) -> JSONResponse:
    """The names that may be asked for. Adapters are not among them."""
    names = raw_request.app.state.soma_host.models()
    cards = [{"id": name, "object": "model", "created": 0, "owned_by": "soma_vllm"} for name in names]
    return JSONResponse({"object": "list", "data": cards})


@router.get("/soma/sessions/{session:path}")
async def show_session(session: str, raw_request: Request) -> JSONResponse:
    """One session of the asking API key, in numbers."""
    soma = dispatcher(raw_request)
    key = SessionKey(tenant_of(raw_request.headers.get("authorization")), session)
    try:
        entry = await soma.book.entry(key)
    except NotFound as error:
        return failure(HTTPStatus.NOT_FOUND, str(error))
    return JSONResponse(view(entry, soma.idle(key)))


def dispatcher(raw_request: Request) -> Dispatcher:
    """The dispatcher of the application that got this request."""
    found: Dispatcher = raw_request.app.state.soma
    return found


def response(answer: Answer) -> Response:
    """An answer as HTTP."""
    if answer.reply.events is not None:
        return DialogueStream(answer.reply.events, answer.headers)
    return JSONResponse(answer.reply.body, headers=dict(answer.headers))


def failure(
    status: HTTPStatus, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = "".join(word.capitalize() for word in status.phrase.split()) + "Error"
    error = {"message": message, "type": kind, "param": param, "code": int(status)}
    return JSONResponse(
        {"error": error}, status_code=status, headers=None if headers is None else dict(headers)
    )
