"""What the server says of itself: its models, their tokenizers, its version, and a page for people.

Guarantees: a name of `/v1/models` works on `/tokenize` and `/detokenize`; adapters are no models; the page at
`/` loads nothing and reveals nothing that the open routes do not.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from soma_vllm.api.error_responses import TranslatingRoute, failed, failure
from soma_vllm.api.unicode_check import require_unicode
from soma_vllm.engines.vllm.internals import (
    DetokenizeBody,
    TokenizeBody,
    tokenize_request,
    tokenizer_answer,
    validate_json_request,
    with_cancellation,
)
from soma_vllm.scheduler.dispatcher import DISPATCH_NAME, no_such_model
from soma_vllm.versions import installed_vllm

router = APIRouter(route_class=TranslatingRoute)

TITLE = "soma-serve"
VERSION = version("soma-vllm")

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>soma-serve</title></head>
<body style="font-family: sans-serif; max-width: 40em; margin: 3em auto">
<h1>soma-serve {version}</h1>
<p>An OpenAI-compatible endpoint. Give your client the base URL <code>{url}v1</code> and the model
<code>soma</code>.</p>
<p>Models: {models}.</p>
<p><a href="docs">Routes</a>, <a href="metrics">metrics</a>, <a href="health">health</a>,
<a href="version">version</a>.</p>
</body></html>
"""


@router.get("/", include_in_schema=False)
async def root(raw_request: Request) -> Response:
    """A page for a person; a client of the API, which sends a key, has the wrong base URL and is told so."""
    if "authorization" in raw_request.headers:
        return failure(HTTPStatus.NOT_FOUND, "/: found no route; expected a base URL that ends in /v1")
    names = ", ".join(f"<code>{html.escape(name)}</code>" for name in _models(raw_request))
    return HTMLResponse(PAGE.format(version=VERSION, url=html.escape(str(raw_request.base_url)), models=names))


@router.get("/version")
async def show_version() -> JSONResponse:
    """vLLM's version, under its own name for it, and ours."""
    return JSONResponse({"version": installed_vllm(), "soma_vllm": VERSION})


@router.get("/v1/models")
async def list_models(raw_request: Request) -> JSONResponse:
    """The names that a request may ask for."""
    cards = [_card(raw_request, name) for name in _models(raw_request)]
    return JSONResponse({"object": "list", "data": cards})


@router.get("/v1/models/{model:path}")
async def show_model(model: str, raw_request: Request) -> JSONResponse:
    """One of these names."""
    names = _models(raw_request)
    if model not in names:
        return failed(no_such_model(model, names))
    return JSONResponse(_card(raw_request, model))


@router.post("/tokenize", dependencies=[Depends(validate_json_request)])
@with_cancellation  # type: ignore[untyped-decorator]
async def tokenize(request: TokenizeBody, raw_request: Request) -> Response:
    """The tokens of a text or of a chat's prompt."""
    return await _tokenizer("tokenize", request, raw_request)


@router.post("/detokenize", dependencies=[Depends(validate_json_request)])
@with_cancellation  # type: ignore[untyped-decorator]
async def detokenize(request: DetokenizeBody, raw_request: Request) -> Response:
    """The text of tokens."""
    return await _tokenizer("detokenize", request, raw_request)


async def count_tokens(body: Mapping[str, Any], raw_request: Request) -> int:
    """How many tokens the prompt of a chat comes to. Raises SomaError."""
    asked = {name: body[name] for name in ("model", "messages", "tools") if name in body}
    answer = await _tokenized("tokenize", tokenize_request(asked), asked, raw_request)
    return int(answer["count"])


async def _tokenizer(path: str, request: Any, raw_request: Request) -> Response:
    body = await raw_request.json()
    require_unicode(body)
    return JSONResponse(await _tokenized(path, request, body, raw_request))


async def _tokenized(
    path: str, request: Any, body: Mapping[str, Any], raw_request: Request
) -> Mapping[str, Any]:
    """Of the surrogate where that is named, or no model; else of the original, where that shows its own."""
    dispatch, original, surrogate = _models(raw_request)
    model = surrogate if request.model is None else request.model
    if model not in (dispatch, original, surrogate):
        raise no_such_model(model, _models(raw_request))
    if model != surrogate:
        host = raw_request.app.state.soma_host
        answer: Mapping[str, Any] | None = await host.original_tokenizer(path, body, model != DISPATCH_NAME)
        if answer is not None:
            return answer
    request.model = surrogate
    return await tokenizer_answer(raw_request.app.state, path, request, raw_request)


def _models(raw_request: Request) -> Mapping[str, int | None]:
    models: Mapping[str, int | None] = raw_request.app.state.soma_host.models()
    return models


def _card(raw_request: Request, name: str) -> dict[str, Any]:
    longest = _models(raw_request)[name]
    card = {
        "id": name,
        "object": "model",
        "created": int(raw_request.app.state.soma_host.started_at),
        "owned_by": "soma_vllm",
    }
    return card if longest is None else {**card, "max_model_len": longest}
