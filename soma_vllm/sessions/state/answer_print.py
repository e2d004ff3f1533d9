"""What is compared of two answers: their words, without thoughts, citations, blanks and marks of layout.

Clients keep an answer as they show it: without its thoughts, trimmed, its Markdown cleaned, sources put behind
it, or only as far as the user let it be written. An `AnswerPrint` says enough of an answer to recognise it so,
after its text was erased as well: how many characters are compared, and their digest. That an answer was cut
short by its client is seen only while the text of the recorded one is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from soma_vllm.types import Message

_TAG = re.compile(
    r"</?(?:think|thinking|thoughts?|reasoning)>|<details\s{1,9}type=\"reasoning\"|</details>", re.IGNORECASE
)
"""Where thoughts begin and end, as models and Open WebUI mark them."""
_CITATION = re.compile(r"\[\[?\^?\d{1,4}\]?\](?:\([^()\s]*\))?|【[^【】\n]*】")
_LAYOUT = re.compile(r"^[ \t]*(?:[-*+•>]|#{1,6})[ \t]+|\*\*|__|~~|```[\w+-]{0,20}|`", re.MULTILINE)
_STRESS = re.compile(r"(?<![\w*])\*([^*\s][^*\n]{0,200})\*(?![\w*])|(?<!\w)_([^_\s][^_\n]{0,200})_(?!\w)")
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\u00a0": " "})
_BLANKS = re.compile(r"\s+")
_APPENDED = re.compile(r"[^\w\n]*(?:\n|[\[(<【]|\Z)")
"""How what a client puts behind an answer begins: on a line of its own, or in brackets."""

CUTS = 4
"""Places at which an answer is tried without what stands behind it: the last empty lines, then lines."""
MOST_COMPARED = 200_000
"""Characters of an answer above which it is the recorded one only whole."""
SHORTEST_BEGINNING = 1
"""Characters that must be left of an answer for it to count as the beginning of a recorded one."""


@dataclass(frozen=True)
class AnswerPrint:
    """A recorded answer, to compare others with."""

    size: int
    """Characters that are compared: all but blanks and layout."""
    words: str
    """Their digest, salted with the tenant."""
    calls: str
    """Digest of its calls of tools; "" for none."""

    def __str__(self) -> str:
        return f"{self.size}:{self.words}:{self.calls}"

    @classmethod
    def parse(cls, stored: str) -> Self:
        """The print that `str` gave."""
        size, words, calls = stored.split(":")
        return cls(int(size), words, calls)


@dataclass(frozen=True)
class HeardAnswer:
    """An answer as a client sends it back."""

    salt: str
    message: Message

    @cached_property
    def said(self) -> str:
        """Its text without thoughts, citations and layout."""
        return _plain(text_of(self.message))

    @property
    def is_long(self) -> bool:
        """Whether it is longer than answers that are looked at closely."""
        return len(self.said) > MOST_COMPARED

    @cached_property
    def calls(self) -> str:
        """Digest of its calls of tools; "" for none."""
        found = calls_of(self.message)
        return _digest(self.salt, as_json(found)) if found else ""

    @cached_property
    def print(self) -> AnswerPrint:
        """What is compared of it."""
        return self._print_of(self.said)

    def is_same(self, recorded: AnswerPrint) -> bool:
        """Whether it is the recorded answer, perhaps with something behind it, or with its calls alone."""
        if self.print == recorded:
            return True
        if self.calls != recorded.calls or self.is_long:
            return False
        if recorded.calls and not self.said.strip():
            return True
        kept, size = _compared(self.said), recorded.size
        if not 0 < size < len(kept) or _digest(self.salt, kept[:size]) != recorded.words:
            return False
        return _APPENDED.match(self.said, _place(self.said, size)) is not None

    def is_beginning(self, recorded: str) -> bool:
        """Whether it is a beginning of a recorded answer's text."""
        if self.is_long:
            return False
        mine, whole = _compared(self.said), _compared(_plain(recorded))
        return len(mine) >= SHORTEST_BEGINNING and not self.calls and whole.startswith(mine)

    def endings(self) -> list[str]:
        """Digests of it, whole and without what may have been put behind it."""
        found = [self.print.words]
        text = "" if self.is_long else self.said
        for gap in ("\n\n", "\n"):
            end = len(text)
            for _ in range(CUTS):
                end = text.rfind(gap, 0, end)
                if end <= 0:
                    break
                found.append(self._print_of(text[:end]).words)
        return list(dict.fromkeys(found))

    def _print_of(self, text: str) -> AnswerPrint:
        kept = _compared(text)
        return AnswerPrint(len(kept), _digest(self.salt, kept), self.calls)


def text_of(message: Message) -> str:
    """The plain text of a message; parts that are not text count by their kind."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = (part if isinstance(part, dict) else {"text": str(part)} for part in content)
    return "\n".join(str(part.get("text", f"[{part.get('type', 'part')}]")) for part in parts)


def calls_of(message: Message) -> list[list[Any]]:
    """The calls of tools in an assistant's message: [name, arguments], arguments as the JSON they mean."""
    found = message.get("tool_calls")
    calls = found if isinstance(found, list | tuple) else ()
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    return [[f.get("name"), _meant(f.get("arguments"))] for f in functions if isinstance(f, dict)]


def spoken(answer: str, calls: Sequence[Mapping[str, Any]] = ()) -> Message:
    """An answer as the assistant message that a client would send back."""
    message: dict[str, Any] = {"role": "assistant", "content": answer}
    if calls:
        message["tool_calls"] = [dict(call) for call in calls]
        message["content"] = answer or None
    return message


def without_thoughts(text: str) -> str:
    """An answer's text without what the model thought: whole thoughts, cut off ones, and such as begin in the
    prompt."""
    if "<" not in text:
        return text
    kept: list[str] = []
    position, within = 0, ""
    for tag in _TAG.finditer(text):
        name = tag.group().lower()
        kind = "details" if "details" in name else "thought"
        closes = name.startswith("</")
        if not within and not closes:
            kept.append(text[position : tag.start()])
            within = kind
        elif not within and kind == "thought":  # it began in the prompt
            kept, position = [], tag.end()
        elif closes and kind == within:
            within, position = "", tag.end()
    return "".join([*kept, "" if within else text[position:]])


def as_json(value: object) -> str:
    """A value as JSON in one form."""
    return json.dumps(value, sort_keys=True, default=str)


def _meant(arguments: object) -> object:
    """A call's arguments, whatever the spacing they came in."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _plain(text: str) -> str:
    """A text without thoughts, citations and the marks of its layout; lines stay lines."""
    said = _LAYOUT.sub("", _CITATION.sub("", without_thoughts(text)).translate(_PLAIN))
    return _STRESS.sub(lambda found: found[1] or found[2], said)


def _compared(text: str) -> str:
    """What is compared of a plain text: all but its blanks."""
    return _BLANKS.sub("", text)


def _place(text: str, size: int) -> int:
    """Where so many compared characters of a text end."""
    position = 0
    for gap in _BLANKS.finditer(text):
        size -= gap.start() - position
        if size <= 0:
            return gap.start() + size
        position = gap.end()
    return position + size


def _digest(salt: str, text: str) -> str:
    return hashlib.sha256(f"{salt}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
