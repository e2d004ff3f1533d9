"""Errors of ours as OpenAI's."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_vllm import errors
from soma_vllm.api.error_responses import failed, failure, whole_seconds


def body(response: Any) -> dict[str, Any]:
    return dict(json.loads(response.body)["error"])


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.BadRequest("m", "model"), 400, "BadRequestError", 400),
        (errors.Unprocessable("m", "tools"), 422, "UnprocessableEntityError", 422),
        (errors.NoSuchModel("m", "model"), 404, "NotFoundError", "model_not_found"),
        (errors.BodyTooLarge("m"), 413, "RequestEntityTooLargeError", "body_too_large"),
        (errors.Unauthorized("m"), 401, "UnauthorizedError", "invalid_api_key"),
        (errors.Forbidden("m"), 403, "ForbiddenError", "not_allowed"),
        (errors.NotFound("m"), 404, "NotFoundError", 404),
        (errors.TooManyRequests("m", 1.0), 429, "TooManyRequestsError", "rate_limit_exceeded"),
        (errors.EngineUnavailable("m"), 503, "ServiceUnavailableError", 503),
        (errors.StoreUnavailable("m"), 503, "ServiceUnavailableError", 503),
        (errors.EngineError("m"), 502, "BadGatewayError", 502),
        (errors.TrainingError("m"), 500, "InternalServerErrorError", 500),
    ],
)
def test_every_error_has_its_status_and_openais_shape(
    error: errors.SomaError, status: int, kind: str, code: object
) -> None:
    response = failed(error)
    assert response.status_code == status
    assert body(response) == {
        "message": "m",
        "type": kind,
        "param": getattr(error, "param", None),
        "code": code,
    }


def test_what_an_engine_refused_goes_out_unchanged() -> None:
    response = failed(errors.EngineRefused(418, {"error": {"message": "no", "extra": 1}}))
    assert response.status_code == 418
    assert body(response) == {"message": "no", "extra": 1}


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (errors.TooManyRequests("m", 0.2), "1"),
        (errors.TooManyRequests("m", 41.0), "41"),
        (errors.EngineUnavailable("m", 7.5), "8"),
        (errors.StoreUnavailable("m"), "5"),
    ],
)
def test_whoever_is_told_to_come_back_is_told_when(error: errors.SomaError, seconds: str) -> None:
    assert failed(error).headers["retry-after"] == seconds


def test_a_wait_is_never_a_second_too_long_by_floating_point() -> None:
    start = 4.4
    assert start + 60.0 - start > 60.0
    assert whole_seconds(start + 60.0 - start) == "60"


def test_a_401_says_how_to_authenticate() -> None:
    assert failed(errors.Unauthorized("m")).headers["www-authenticate"] == "Bearer"


@given(st.text())
def test_a_message_with_half_a_surrogate_pair_is_still_utf8(message: str) -> None:
    failure(HTTPStatus.BAD_REQUEST, message + "\ud800").body.decode("utf-8")
