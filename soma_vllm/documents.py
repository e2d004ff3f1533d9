"""JSON and YAML from outside, read within bounds: the one reader of files that people and other programs wrote.

Guarantees: whatever a file holds, reading it gives a document of plain values, or raises `DocumentError` with
one line that says what is wrong. A byte order mark is no mistake; another encoding than UTF-8, nesting beyond
`MAX_DEPTH` and, in YAML, a key that stands twice in one mapping or an alias that holds itself are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from soma_vllm.errors import DocumentError

MAX_BYTES = 1024**3
MAX_DEPTH = 100
MAX_YAML_VALUES = 1_000_000
"""Values of a YAML document, what aliases repeat included."""

Pairs = Callable[[list[tuple[str, Any]]], Any]


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """A file's content.

    Raises:
        DocumentError: it cannot be read, or is longer than `most` bytes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise DocumentError(f"found more than {most} bytes; expected at most as many")
    return content


def text_of_bytes(content: bytes) -> str:
    """UTF-8 text, without its byte order mark.

    Raises:
        DocumentError: it is in another encoding.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DocumentError("found UTF-16; expected UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        found = f"found the byte 0x{content[error.start]:02x} in line {line}"
        raise DocumentError(f"{found}, which is no UTF-8; expected text in UTF-8") from None


def parse_json(content: bytes | str, unique: Pairs | None = None) -> Any:
    """A JSON document; `unique` may look at the keys of each object, as json's `object_pairs_hook`.

    Raises:
        DocumentError: it is not JSON in UTF-8, or nested too deep.
    """
    text = text_of_bytes(content) if isinstance(content, bytes) else content
    try:
        document = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except ValueError as error:
        raise DocumentError(f"is not JSON: {error}") from error
    check_nesting(document)
    return document


def read_json(path: Path, unique: Pairs | None = None, most: int = MAX_BYTES) -> Any:
    """The JSON document of a file. Raises DocumentError as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, most), unique)


def parse_yaml(content: bytes | str) -> Any:
    """A YAML document. Numbers such as 5e-3, which YAML 1.1 takes for text, are numbers.

    Raises:
        DocumentError: it is not YAML in UTF-8, has a key twice, or is nested too deep.
    """
    text = text_of_bytes(content) if isinstance(content, bytes) else content
    try:
        document = yaml.load(text, _Loader)
    except DocumentError:
        raise
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except (yaml.YAMLError, ValueError) as error:
        raise DocumentError(f"is not YAML: {' '.join(str(error).split())}") from error
    check_nesting(document, MAX_YAML_VALUES)
    return document


def check_nesting(document: Any, most: int | None = None) -> None:
    """Walk through a document.

    Raises:
        DocumentError: it is nested too deep, holds itself, or holds more than `most` values.
    """
    level, depth, count = _inside([document]), 1, 0
    while level:
        count += len(level)
        if depth > MAX_DEPTH:
            raise DocumentError(_TOO_DEEP)
        if most is not None and count > most:
            raise DocumentError(f"found more than {most} values; expected at most as many")
        level = [inner for value in level for inner in _inside(value)]
        depth += 1


def is_unicode(text: str) -> bool:
    """Whether text holds no half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_TOO_DEEP = f"found more than {MAX_DEPTH} levels of nesting, or an alias that holds itself; expected fewer"


def _inside(value: Any) -> list[Any]:
    """The containers in a container; leaves have nothing in them and are not walked."""
    values = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    )
    return [inner for inner in values if isinstance(inner, dict | list | tuple | set)]


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key that stands twice in a mapping, and text that is no Unicode."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.value != "<<":
                line, found = key.start_mark.line + 1, f"found {key.value} twice in one section"
                raise DocumentError(f"line {line}: {found}; expected each key once")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        if not is_unicode(node.value):
            line = node.start_mark.line + 1
            raise DocumentError(f"line {line}: found half a surrogate pair; expected Unicode text")
        return super().construct_scalar(node)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)
