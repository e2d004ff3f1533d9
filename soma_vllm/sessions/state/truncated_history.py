"""Recognising a history that its client cut short: oldest turns dropped, to fit a context window.

A chain cannot see it, because it is a digest of everything from the beginning. So the exchanges that are left
are compared with the recorded ones, one by one (`AnswerMark.link`). Guarantees: what is recognised is the
record with one run of turns left out, at the beginning or after it, and nothing edited, added or swapped in
what is left; the system messages that begin it are the recorded ones; exchanges may follow that are not on
record, because they were edited or a killed server had no time to record them, but none that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from soma_vllm.sessions.state.transcript import LINK_HALF, TranscriptDigest


@dataclass(frozen=True)
class Overlap:
    """Where a history and a record agree."""

    turns: int
    """Recorded turns, from the first, after which the history goes on; 0 for none."""
    end: int
    """Index of the message of the history that follows them."""
    left_out: tuple[int, int] | None = None
    """Turns that the history lacks, as the bounds of a slice."""


def trimmed(record: Sequence[Sequence[str]], reading: TranscriptDigest) -> Overlap | None:
    """The furthest overlap of a trimmed history with a record, given as each turn's links; None for none."""
    marks = reading.marks
    links = [link for turn in record for link in turn]
    ends = list(accumulate(len(turn) for turn in record))
    known = set(links)
    for count in range(len(marks), 0, -1):
        if any(mark.link in known for mark in marks[count:]):
            return None
        said = [mark.link for mark in marks[:count]]
        for turns in range(len(record), 0, -1):
            kept = _kept(links[: ends[turns - 1]], said, reading.cut)
            if kept is not None:
                return Overlap(turns, marks[count - 1].end, _left_out(ends[:turns], *kept))
    return None


def _kept(record: Sequence[str], said: Sequence[str], cut: bool) -> tuple[int, int] | None:
    """(how many links of the record's beginning, how many of its end) make up all of what was said; None where
    they do not. `cut`: the first exchange said has lost its query."""
    last = 0
    while last < min(len(record), len(said)) and record[-1 - last] == said[-1 - last]:
        last += 1
    first = len(said) - last
    if last == 0:
        return None
    if first + last <= len(record) and list(said[:first]) == list(record[:first]):
        return first, last
    half_known = cut and first == 1 and last < len(record) and _answer(said[0]) == _answer(record[-1 - last])
    return (0, last) if half_known else None


def _answer(link: str) -> str:
    return link[LINK_HALF:]


def _left_out(ends: Sequence[int], first: int, last: int) -> tuple[int, int] | None:
    """The turns, as a slice's bounds, of which a link is neither in the first nor in the last."""
    begins = [0, *ends[:-1]]
    begin = sum(end <= first for end in ends)
    end = sum(begin < ends[-1] - last for begin in begins)
    return (begin, end) if begin < end else None
