"""Calls of tools: whether a request allows them, and whether two answers make the same ones.

Guarantees: nothing is fetched to check a call, and no check takes more than a fixed number of steps, whatever
schema a client declares; what is found is a word of a closed list and quotes nothing.

Regular expressions of a schema (`pattern`, `patternProperties`) and the `unevaluated…` keywords are not
checked: a client's expression could occupy the server for hours.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.validators import extend
from referencing.jsonschema import EMPTY_REGISTRY

from soma_vllm.sessions.state.answer_print import calls_of

MOST_STEPS = 1_000
"""Keywords of schemas that are applied to the calls of one reply; a common call takes tens."""

Calls = Sequence[Mapping[str, Any]]
"""OpenAI's `tool_calls`."""


class Mismatch(StrEnum):
    """What is wrong with a surrogate's calls of tools."""

    UNKNOWN_FUNCTION = "unknown_function"
    """It is none of those that the request declares."""
    INVALID_ARGUMENTS = "invalid_arguments"
    """They are no JSON object, or not as the function's schema has them."""
    UNVERIFIABLE = "unverifiable"
    """The schema cannot be applied, or not within `MOST_STEPS`."""
    NO_CALL = "no_call"
    """The original called a tool, the surrogate did not."""
    CALLED = "called"
    """The surrogate called a tool, the original did not."""
    OTHER_FUNCTIONS = "other_functions"
    OTHER_ARGUMENTS = "other_arguments"
    OTHER_WORDS = "other_words"
    """Texts of the arguments, or the answers to a tool's result, are too far apart for the gate's judge."""
    NO_ANSWER = "no_answer"
    """The surrogate did not answer the turn."""


@dataclass(frozen=True)
class Comparison:
    """How the calls of two answers compare."""

    mismatch: Mismatch | None
    texts: tuple[tuple[str, str], ...] = ()
    """(the original's, the surrogate's) words in arguments, for a judge: all else is equal."""


def fault(calls: Calls, tools: object) -> Mismatch | None:
    """What is wrong with these calls under a request's `tools`; None where they are allowed.

    UNVERIFIABLE only where nothing else is wrong with any of them.
    """
    schemas = _schemas(tools)
    read = calls_of({"tool_calls": list(calls)})
    if len(read) != len(calls):
        return Mismatch.UNKNOWN_FUNCTION
    steps = _steps.set([MOST_STEPS])
    try:
        found = {_fault_of(name, arguments, schemas) for name, arguments in read} - {None}
    finally:
        _steps.reset(steps)
    return next((mismatch for mismatch in Mismatch if mismatch in found), None)


def compare(original: Calls, surrogate: Calls, tools: object) -> Comparison:
    """How the surrogate's calls differ from the original's.

    Calls in one message may run in any order: each has to have its own counterpart, of the same function.
    """
    if not original and not surrogate:
        return Comparison(None)
    if not (original and surrogate):
        return Comparison(Mismatch.NO_CALL if original else Mismatch.CALLED)
    if (mismatch := fault(surrogate, tools)) is not None:
        return Comparison(mismatch)
    theirs, ours = (calls_of({"tool_calls": list(calls)}) for calls in (original, surrogate))
    if sorted(str(name) for name, _ in theirs) != sorted(str(name) for name, _ in ours):
        return Comparison(Mismatch.OTHER_FUNCTIONS)
    try:
        texts = _texts(theirs, ours, _schemas(tools))
    except RecursionError:  # as deep as JSON can be
        return Comparison(Mismatch.UNVERIFIABLE)
    return Comparison(Mismatch.OTHER_ARGUMENTS) if texts is None else Comparison(None, tuple(texts))


def _texts(
    theirs: Sequence[list[Any]], ours: list[list[Any]], schemas: Mapping[str, Any]
) -> list[tuple[str, str]] | None:
    """The texts of calls of the same functions that a judge has to compare; None where the rest differs."""
    texts: list[tuple[str, str]] = []
    for name, arguments in theirs:
        schema = schemas.get(str(name))
        found = [
            (pairs, index)
            for index, (other, given) in enumerate(ours)
            if other == name and (pairs := _apart(_given(arguments), _given(given), schema)) is not None
        ]
        if not found:
            return None
        pairs, index = min(found, key=lambda one: len(one[0]))
        texts += pairs
        del ours[index]
    return texts


def _schemas(tools: object) -> dict[str, Any]:
    """The parameters' schema of each declared function."""
    declared = tools if isinstance(tools, list | tuple) else ()
    functions = [tool.get("function") for tool in declared if isinstance(tool, Mapping)]
    named = [f for f in functions if isinstance(f, Mapping) and isinstance(f.get("name"), str)]
    try:
        return {function["name"]: _undated(function.get("parameters") or {}) for function in named}
    except RecursionError:  # as deep as JSON can be: none of them can be applied
        return {function["name"]: None for function in named}


def _undated(schema: Any) -> Any:
    """Without any `$schema`, by which the library would choose another class, one that counts no steps."""
    if isinstance(schema, Mapping):
        kept = (item for item in schema.items() if item[0] != "$schema" or not isinstance(item[1], str))
        return {name: _undated(value) for name, value in kept}
    return [_undated(one) for one in schema] if isinstance(schema, list) else schema


def _given(arguments: object) -> object:
    """A call's arguments; a function without any may be called with nothing."""
    return {} if arguments is None or arguments == "" else arguments


def _fault_of(name: object, arguments: object, schemas: Mapping[str, Any]) -> Mismatch | None:
    given = _given(arguments)
    if not isinstance(name, str) or name not in schemas:
        return Mismatch.UNKNOWN_FUNCTION
    if not isinstance(given, dict):
        return Mismatch.INVALID_ARGUMENTS
    try:
        valid = _Arguments(schemas[name], registry=EMPTY_REGISTRY).is_valid(given)
    except Exception:  # whatever a client declares: an unknown type, a reference to elsewhere, a cycle
        return Mismatch.UNVERIFIABLE
    return None if valid else Mismatch.INVALID_ARGUMENTS


def _apart(original: object, surrogate: object, schema: object) -> list[tuple[str, str]] | None:
    """The texts of two values that a judge has to compare; None where the values differ elsewhere."""
    known = schema if isinstance(schema, Mapping) else {}
    if isinstance(original, dict) and isinstance(surrogate, dict):
        properties = known.get("properties")
        of = properties if isinstance(properties, Mapping) else {}
        names = [*original, *(name for name in surrogate if name not in original)]
        return _joined(
            _apart(_value(original, name, of), _value(surrogate, name, of), of.get(name)) for name in names
        )
    if isinstance(original, list) and isinstance(surrogate, list):
        same = len(original) == len(surrogate)
        pairs = zip(original, surrogate, strict=False)
        return _joined(_apart(*pair, known.get("items")) for pair in pairs) if same else None
    if isinstance(original, str) and isinstance(surrogate, str):
        mine, other = _plain(original), _plain(surrogate)
        free = " " in mine and not known.keys() & {"enum", "const", "format", "pattern"}
        return [] if mine == other else [(mine, other)] if free else None
    same = original == surrogate and isinstance(original, bool) == isinstance(surrogate, bool)
    return [] if same else None


def _joined(parts: Iterator[list[tuple[str, str]] | None]) -> list[tuple[str, str]] | None:
    joined: list[tuple[str, str]] = []
    for part in parts:
        if part is None:
            return None
        joined += part
    return joined


def _value(given: Mapping[str, object], name: str, properties: Mapping[str, object]) -> object:
    """An argument, or what stands for it where it is not given."""
    value, schema = given.get(name), properties.get(name)
    return schema.get("default") if value is None and isinstance(schema, Mapping) else value


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


_steps: ContextVar[list[int]] = ContextVar("steps left")


def _counted(keyword: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def apply(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        left = _steps.get()
        left[0] -= 1
        if left[0] < 0:
            raise RecursionError("too many steps")
        yield from keyword(validator, value, instance, schema) or ()

    return apply


def _unchecked(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    return iter(())


def _additional(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if "patternProperties" not in schema:  # they may name those that are additional
        yield from Draft202012Validator.VALIDATORS["additionalProperties"](validator, value, instance, schema)


_UNCHECKED = ("pattern", "patternProperties", "unevaluatedProperties", "unevaluatedItems")

_Arguments: Any = extend(
    Draft202012Validator,
    {name: _counted(keyword) for name, keyword in Draft202012Validator.VALIDATORS.items()}
    | dict.fromkeys(_UNCHECKED, _unchecked)
    | {"additionalProperties": _counted(_additional)},
)
