"""Ids in log lines."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.config
import sys
from typing import Any

import pytest

from soma_vllm.logs import (
    JsonFormatter,
    LogContext,
    TextFormatter,
    bind,
    bind_session,
    configuration,
    request_id,
    session,
    tenant,
)
from soma_vllm.types import SessionKey


def context() -> str:
    record = logging.LogRecord("soma_vllm", logging.INFO, __file__, 1, "switched", None, None)
    assert LogContext().filter(record)
    found: str = record.__dict__["context"]
    return found


def test_a_line_outside_any_request_has_no_ids() -> None:
    assert context() == ""


def test_a_line_names_what_is_bound_in_one_order() -> None:
    with bind(request_id="r1", tenant="t"), bind(session="s"):
        assert context() == " session=s tenant=t request=r1"
    assert context() == ""


def fail_within_a_block() -> None:
    with bind(session="inner", request_id="r"):
        assert (session.get(), request_id.get()) == ("inner", "r")
        raise RuntimeError


def test_ids_are_those_from_before_once_a_block_ends_however_it_ends() -> None:
    with bind(session="outer"):
        with pytest.raises(RuntimeError):
            fail_within_a_block()
        with bind(session=None):
            assert context() == ""
        assert (session.get(), request_id.get(), tenant.get()) == ("outer", None, None)


def test_an_id_that_is_none_of_ours_is_refused_and_nothing_is_set() -> None:
    with (
        pytest.raises(TypeError, match="found user; expected some of session, tenant, request_id"),
        bind(session="s", user="u"),
    ):
        pass
    assert session.get() is None


async def test_tasks_that_run_at_once_keep_their_own_ids_and_hand_them_on() -> None:
    async def inner() -> str:
        await asyncio.sleep(0)
        return context()

    async def request(name: str) -> str:
        with bind(request_id=name):
            await asyncio.sleep(0)
            return await asyncio.create_task(inner())

    found = await asyncio.gather(request("a"), request("b"))
    assert found == [" request=a", " request=b"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("my-dialogue~2", "my-dialogue~2"),
        ("a b", '"a b"'),
        ("a\nERROR", '"a\\nERROR"'),
        ("x tenant=y", '"x tenant=y"'),
        ("a=b", '"a=b"'),
        ("\x1b[2J\u2028\ud83d", '"\\u001b[2J\\u2028\\ud83d"'),
        ('"', '"\\""'),
        ("", '""'),
    ],
)
def test_a_value_is_one_word_of_a_line(value: str, shown: str) -> None:
    with bind(session=value):
        assert context() == f" session={shown}"


def record(message: str, *values: object, exc_info: Any = None) -> logging.LogRecord:
    made = logging.LogRecord(
        "soma_vllm.scheduler.dispatcher", logging.INFO, __file__, 1, message, values, exc_info
    )
    made.created = 1795809600.25
    LogContext().filter(made)
    return made


def failure() -> Any:
    try:
        raise OSError("no space\nleft")
    except OSError:
        return sys.exc_info()


def test_a_line_of_text_has_time_level_room_message_and_the_ids_that_are_set() -> None:
    with bind_session(SessionKey("t", "s")), bind(request_id="r"):
        line = TextFormatter().format(record("%d turns", 3))
    assert line == "2026-11-27T20:00:00Z INFO scheduler.dispatcher: 3 turns session=s tenant=t request=r"
    assert TextFormatter().format(record("ready")) == "2026-11-27T20:00:00Z INFO scheduler.dispatcher: ready"


def test_only_the_first_line_of_a_record_in_text_begins_at_the_margin() -> None:
    with bind(session="s"):
        first, *rest = TextFormatter().format(record("one\n2026 ERROR forged", exc_info=failure())).split("\n")
    assert first.endswith("one session=s")
    assert rest[0] == "    2026 ERROR forged"
    assert rest[-1] == "    left"
    assert all(line.startswith("    ") for line in rest)


def test_a_record_in_json_is_one_line_with_its_ids_and_its_traceback() -> None:
    with bind_session(SessionKey("t", "s")), bind(request_id="r"):
        line = JsonFormatter().format(record("it\nfailed", exc_info=failure()))
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("traceback").endswith("OSError: no space\nleft")
    assert found == {
        "time": "2026-11-27T20:00:00Z",
        "level": "INFO",
        "logger": "soma_vllm.scheduler.dispatcher",
        "message": "it\nfailed",
        "session": "s",
        "tenant": "t",
        "request": "r",
        "error": "OSError",
    }


def test_json_has_no_ids_that_are_not_set_and_names_the_type_of_an_error_that_a_message_quotes() -> None:
    found = json.loads(JsonFormatter().format(record("tried again: %s", TimeoutError("slow"))))
    assert found["message"] == "tried again: slow"
    assert found["error"] == "TimeoutError"
    assert not found.keys() & {"session", "tenant", "request", "traceback"}


@pytest.fixture
def _loggers_restored() -> Any:
    names = ("soma_vllm", "vllm", "uvicorn", None)
    before = [(each, each.level, each.handlers[:], each.propagate) for each in map(logging.getLogger, names)]
    yield
    for each, level, handlers, propagate in before:
        each.setLevel(level)
        each.handlers[:] = handlers
        each.propagate = propagate


@pytest.mark.usefixtures("_loggers_restored")
def test_ours_and_others_are_logged_in_one_format_and_others_from_warning_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    logging.config.dictConfig(json.loads(json.dumps(configuration("json", "debug"))))
    logging.getLogger("soma_vllm.adapters").debug("ours")
    for name in ("vllm.v1", "uvicorn.error", "asyncio"):
        logging.getLogger(name).warning("theirs")
        logging.getLogger(name).info("too little")
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    found = [(line["logger"], line["level"]) for line in lines]
    assert found[0] == ("soma_vllm.adapters", "DEBUG")
    assert found[1:] == [("vllm.v1", "WARNING"), ("uvicorn.error", "WARNING"), ("asyncio", "WARNING")]
