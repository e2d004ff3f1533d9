"""How ids and documents are spelt in the database."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import sqlite

from soma_vllm.sessions.sql.tables import Document, Name

DIALECT = sqlite.dialect()
ANYTHING = st.text(st.characters(exclude_categories=()))
NAME, DOCUMENT = Name(), Document()


def spelt(name: str) -> str:
    stored = NAME.process_bind_param(name, DIALECT)
    assert stored is not None
    return stored


@given(ANYTHING)
def test_any_id_is_spelt_in_what_every_database_takes_and_read_back(name: str) -> None:
    stored = spelt(name)
    assert "\0" not in stored.encode("utf-8").decode("utf-8")
    assert NAME.process_result_value(stored, DIALECT) == name


@given(ANYTHING, ANYTHING)
def test_two_ids_are_never_spelt_alike(one: str, other: str) -> None:
    assert (spelt(one) == spelt(other)) == (one == other)


def test_an_ordinary_id_is_spelt_as_it_is() -> None:
    assert spelt("agent-7/日本 é") == "agent-7/日本 é"


@given(st.dictionaries(ANYTHING, ANYTHING | st.integers() | st.floats(allow_nan=False) | st.none()))
def test_any_document_is_spelt_in_ascii_and_read_back(document: dict[str, object]) -> None:
    stored = DOCUMENT.process_bind_param(document, DIALECT)
    assert stored is not None
    assert stored.isascii()
    assert "\0" not in stored
    assert DOCUMENT.process_result_value(stored, DIALECT) == paired(document)


def paired(document: dict[str, object]) -> dict[str, object]:
    """Two surrogates that make a character are that character to every JSON reader."""
    return json.loads(json.dumps(document))
