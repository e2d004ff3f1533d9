"""What the surrogate is shown of a long dialogue (the paper's compressed prefix, section 3.3).

Pure functions from messages to messages. Turns are cut at user messages. The summary is put in front of the
first kept user message, not into a message of its own, so that templates which insist on alternating roles
accept the result.

* full: everything, unchanged.
* sliding: system message, summary, last K turns. The paper's form: its head changes every turn.
* anchored: system message and turn 1 verbatim, summary of the middle, last K turns; the window moves
  `window_step` turns at a time, so the head stays byte-identical in between and the engine's cache works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soma_vllm.session.transcript import text_of
from soma_vllm.types import Message

SUMMARY_WORDS = 12
"""Words kept of each summarised query: enough to name its topic, too few to carry its facts."""


def compress(messages: Sequence[Message], mode: str, keep_turns: int, window_step: int) -> tuple[Message, ...]:
    """The messages to send instead of `messages`; the last user message is always verbatim.

    Args:
        mode: "full", "sliding" or "anchored".
        keep_turns: K, finished turns kept verbatim before the current query, at least 1.
        window_step: turns by which the anchored window moves at once, at least 1.
    """
    head, turns = split_turns(messages)
    if mode == "full" or len(turns) <= 1:
        return tuple(messages)
    anchor = turns[:1] if mode == "anchored" else []
    older = turns[len(anchor) : -1]
    step = window_step if mode == "anchored" else 1
    dropped = max(0, len(older) - keep_turns) // step * step
    if dropped == 0:
        return tuple(messages)
    kept = [*older[dropped:], turns[-1]]
    summarised = _with_summary(kept[0], summary(older[:dropped]))
    return tuple(head + [m for turn in [*anchor, summarised, *kept[1:]] for m in turn])


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


def summary(turns: Sequence[Sequence[Message]]) -> str:
    """One line that names what older turns were about."""
    topics = []
    for turn in turns:
        words = text_of(turn[0]).split()
        topics.append(" ".join(words[:SUMMARY_WORDS]) + ("…" if len(words) > SUMMARY_WORDS else ""))
    return f"[Earlier in this conversation the user asked: {'; '.join(topics)}]"


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
