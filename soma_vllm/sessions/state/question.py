"""Whether two wordings of a turn's messages ask the same: one is the other with something put around it.

Guarantee: what was put around it stands on lines of its own, or is set off by a colon, a bracket or a tag; a
question that was edited asks something else.
"""

from __future__ import annotations

from collections.abc import Sequence

from soma_vllm.sessions.state.answer_print import text_of
from soma_vllm.types import Message

_BEFORE = "\n:>])}"
_AFTER = "\n<([{"

_BLANK = " \t\"'`*"

NEAR = 100
"""Characters around a question within which it has to be set off."""
MOST_PLACES = 8
"""Places at which a question is looked for in a longer text."""


def asked_alike(recorded: Sequence[Message], sent: Sequence[Message]) -> bool:
    """Whether the messages of a turn, without the answer, ask what others ask."""
    mine, others = _asked(recorded), _asked(sent)
    return bool(mine and others) and (_holds(recorded, others) or _holds(sent, mine))


def _asked(messages: Sequence[Message]) -> str:
    """What is asked: the last user's message; a tool's result where there is one after it."""
    found = [m for m in messages if m.get("role") not in ("assistant", "system", "developer")]
    return text_of(found[-1]).strip() if found else ""


def _holds(messages: Sequence[Message], asked: str) -> bool:
    return any(
        _set_off(text_of(message), asked)
        for message in messages
        if message.get("role") not in ("assistant", "system", "developer")
    )


def _set_off(text: str, asked: str) -> bool:
    """Whether a text holds a question, set off from the rest."""
    start = -1
    for _ in range(MOST_PLACES):
        start = text.find(asked, start + 1)
        if start < 0:
            return False
        end = start + len(asked)
        before = text[max(0, start - NEAR) : start].rstrip(_BLANK)
        after = text[end : end + NEAR].lstrip(_BLANK)
        if (not before or before[-1] in _BEFORE) and (not after or after[0] in _AFTER):
            return True
    return False
