"""What the surrogate is shown of a long dialogue (the paper's compressed prefix, section 3.3).

Pure functions from messages to messages. Turns are cut at user messages. The summary is put in front of the
first kept user message, not into a message of its own, so that templates which insist on alternating roles
accept the result.

* full: everything, unchanged.
* sliding: system message, summary, last K turns. The paper's form: its head changes every turn.
* anchored: system message and turn 1 verbatim, then older turns that bring facts, a summary of the others, the
  last K turns. The window moves `window_step` turns at a time; between two moves each prompt begins with all of
  the prompt before it, so that the engine's prefix cache serves everything but the last answer and the query.
  With `anchor_role: system` the anchor's queries stand in the system message, without their answers: fewer
  tokens at the same agreement (docs/experiments).

Facts stay in the prompt because weights do not learn them in a few steps; behaviour (a format, a voice) need
not, since an adapter carries it (docs/experiments). What is not plainly behaviour counts as facts: a fact that
is dropped makes the answer wrong, a style that is kept costs tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil
from typing import Any

from soma_vllm.config import Prefix
from soma_vllm.sessions.state.transcript import text_of
from soma_vllm.types import Message

FACTUAL_WORDS = 40
"""A query this long pastes something in."""
FACTUAL_NUMBERS = 6
"""A query with this many numbers brings data."""
SUMMARY_TURNS = 12
"""Turns named in a summary, the latest ones: a prompt must not grow with the dialogue."""
WORD_LETTERS = 12
"""Longer runs without a space count as several words: scripts without spaces, encoded data."""
_STRUCTURE = re.compile(
    r"```|^\s*\|.*\|.*\|\s*$|^\s*[{\[].*[:,].*|\bCREATE TABLE\b|</?\w+>|(?:^\s*(?:[-*•]|\d+[.)])\s.*\n?){3}",
    re.MULTILINE,
)
"""A code fence, a table's row, JSON, SQL schema, markup, or a list of three items."""
_NUMBER = re.compile(r"\b\d+(?:[.,:]\d+)*\b")


def compress(messages: Sequence[Message], prefix: Prefix, keep_turns: int) -> tuple[Message, ...]:
    """The messages to send instead of `messages`; the last user message is always verbatim.

    `keep_turns` is K, the finished turns kept verbatim before the current query, at least 0; an anchored window
    holds up to `window_step` - 1 more.
    """
    head, turns = split_turns(messages)
    if prefix.mode == "full" or len(turns) <= 1:
        return tuple(messages)
    anchored = prefix.mode == "anchored"
    anchor = turns[:1] if anchored else []
    older = turns[len(anchor) : -1]
    step = prefix.window_step if anchored else 1
    dropped = max(0, len(older) - keep_turns) // step * step
    if dropped == 0:
        return tuple(messages)
    kept = [*older[dropped:], turns[-1]]
    words = prefix.anchor_words if anchored and prefix.anchor == "facts" else 0
    pinned, rest = _pin(older[:dropped], words)
    if rest and prefix.summary_words > 0:
        kept[0] = _with_summary(kept[0], summary(rest, prefix.summary_words))
    if anchored and prefix.anchor_role == "system":
        return tuple(_with_system_anchor(head, [*anchor, *pinned], kept))
    return tuple(head + [m for turn in [*anchor, *pinned, *kept] for m in turn])


def factual(message: Message) -> bool:
    """Whether a user's message or a tool's result brings facts that later turns may ask for.

    A passage, a table, code, a list, data; an attachment and a tool's result always do.
    """
    content = message.get("content")
    if message.get("role") == "tool" or (isinstance(content, list) and any(map(_attached, content))):
        return True
    text = text_of(message)
    return (
        words_in(text) >= FACTUAL_WORDS
        or len(_NUMBER.findall(text)) >= FACTUAL_NUMBERS
        or _STRUCTURE.search(text) is not None
    )


def words_in(text: str) -> int:
    """Words of a text, a very long one counted as several."""
    return sum(ceil(len(word) / WORD_LETTERS) for word in text.split())


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(messages before the first user message, turns); each turn begins with a user message."""
    head: list[Message] = []
    turns: list[list[Message]] = []
    for message in messages:
        if message.get("role") == "user" and not (turns and _is_open(turns[-1])):
            turns.append([message])
        elif turns:
            turns[-1].append(message)
        else:
            head.append(message)
    return head, turns


def summary(turns: Sequence[Sequence[Message]], words: int) -> str:
    """One line that names what the latest of these turns asked, by the first `words` words of each query."""
    topics = (_shortened(text_of(turn[0]), words) for turn in turns[-SUMMARY_TURNS:])
    return f"[Earlier in this conversation the user asked: {'; '.join(topics)}]"


def _pin(turns: Sequence[list[Message]], words: int) -> tuple[list[list[Message]], list[list[Message]]]:
    """(turns that stay verbatim, the others): factual ones, oldest first, while `words` last.

    Oldest first, so that a turn once pinned stays pinned, and the anchor only ever grows at its end.
    """
    pinned: list[list[Message]] = []
    rest: list[list[Message]] = []
    for turn in turns:
        length = sum(words_in(text_of(message)) for message in turn)
        brings = any(factual(message) for message in turn if message.get("role") != "assistant")
        if brings and length <= words:
            words -= length
            pinned.append(turn)
        else:
            rest.append(turn)
    return pinned, rest


def _with_system_anchor(
    head: list[Message], anchor: Sequence[list[Message]], kept: Sequence[list[Message]]
) -> list[Message]:
    """`head`, anchor and kept turns, with every query of the anchor that is text in one system message.

    What cannot stand there, attachments and tool results, stays a turn with its answer. Whatever else the head
    holds, such as an assistant's greeting, follows the system message.
    """
    texts = [text_of(message) for message in head if message.get("role") == "system"]
    turns: list[list[Message]] = []
    for turn in anchor:
        if _is_text_alone(turn):
            texts += [text_of(message) for message in turn if message.get("role") == "user"]
        else:
            turns.append(turn)
    system = {"role": "system", "content": "\n\n".join(texts)}
    others = [message for message in head if message.get("role") != "system"]
    return [*([system] if texts else []), *others, *(m for turn in [*turns, *kept] for m in turn)]


def _is_text_alone(turn: Sequence[Message]) -> bool:
    """Whether a turn holds queries and answers only, and no attachment."""
    contents = [message.get("content") for message in turn if message.get("role") == "user"]
    spoken = all(message.get("role") in ("user", "assistant") for message in turn)
    return spoken and not any(isinstance(c, list) and any(map(_attached, c)) for c in contents)


def _shortened(text: str, words: int) -> str:
    """The first `words` words, on one line; cut inside a word that has no end."""
    said = text.split()
    short = " ".join(said[:words])[: words * WORD_LETTERS]
    return short if short == " ".join(said) else short + "…"


def _attached(part: object) -> bool:
    """Whether a content part is something other than text."""
    return isinstance(part, dict) and part.get("type", "text") != "text"


def _is_open(turn: Sequence[Message]) -> bool:
    """A turn whose user is still speaking: consecutive user messages belong to one turn."""
    return all(message.get("role") == "user" for message in turn)


def _with_summary(turn: Sequence[Message], line: str) -> list[Message]:
    first = dict(turn[0])
    content: Any = first.get("content")
    if isinstance(content, list):
        first["content"] = [{"type": "text", "text": line}, *content]
    else:
        first["content"] = f"{line}\n\n{content or ''}"
    return [first, *turn[1:]]
