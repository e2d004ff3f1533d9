"""From YAML and `--set` to a `Config`, or to every mistake in them at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from soma_vllm.config.root import Config
from soma_vllm.documents import parse_yaml, read_bytes
from soma_vllm.errors import ConfigError, DocumentError
from soma_vllm.private import masked

MAX_CONFIG_BYTES = 16 * 1024**2


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: with every mistake, each naming its key, what was found and what was expected.
    """
    source = str(path)
    try:
        document = parse_yaml(read_bytes(Path(path), MAX_CONFIG_BYTES))
    except DocumentError as error:
        raise ConfigError(source, [str(error)]) from error
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(source, [f"found a {type(document).__name__}; expected a mapping of keys"])
    problems = [masked(problem) for text in overrides if (problem := _override(document, text))]
    return parse_config(document, source, problems)


def parse_config(document: Mapping[str, Any], source: str, problems: Sequence[str] = ()) -> Config:
    """Validate a mapping; `problems` found earlier are reported together with its own.

    Raises:
        ConfigError: with every mistake.
    """
    try:
        # JSON mode keeps strictness and still reads lists as tuples and strings as enums.
        config = Config.model_validate_json(json.dumps(document))
    except ValidationError as error:
        found = [masked(line) for item in error.errors() for line in _describe(dict(item))]
        raise ConfigError(source, [*problems, *found]) from None
    except TypeError as error:
        raise ConfigError(
            source, [*problems, f"holds a value YAML can express but a config cannot: {error}"]
        ) from error
    if problems:
        raise ConfigError(source, problems)
    return config


def _override(document: dict[str, Any], text: str) -> str | None:
    """Set one `a.b=value` in place; a line that says what is wrong, if anything is."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        return f"--set {text}: expected key=value, such as gate.accept_threshold=0.1"
    *sections, leaf = key.strip().split(".")
    node = document
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            return f"--set {text}: {section} is a value, not a section"
        node = child
    try:
        node[leaf] = parse_yaml(value)
    except DocumentError as error:
        return f"--set {text}: {error}"
    return None


def _describe(error: Mapping[str, Any]) -> list[str]:
    """One pydantic error as lines for people."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return [f"{where}: unknown key; expected {_siblings(error['loc'])}"]
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).splitlines()
    expectation = error["msg"].replace("Input should be", "expected")
    return [f"{where}: found {error['input']!r}; {expectation}"]


def _siblings(location: Sequence[str | int]) -> str:
    """The keys that would have been right where an unknown one stands."""
    model: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return "one of " + ", ".join(model.model_fields)
