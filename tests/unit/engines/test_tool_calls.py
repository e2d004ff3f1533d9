"""Which calls of tools a request allows, and which are the same."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from soma_vllm.engines.tool_calls import Mismatch, compare, fault

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "days": {"type": "integer"},
        "note": {"type": "string"},
        "pattern": {"type": "string"},
    },
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str, schema: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("weather", SCHEMA), tool("now", None)]


def call(name: object, arguments: object) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": text}}


def weather(**arguments: Any) -> dict[str, Any]:
    return call("weather", arguments)


@pytest.mark.parametrize(
    "allowed",
    [
        weather(city="Oslo"),
        weather(city="Oslo", unit="F", days=3, pattern="a*"),
        call("now", "{}"),
        call("now", ""),
    ],
    ids=str,
)
def test_calls_that_the_request_declares_are_allowed(allowed: dict[str, Any]) -> None:
    assert fault([allowed], TOOLS) is None


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (call("wether", {"city": "Oslo"}), Mismatch.UNKNOWN_FUNCTION),
        (call(None, {"city": "Oslo"}), Mismatch.UNKNOWN_FUNCTION),
        ({"id": "1"}, Mismatch.UNKNOWN_FUNCTION),
        (call("weather", '{"city": "Os'), Mismatch.INVALID_ARGUMENTS),
        (call("weather", "9"), Mismatch.INVALID_ARGUMENTS),
        (call("weather", ""), Mismatch.INVALID_ARGUMENTS),
        (weather(days=3), Mismatch.INVALID_ARGUMENTS),
        (weather(city="Oslo", days="3"), Mismatch.INVALID_ARGUMENTS),
        (weather(city="Oslo", unit="K"), Mismatch.INVALID_ARGUMENTS),
        (weather(city="Oslo", country="NO"), Mismatch.INVALID_ARGUMENTS),
    ],
    ids=str,
)
def test_a_call_that_the_request_does_not_allow_is_named(wrong: dict[str, Any], found: Mismatch) -> None:
    assert fault([weather(city="Rome"), wrong], TOOLS) is found


def test_references_within_a_schema_are_followed() -> None:
    schema = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}},
        "$defs": {"point": {"type": "object", "required": ["x"]}},
    }
    assert fault([call("go", {"at": {"x": 1}})], [tool("go", schema)]) is None
    assert fault([call("go", {"at": {}})], [tool("go", schema)]) is Mismatch.INVALID_ARGUMENTS


def doubling(levels: int) -> dict[str, Any]:
    """A small schema that takes 2 ** levels steps."""
    defs = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(levels)}
    return {"$ref": "#/$defs/a0", "$defs": {**defs, f"a{levels}": {}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/$defs/nowhere"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        doubling(40),
        "a text",
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_schema_that_cannot_be_applied_is_said_to_be_so_at_once(schema: object) -> None:
    began = time.monotonic()
    assert fault([call("go", {"x": 1})], [tool("go", schema)]) is Mismatch.UNVERIFIABLE
    assert time.monotonic() - began < 5


def test_a_clients_regular_expression_is_not_run() -> None:
    evil = "^(a+)+$"
    schema = {
        "type": "object",
        "properties": {"x": {"type": "string", "pattern": evil}},
        "patternProperties": {evil: {"type": "string"}},
        "additionalProperties": False,
        "unevaluatedProperties": False,
    }
    began = time.monotonic()
    assert fault([call("go", {"x": "a" * 64 + "!", "a" * 64 + "!": ""})], [tool("go", schema)]) is None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ([], []),
        ([weather(city="Oslo")], [weather(city="Oslo")]),
        ([call("weather", '{ "city":"Oslo" }')], [weather(city=" Oslo ")]),
        ([weather(city="Oslo", days=3)], [call("weather", '{"days": 3.0, "city": "Oslo"}')]),
        ([weather(city="Oslo", unit="C")], [weather(city="Oslo")]),  # the schema's default
        ([call("now", "{}")], [call("now", "")]),
        ([weather(city="Oslo"), weather(city="Rome")], [weather(city="Rome"), weather(city="Oslo")]),
        ([weather(city="Oslo"), call("now", {})], [call("now", {}), weather(city="Oslo")]),
    ],
    ids=str,
)
def test_calls_that_mean_the_same_are_the_same(theirs: list[Any], ours: list[Any]) -> None:
    found = compare(theirs, ours, TOOLS)
    assert (found.mismatch, found.texts) == (None, ())


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [
        ([weather(city="Oslo")], [], Mismatch.NO_CALL),
        ([], [weather(city="Oslo")], Mismatch.CALLED),
        ([weather(city="Oslo")], [call("now", {})], Mismatch.OTHER_FUNCTIONS),
        ([weather(city="Oslo")], [weather(city="Oslo"), call("now", {})], Mismatch.OTHER_FUNCTIONS),
        ([weather(city="Oslo")], [weather(city="Rome")], Mismatch.OTHER_ARGUMENTS),
        ([weather(city="Oslo", days=3)], [weather(city="Oslo", days=4)], Mismatch.OTHER_ARGUMENTS),
        ([weather(city="Oslo", unit="F")], [weather(city="Oslo")], Mismatch.OTHER_ARGUMENTS),
        ([weather(city="Oslo"), weather(city="Rome")], [weather(city="Oslo")] * 2, Mismatch.OTHER_ARGUMENTS),
        ([weather(city="Oslo")], [call("weather", "Oslo")], Mismatch.INVALID_ARGUMENTS),
    ],
    ids=str,
)
def test_calls_that_differ_are_told_apart(theirs: list[Any], ours: list[Any], found: Mismatch) -> None:
    assert compare(theirs, ours, TOOLS).mismatch is found


def test_true_is_not_one() -> None:
    tools = [tool("set", {"type": "object"})]
    assert compare([call("set", {"x": 1})], [call("set", {"x": True})], tools).mismatch is not None
    assert compare([call("set", {"x": [1]})], [call("set", {"x": [1, 2]})], tools).mismatch is not None


def test_texts_of_several_words_are_for_a_judge_and_ids_are_not() -> None:
    theirs, ours = weather(city="Oslo", note="bring warm clothes"), weather(city="Oslo", note="dress warmly")
    found = compare([theirs], [ours], TOOLS)
    assert (found.mismatch, found.texts) == (None, (("bring warm clothes", "dress warmly"),))
    assert compare([weather(city="a-17")], [weather(city="a-18")], TOOLS).mismatch is Mismatch.OTHER_ARGUMENTS


def test_parallel_calls_are_paired_by_their_texts_where_these_are_equal() -> None:
    first, second = (weather(city="Oslo", note=note) for note in ("of the day", "of the night"))
    assert compare([first, second], [second, first], TOOLS).texts == ()


DRAFT = "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": {"$schema": DRAFT, "pattern": "^(a+)+$"}}},
        {"$schema": DRAFT, "properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"pattern": "^(a+)+$"}}},
        {"$schema": DRAFT, "properties": {"x": {"allOf": [{"$schema": DRAFT, "pattern": "^(a+)+$"}]}}},
    ],
)
def test_no_dialect_that_a_schema_names_escapes_the_bound(schema: dict[str, Any]) -> None:
    began = time.process_time()
    assert fault([call("f", {"x": "a" * 40 + "!"})], [tool("f", schema)]) is None
    assert time.process_time() - began < 5  # the expression would take years


def test_all_calls_of_a_reply_share_one_bound() -> None:
    schema: dict[str, Any] = {"$defs": {"0": {"type": "object"}}, "$ref": "#/$defs/6"}
    for level in range(1, 7):
        schema["$defs"][str(level)] = {"allOf": [{"$ref": f"#/$defs/{level - 1}"}] * 2}
    alone = fault([call("f", {})], [tool("f", schema)])
    assert alone is None
    assert fault([call("f", {})] * 6, [tool("f", schema)]) is Mismatch.UNVERIFIABLE


@pytest.mark.parametrize("order", [1, -1])
def test_a_call_that_cannot_be_verified_hides_no_malformed_one(order: int) -> None:
    tools = [tool("far", {"$ref": "https://example.org/schema"})]
    calls = [call("far", {}), call("rm_rf", "not json")][::order]
    assert fault(calls, tools) is Mismatch.UNKNOWN_FUNCTION


def test_arguments_nested_as_deep_as_json_can_be_end_a_comparison_without_an_error() -> None:
    deep = json.loads("[" * 400 + "]" * 400)
    calls = [call("f", {"x": deep})]
    assert compare(calls, calls, [tool("f", {})]).mismatch in (None, Mismatch.UNVERIFIABLE)
