"""Server-sent events, as the WHATWG standard and its own examples have them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_vllm.engines.sse import ServerSentEvent, SSEParser, data_of, parse, serialize
from soma_vllm.errors import EngineUnavailable


def read(pieces: Iterable[bytes | str], max_chars: int = 1000) -> list[ServerSentEvent]:
    parser = SSEParser(max_chars)
    return [event for piece in pieces for event in parser.feed(piece)]


def outcome(pieces: Iterable[bytes], max_chars: int) -> tuple[list[ServerSentEvent], bool]:
    """(the events, whether one after them was too long)."""
    found: list[ServerSentEvent] = []
    parser = SSEParser(max_chars)
    try:
        for piece in pieces:
            found.extend(parser.feed(piece))
    except EngineUnavailable:
        return [], True
    return found, False


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        # The standard's own examples.
        ("data: YHOO\ndata: +2\ndata: 10\n\n", [("YHOO\n+2\n10", "message")]),
        (
            ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
            [("first event", "message"), ("second event", "message"), (" third event", "message")],
        ),
        ("data\n\ndata\ndata\n\ndata:", [("", "message"), ("\n", "message")]),
        ("data:test\n\ndata: test\n\n", [("test", "message"), ("test", "message")]),
        (
            "event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n",
            [("73857293", "add"), ("2153", "remove")],
        ),
        # Further rules of it.
        ("\ufeffdata: a\n\n", [("a", "message")]),
        ("\ufeff\ufeffdata: a\n\n", []),
        ("data: a\r\rdata: b\r\n\r\ndata: c\n\r\n", [("a", "message"), ("b", "message"), ("c", "message")]),
        ("data: a\r\n\ndata: b\n\n", [("a", "message"), ("b", "message")]),
        ("event: lost\n\ndata: a\n\n", [("a", "message")]),
        ("event: x\nevent: y\ndata: a\n\n", [("a", "y")]),
        ("retry: 10\nsurprise: 1\nDATA: no\n data: no\ndata : no\ndata: a\n\n", [("a", "message")]),
        ("data: a: b\n\n", [("a: b", "message")]),
        # Text that other rules take for line ends.
        ("data: a\u2028b\x0bc\x85d\n\n", [("a\u2028b\x0bc\x85d", "message")]),
        ("data: cut off\n", []),
        ("", []),
    ],
)
def test_a_stream_is_read_as_the_standard_says(stream: str, events: list[tuple[str, str]]) -> None:
    assert [(found.data, found.event) for found in parse(stream)] == events
    assert [(found.data, found.event) for found in read([stream.encode()])] == events
    assert [(found.data, found.event) for found in read(stream)] == events


def test_an_id_stays_until_the_next_one() -> None:
    found = parse("id: 1\ndata: a\n\ndata: b\n\nid: 2\x00\ndata: c\n\nid\ndata: d\n\n")
    assert [event.id for event in found] == ["1", "1", "1", ""]


def test_bytes_that_are_no_utf_8_are_replaced() -> None:
    assert [event.data for event in read([b"data: \xff\xc3", b"\xa9\n\n"])] == ["\ufffd\u00e9"]


def test_an_event_is_there_with_the_first_byte_of_the_line_end_that_ends_it() -> None:
    parser = SSEParser()
    assert [event.data for event in parser.feed(b"data: a\r\n\r")] == ["a"]
    assert [event.data for event in parser.feed(b"\ndata: b\r\n\r\n")] == ["b"]


@pytest.mark.parametrize(
    "stream", ["data: 0123456789\n\n", "data: 0123\ndata: 45\n\n", "data: 0123456789", ": 0123456789abcde"]
)
def test_an_event_that_is_too_long_is_refused_before_it_ends(stream: str) -> None:
    with pytest.raises(EngineUnavailable, match="more than 15 characters; expected at most that"):
        read(stream, max_chars=15)


def test_neither_comments_nor_events_add_up_to_one_that_is_too_long() -> None:
    assert len(read(["data: 0123\n\n: ping\n", "\n: ping\n" * 20, "data: 0123\n\n"], max_chars=15)) == 2


def test_the_events_before_one_that_is_too_long_are_read() -> None:
    events = SSEParser(15).feed("data: a\n\ndata: 0123456789\n\n")
    assert next(events).data == "a"
    with pytest.raises(EngineUnavailable):
        next(events)


@pytest.mark.parametrize(
    ("event", "data"),
    [
        ("data: {}\n\n", "{}"),
        ("data:{}\r\n\r\n", "{}"),
        ("data: {}\r\n", None),
        ("data: {}\r\r", "{}"),
        ("data: a\n\ndata: b\n\n", "a"),
        ("data: a\ndata: b\n\n", "a\nb"),
        ("event: x\ndata: {}\n\n", "{}"),
        ("data: [DONE]\n\n", "[DONE]"),
        ('data: {"a": "\ud83d"}\n\n', '{"a": "\ud83d"}'),
        (": ping\n\n", None),
        ("", None),
    ],
)
def test_the_data_of_one_event(event: str, data: str | None) -> None:
    assert data_of(event) == data


def test_an_event_is_written_in_the_usual_lines() -> None:
    assert serialize('{"a": 1}') == 'data: {"a": 1}\n\n'
    assert serialize("a\nb", "x") == "event: x\ndata: a\ndata: b\n\n"
    assert str(ServerSentEvent("a", "x")) == "event: x\ndata: a\n\n"
    assert str(ServerSentEvent("a")) == "data: a\n\n"
    with pytest.raises(ValueError, match="found a line end"):
        serialize("a", "x\ndata: b")


LINES = st.sampled_from(
    [
        "data",
        "data:",
        "data: a",
        "data:\u00e9\U0001f600",
        "event: x",
        "id: 1",
        ": c",
        "retry: 5",
        "",
        "\ufeffdata: b",
        "x",
    ]
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"])), max_size=12).map(
    lambda lines: "".join(line + end for line, end in lines)
)


@given(st.data(), STREAMS, st.sampled_from([12, 1000]))
def test_however_the_stream_is_cut_the_events_are_the_same(data: st.DataObject, stream: str, most: int) -> None:
    sent = stream.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=10)))
    pieces = [sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    assert outcome(pieces, most) == outcome([sent], most)
    assert outcome([bytes([byte]) for byte in sent], most) == outcome([sent], most)


TEXT = st.text(st.characters(codec="utf-8"))


@given(st.lists(st.tuples(TEXT, TEXT.filter(lambda text: not set(text) & set("\r\n")))))
def test_what_is_written_is_read(events: list[tuple[str, str]]) -> None:
    read_back = parse("".join(serialize(data, name) for data, name in events))
    expected = [(data.replace("\r\n", "\n").replace("\r", "\n"), name or "message") for data, name in events]
    assert [(found.data, found.event) for found in read_back] == expected
