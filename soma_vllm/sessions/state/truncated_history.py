"""Where a history and a record agree, although the client dropped turns or reworded what stands around answers.

A chain cannot see it, because it is a digest of everything from the beginning.

`trimmed` compares the exchanges that are left with the recorded ones (`AnswerMark.link`). Guarantees: what is
recognised is the record with one run of turns left out, at the beginning or after it, and nothing edited, added
or swapped in what is left; exchanges may follow that are not on record, because they were edited or a killed
server had no time to record them, but none that are.

`reworded` compares the answers alone, those that were generated here. Guarantees: they stand in the history in
their order, one run of turns left out at most, and no other recorded answer among them.

Both take time in proportion to the messages and the turns, whatever these say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from soma_vllm.sessions.state.transcript import LINK_HALF, TranscriptDigest

WINDOW = 3
"""Answers of a history among which a recorded one is looked for that its client has changed."""


@dataclass(frozen=True)
class Overlap:
    """Where a history and a record agree."""

    turns: int
    """Recorded turns, from the first, after which the history goes on; 0 for none."""
    end: int
    """Index of the message of the history that follows them."""
    left_out: tuple[int, int] | None = None
    """Turns that the history lacks, as the bounds of a slice."""
    found: tuple[tuple[int, int], ...] = ()
    """(recorded turn, mark of the history), both from 0, where answers alone were compared."""


def trimmed(record: Sequence[Sequence[str]], reading: TranscriptDigest) -> Overlap | None:
    """The furthest overlap of a trimmed history with a record, given as each turn's links; None for none."""
    links = [link for turn in record for link in turn]
    ends = list(accumulate(len(turn) for turn in record))
    known = set(links)
    # Whatever follows the last exchange on record is new; nothing that is not on record may stand before it.
    count = max((index for index, mark in enumerate(reading.marks, 1) if mark.link in known), default=0)
    said = [mark.link for mark in reading.marks[:count]]
    if not said:
        return None
    both = zip(said, links, strict=False)
    alike = next((index for index, (one, other) in enumerate(both) if one != other), min(count, len(links)))
    for turns, last in _common_endings(links, ends, said):
        kept = _kept(links, ends[turns - 1], said, last, alike, reading.cut) if last else None
        if kept is not None:
            return Overlap(turns, reading.marks[count - 1].end, _left_out(ends[:turns], *kept))
    return None


def reworded(
    answers: Sequence[str | None],
    reading: TranscriptDigest,
    changed: Callable[[int, int], bool],
) -> Overlap | None:
    """The furthest overlap of a history with a record, given as each turn's answer; None for none.

    `changed` says whether a recorded turn's answer is that of a mark, changed by its client.
    """
    marks = reading.marks
    places: defaultdict[str, list[int]] = defaultdict(list)
    for index, mark in enumerate(marks):
        places[mark.answer].append(index)
    found: list[tuple[int, int]] = []
    after = 0
    for turn, answer in enumerate(answers):
        here = _first(places, answer, after)
        near = range(after, min(after + WINDOW, len(marks) if here is None else here))
        here = next((index for index in near if changed(turn, index)), here)
        if here is None:
            break
        found.append((turn, here))
        after = here + 1
    first = len(found)
    tail = _tail(answers, places, first, after)
    whole = [*found, *tail]
    heard = {index for _, index in whole}
    recorded = set(answers)
    if not whole or any(i not in heard and mark.answer in recorded for i, mark in enumerate(marks)):
        return None
    left_out = (first, tail[0][0]) if tail and tail[0][0] > first else None
    return Overlap(whole[-1][0] + 1, marks[whole[-1][1]].end, left_out, tuple(whole))


def _first(places: dict[str, list[int]], answer: str | None, after: int) -> int | None:
    """The first place of an answer from an index on."""
    at = places.get(answer or "", ())
    index = bisect_left(at, after)
    return at[index] if index < len(at) else None


def _tail(
    answers: Sequence[str | None], places: dict[str, list[int]], first: int, after: int
) -> list[tuple[int, int]]:
    """The run of the latest turns that stand in a history from an index on, where turns before it do not."""
    found: list[tuple[int, int]] = []
    before: int | None = None
    for turn in range(len(answers) - 1, first - 1, -1):
        at = places.get(answers[turn] or "", ())
        index = (len(at) if before is None else bisect_left(at, before)) - 1
        if index >= 0 and at[index] >= after:
            before = at[index]
            found.append((turn, before))
        elif found:
            break
    return found[::-1]


def _common_endings(links: Sequence[str], ends: Sequence[int], said: Sequence[str]) -> list[tuple[int, int]]:
    """(turns, how many exchanges the record up to them and what was said have in common at their ends), the
    most turns first."""
    both = [*reversed(said), "", *reversed(links)]
    alike = [0] * len(both)
    left = right = 0
    for index in range(1, len(both)):  # Z-function
        length = min(alike[index - left], right - index) if index < right else 0
        while index + length < len(both) and both[length] == both[index + length]:
            length += 1
        alike[index] = length
        if index + length > right:
            left, right = index, index + length
    begin = len(said) + 1
    return [(turns, alike[begin + len(links) - ends[turns - 1]]) for turns in range(len(ends), 0, -1)]


def _kept(
    links: Sequence[str], count: int, said: Sequence[str], last: int, alike: int, cut: bool
) -> tuple[int, int] | None:
    """(how many of the first `count` links, from their beginning, how many from their end) make up all of what
    was said; None where they do not. `cut`: the first exchange said has lost its query."""
    first = len(said) - last
    if first + last <= count and first <= alike:
        return first, last
    half_known = cut and first == 1 and last < count and _answer(said[0]) == _answer(links[count - 1 - last])
    return (0, last) if half_known else None


def _answer(link: str) -> str:
    return link[LINK_HALF:]


def _left_out(ends: Sequence[int], first: int, last: int) -> tuple[int, int] | None:
    """The turns, as a slice's bounds, of which a link is neither in the first nor in the last."""
    begins = [0, *ends[:-1]]
    begin = sum(end <= first for end in ends)
    end = sum(begin < ends[-1] - last for begin in begins)
    return (begin, end) if begin < end else None
