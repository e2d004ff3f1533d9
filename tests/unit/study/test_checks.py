"""Programmatic truth: each kind of check takes what is right and refuses what is not."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import ValidationError
from study.checks import CHECK, block, graded
from study.code_runner import passes


def right(answer: str, **check: Any) -> bool:
    found: bool = CHECK.validate_python(check).right(answer)
    return found


def test_equal_texts_are_right_with_case_and_space_as_asked() -> None:
    assert right(" Yes. \n", kind="equals", expected="Yes.")
    assert not right("yes.", kind="equals", expected="Yes.")
    assert right("YES  sir", kind="equals", expected=["no", "yes sir"], ignore_case=True, ignore_space=True)
    assert not right("yes  sir", kind="equals", expected="yes sir")


def test_a_pattern_must_be_there_and_the_absent_one_must_not() -> None:
    assert right("order 66 sent", kind="regex", pattern=r"\b66\b")
    assert not right("order 661 sent", kind="regex", pattern=r"\b66\b")
    assert not right("BILLING, I think", kind="regex", pattern="BILLING", whole=True)
    assert right("billing", kind="regex", pattern="BILLING", whole=True, ignore_case=True)
    assert not right("an email!", kind="regex", pattern="email", absent="!")


@pytest.mark.parametrize(
    "answer",
    ['{"a": 1, "b": [true]}', 'Sure:\n```json\n{"b": [true], "a": 1}\n```', 'So {"a": 1.0, "b": [true]}.'],
)
def test_json_is_found_wherever_it_stands(answer: str) -> None:
    assert right(answer, kind="json", expected={"a": 1, "b": [True]})


@pytest.mark.parametrize(
    "answer", ['{"a": 2}', '{"a": "1"}', '{"a": true}', '{"a": 1, "b": 2}', "[1]", "a is 1", "{}", "{broken"]
)
def test_other_json_is_wrong(answer: str) -> None:
    assert not right(answer, kind="json", expected={"a": 1})


def test_json_that_no_parser_ends_with_is_wrong() -> None:
    assert not right("[" * 100_000, kind="json", expected=[])
    assert right('{"a": 1} as you asked, {see above}', kind="json", expected={"a": 1})


def test_json_may_have_more_keys_or_near_numbers_where_the_check_says_so() -> None:
    assert right('{"a": 1.04, "b": 2}', kind="json", expected={"a": 1}, subset=True, tolerance=0.05)
    assert not right('{"a": 1.06}', kind="json", expected={"a": 1}, tolerance=0.05)
    assert not right('{"a": 0}', kind="json", expected={"a": False})


def test_numbers_are_compared_by_place_and_within_the_tolerance() -> None:
    assert right("That is 1,200 mm.", kind="numbers", expected=[1200])
    assert not right("3 times 4 is 12", kind="numbers", expected=[12])
    assert right("3 times 4 is 12", kind="numbers", expected=[12], where="last")
    assert right("3 times 4 is 12", kind="numbers", expected=[12, 3], where="any")
    assert not right("120", kind="numbers", expected=[12], where="any")
    assert right("-2.54 cm", kind="numbers", expected=[-2.5], tolerance=0.05)
    assert not right("none", kind="numbers", expected=[0], where="last")


GIVEN = ["CREATE TABLE t (a INTEGER, b TEXT)", "INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'x')"]
SQL: dict[str, Any] = {"kind": "sql", "expected": "SELECT a FROM t WHERE b = 'x'", "given": GIVEN}


def test_a_query_is_judged_by_its_rows() -> None:
    assert right("```sql\nselect t.a from t where b like 'X' order by a desc;\n```", **SQL)
    assert not right("SELECT a FROM t", **SQL)
    assert not right("SELECT a FROM t WHERE b = 'x' ORDER BY a DESC", ordered=True, **SQL)
    assert not right("Sorry, I cannot.", **SQL)
    empty = {**SQL, "expected": "SELECT a FROM t WHERE b = 'none'"}
    assert right("SELECT a FROM t WHERE a = 9", **empty)
    assert not right("-- nothing", **empty)
    assert not right("SELECT 1; SELECT 2", **SQL)


def test_a_query_that_writes_or_does_not_end_is_wrong() -> None:
    assert not right("DELETE FROM t", **SQL)
    assert not right("ATTACH DATABASE ':memory:' AS n", **SQL)
    begun = time.monotonic()
    assert not right(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n", **SQL
    )
    assert time.monotonic() - begun < 10


def test_code_is_judged_by_its_asserts() -> None:
    check = {"kind": "python", "asserts": ["assert f(2) == 4", "assert f(0) == 0"]}
    assert right("Here:\n```python\ndef f(n):\n    return n * n\n```\nDone.", **check)
    assert not right("def f(n): return n + 2", **check)
    assert not right("def f(n) return", **check)
    assert not right("raise SystemExit(0)", **check)
    assert not right("import os\nos._exit(0)", **check)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "x = 'a' * 10**9",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import subprocess\nsubprocess.run(['true'])",
        "open('here', 'w').write('x')",
        "import os\nos.fork()",
        "import os\nassert 'PATH' in os.environ",
    ],
)
def test_code_that_reaches_for_the_machine_fails(code: str) -> None:
    assert not passes(code, ["assert True"], seconds=1.0, memory_mb=128)


@pytest.mark.parametrize(
    ("check", "told"),
    [
        ({"kind": "regex", "pattern": "("}, "pattern: a regular expression"),
        ({"kind": "sql", "expected": "SELECT nothing", "given": GIVEN}, "a query that SQLite runs"),
        ({"kind": "python", "asserts": ["assert ("]}, "asserts: Python"),
        ({"kind": "numbers", "expected": []}, "at least 1"),
        ({"kind": "equals", "expected": "a", "ignore": True}, "ignore"),
        ({"kind": "poem"}, "poem"),
    ],
)
def test_a_check_that_cannot_hold_is_refused_when_it_is_read(check: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told.replace("(", r"\(")):
        CHECK.validate_python(check)


def test_a_turn_without_a_check_has_no_grade() -> None:
    check = CHECK.validate_python({"kind": "equals", "expected": "a"})
    assert graded(["a", "b", "c"], [check, None, check]) == [True, None, False]
    assert block("```\nx\n```") == "x"
