"""The original's distribution, read from a reply as vLLM writes it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from soma_vllm.engines.logprobs import teacher_from_logprobs, teaching_fields
from soma_vllm.errors import EngineError


def entry(token: int, *top: tuple[int, float]) -> dict[str, Any]:
    tops = [{"token": f"token_id:{number}", "logprob": logprob, "bytes": None} for number, logprob in top]
    return {"token": f"token_id:{token}", "logprob": top[0][1] if top else 0.0, "top_logprobs": tops}


def test_rows_are_sorted_and_padded() -> None:
    teacher = teacher_from_logprobs([entry(7, (7, -2.0), (5, -0.5), (6, -1.0)), entry(2, (2, -0.1))])
    assert teacher.tokens == (7, 2)
    assert teacher.top.tolist() == [[5, 6, 7], [2, -1, -1]]
    assert teacher.logprobs[0].tolist() == [-0.5, -1.0, -2.0]
    assert teacher.logprobs[1].tolist() == [pytest.approx(-0.1), -math.inf, -math.inf]
    assert (teacher.top.dtype, teacher.logprobs.dtype) == ("int32", "float32")


@pytest.mark.parametrize(
    "content",
    [
        [],
        [{"token": "token_id:1", "logprob": 0.0, "top_logprobs": []}],
        [{"token": "a secret", "logprob": 0.0, "top_logprobs": [{"token": "token_id:1", "logprob": 0.0}]}],
        [entry(1, (1, 0.0)), {"token": "token_id:", "logprob": 0.0, "top_logprobs": []}],
    ],
)
def test_a_reply_without_token_ids_is_refused_without_its_text(content: list[dict[str, Any]]) -> None:
    with pytest.raises(EngineError) as caught:
        teacher_from_logprobs(content)
    assert "secret" not in str(caught.value)


def test_no_log_probabilities_are_asked_for_where_none_are_wanted() -> None:
    assert teaching_fields(0) == {}
    assert teaching_fields(20)["top_logprobs"] == 20
