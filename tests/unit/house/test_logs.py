"""Ids in log lines."""

from __future__ import annotations

import asyncio
import logging

import pytest

from soma_vllm.logs import LogContext, bind, request_id, session, tenant


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
