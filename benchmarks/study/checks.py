"""Programmatic truth: what a turn's answer must be, by kind. Documented for writers in docs/workloads.md.

Guarantees: a check is a pure function of the answer; an answer that cannot be read is wrong and raises nothing;
code and SQL of an answer run apart from this process's data, within limits of time and memory.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sqlite3
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from study.code_runner import passes

SQL_S = 2.0
"""Longest run of a query."""
_FENCE = re.compile(r"```[ \t]*\w*\n(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w]|\.\d)")


class _Check(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Equals(_Check):
    """The whole answer is one of the texts."""

    kind: Literal["equals"]
    expected: str | Annotated[tuple[str, ...], Field(min_length=1)]
    ignore_case: bool = False
    ignore_space: bool = False
    """Runs of white space count as one space."""

    def right(self, answer: str) -> bool:
        """Whether the answer is right."""
        texts = (self.expected,) if isinstance(self.expected, str) else self.expected
        return self._plain(answer) in {self._plain(text) for text in texts}

    def _plain(self, text: str) -> str:
        text = " ".join(text.split()) if self.ignore_space else text.strip()
        return text.casefold() if self.ignore_case else text


class Regex(_Check):
    """The answer holds a pattern, and not another; Python's `re`."""

    kind: Literal["regex"]
    pattern: str
    whole: bool = False
    """The pattern must match the whole answer, white space around it left out."""
    absent: str | None = None
    """What the answer must not hold."""
    ignore_case: bool = False

    @model_validator(mode="after")
    def _compiles(self) -> Regex:
        for name, pattern in (("pattern", self.pattern), ("absent", self.absent)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"{name}: a regular expression ({error})") from error
        return self

    def right(self, answer: str) -> bool:
        """Whether the answer is right."""
        flags = re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)
        find = re.fullmatch if self.whole else re.search
        if find(self.pattern, answer.strip(), flags) is None:
            return False
        return self.absent is None or re.search(self.absent, answer, flags) is None


class Json(_Check):
    """The answer is, or holds in a code block or between braces, this JSON value."""

    kind: Literal["json"]
    expected: Any
    subset: bool = False
    """Objects may have further keys."""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Largest difference of two numbers."""

    def right(self, answer: str) -> bool:
        """Whether the answer is right."""
        text = block(answer)
        for start in (0, *(found.start() for found in re.finditer(r"[\[{]", text))):
            try:
                found, end = json.JSONDecoder().raw_decode(text[start:])
            except (ValueError, RecursionError):
                continue
            if text[start] in "[{" or end == len(text):  # a bare number or word is JSON only where it is all
                return self._same(found, self.expected)
        return False

    def _same(self, found: Any, expected: Any) -> bool:
        if isinstance(expected, dict):
            if not isinstance(found, dict) or not expected.keys() <= found.keys():
                return False
            if not self.subset and found.keys() != expected.keys():
                return False
            return all(self._same(found[key], value) for key, value in expected.items())
        if isinstance(expected, list):
            return (
                isinstance(found, list)
                and len(found) == len(expected)
                and all(map(self._same, found, expected))
            )
        if isinstance(expected, bool) or isinstance(found, bool) or not isinstance(expected, int | float):
            return type(found) is type(expected) and bool(found == expected)
        return isinstance(found, int | float) and abs(found - expected) <= self.tolerance


class Numbers(_Check):
    """The numbers in the answer."""

    kind: Literal["numbers"]
    expected: Annotated[tuple[float, ...], Field(min_length=1)]
    where: Literal["all", "any", "last"] = "all"
    """all: they are the answer's numbers, in this order. any: each occurs. last: the answer's last ones."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-9

    def right(self, answer: str) -> bool:
        """Whether the answer is right."""
        found = [float(text.replace(",", "")) for text in _NUMBER.findall(answer)]
        if self.where == "any":
            return all(any(self._near(one, wanted) for one in found) for wanted in self.expected)
        compared = found if self.where == "all" else found[-len(self.expected) :]
        return len(compared) == len(self.expected) and all(map(self._near, compared, self.expected))

    def _near(self, found: float, expected: float) -> bool:
        return math.isfinite(found) and abs(found - expected) <= self.tolerance


class Sql(_Check):
    """The answer is a query of SQLite whose rows are those of the expected query."""

    kind: Literal["sql"]
    expected: str
    given: Annotated[tuple[str, ...], Field(min_length=1)]
    """Statements that make the tables and their rows."""
    ordered: bool = False

    @model_validator(mode="after")
    def _runs(self) -> Sql:
        try:
            self._rows(self.expected)
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise ValueError(f"statements and a query that SQLite runs ({error})") from error
        return self

    def right(self, answer: str) -> bool:
        """Whether the answer is right."""
        try:
            return self._rows(block(answer)) == self._rows(self.expected)
        except (sqlite3.Error, sqlite3.Warning, OverflowError, MemoryError, ValueError):
            return False

    def _rows(self, query: str) -> list[str]:
        database = sqlite3.connect(":memory:")
        try:
            for statement in self.given:
                database.execute(statement)
            end = time.monotonic() + SQL_S
            database.set_progress_handler(lambda: time.monotonic() > end, 1000)
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
            database.set_authorizer(_only_reads)
            cursor = database.execute(query)
            if cursor.description is None:
                raise sqlite3.ProgrammingError("found no query")
            rows = [repr(row) for row in cursor.fetchmany(10_000)]
        finally:
            database.close()
        return rows if self.ordered else sorted(rows)


def _only_reads(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action == sqlite3.SQLITE_FUNCTION and second == "load_extension":
        return sqlite3.SQLITE_DENY
    reads = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if action in reads else sqlite3.SQLITE_DENY


class Python(_Check):
    """The answer is Python code after which every assert holds."""

    kind: Literal["python"]
    asserts: Annotated[tuple[str, ...], Field(min_length=1)]
    seconds: Annotated[float, Field(gt=0, le=30)] = 5.0
    memory_mb: Annotated[int, Field(ge=64, le=2048)] = 256

    @model_validator(mode="after")
    def _parses(self) -> Python:
        for text in self.asserts:
            try:
                ast.parse(text)
            except SyntaxError as error:
                raise ValueError(f"asserts: Python ({error.msg}: {text!r})") from error
        return self

    def right(self, answer: str) -> bool:
        """Whether the answer is right."""
        return passes(block(answer), self.asserts, self.seconds, self.memory_mb)


Check = Annotated[Equals | Regex | Json | Numbers | Sql | Python, Field(discriminator="kind")]
CHECK: TypeAdapter[Check] = TypeAdapter(Check)
"""Reads a check of any kind."""


def block(answer: str) -> str:
    """What stands in the answer's first code block, or the whole answer."""
    found = _FENCE.search(answer)
    return (found.group(1) if found else answer).strip()


def graded(answers: Sequence[str], checks: Sequence[Check | None]) -> list[bool | None]:
    """Turn by turn; None where a turn has no check."""
    return [
        None if check is None else check.right(answer) for answer, check in zip(answers, checks, strict=False)
    ]
