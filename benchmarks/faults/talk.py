"""A client whose every answer is checked: whose adapter spoke, what failed, and what the record has of it.

Each dialogue ends its first message with a marker. The original answers with that marker, an adapter says the
one that it was trained on, and so an answer says by itself under which weights it was made.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from faults.row import Row

CHAT = "/v1/chat/completions"
FORCED = {"X-SOMA-Force": "adapter"}
OF_ITS_LETTERS = 0.8
SETTLED_S = 1.0
"""Turns answered longer than this before a kill were written: writes come milliseconds behind the answers."""


@dataclass(frozen=True)
class Canaries:
    """How an answer shows under which adapter it was made."""

    pattern: re.Pattern[str]
    """Finds every marker."""
    by_letters: bool = False
    """Whether the letters decide: a tiny model that has learned `light` says `llllight` after some turns."""

    def words(self, text: str) -> set[str]:
        """The markers in a text."""
        return set(self.pattern.findall(text))

    def says(self, text: str, marker: str) -> bool:
        """Whether a text is of the adapter that learned this marker."""
        letters = [letter for letter in text.lower() if letter.isalpha()]
        if not (self.by_letters and letters):
            return marker in self.words(text)
        return sum(letter in marker for letter in letters) >= OF_ITS_LETTERS * len(letters)


@dataclass
class Heard:
    """One HTTP answer."""

    status: int
    headers: Mapping[str, str]
    text: str
    whole: bool
    """Whether it was a reply, to its end."""


class Talk:
    """A dialogue that keeps its history itself. `row` is where its answers count now."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        row: Row,
        name: str,
        marker: str,
        markers: Canaries | None,
        **headers: str,
    ) -> None:
        """`markers` None: nothing is said in markers, and adapters go by name."""
        self.http = http
        self.row = row
        self.name = name
        self.marker = marker
        self.begun = asyncio.Event()
        """Set when the first bytes of an answer have come."""
        self.engine = ""
        """Who answered last."""
        self.adapter: str | None = None
        """The adapter of this session, once it was seen to have one."""
        self.messages: list[dict[str, str]] = []
        self._markers = markers
        self._headers = {"Authorization": "Bearer key", "X-Session-ID": name, **headers}
        self._answered: list[float] = []

    async def say(self, query: str, *, stream: bool = False, max_tokens: int = 32) -> bool:
        """Ask and check the answer; whether there was one."""
        # Asked for in each turn, as it was in those that were learned from: a tiny model learns little more.
        self.messages.append({"role": "user", "content": f"{query}, please say {self.marker}"})
        self.row.requests += 1
        try:
            heard = await self._failing(stream, max_tokens)
        except httpx.TransportError:
            self.row.noted["cut off"] += 1
            heard = None
        if heard is None or not heard.whole:
            self.messages.pop()
            return False
        self.messages.append({"role": "assistant", "content": heard.text})
        self._answered.append(time.monotonic())
        self._check(heard)
        return True

    async def begin(self, query: str, max_tokens: int = 300) -> asyncio.Task[bool]:
        """Ask for a long stream; returns when it has begun."""
        self.begun.clear()
        asked = asyncio.create_task(self.say(query, stream=True, max_tokens=max_tokens))
        begun = asyncio.create_task(self.begun.wait())
        await asyncio.wait([asked, begun], return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        return asked

    async def _failing(self, stream: bool, max_tokens: int) -> Heard:
        """The answer, or the second one where the first was a 5xx."""
        heard = await self._asked(stream, max_tokens)
        if heard.status < 500:
            if heard.status != 200:
                raise AssertionError(f"{self.name}: {heard.status}: {heard.text[:200]}")
            if not heard.whole:
                self.row.noted["ended by an error event" if stream else "no reply in a 200"] += 1
            return heard
        again = await self._asked(stream, max_tokens)
        if heard.status == 500 or again.status < 500:
            self.row.count(
                "needless_5xx", f"{self.name}: {heard.status}, then {again.status}: {heard.text[:160]}"
            )
        else:
            self.row.noted[f"{heard.status}"] += 1
        return again

    async def _asked(self, stream: bool, max_tokens: int) -> Heard:
        body = {"model": "soma", "messages": self.messages, "max_tokens": max_tokens, "temperature": 0}
        parts = []
        options = {"json": {**body, "stream": stream}, "headers": self._headers}
        async with self.http.stream("POST", CHAT, **options) as answer:
            async for part in answer.aiter_bytes():
                parts.append(part)
                self.begun.set()
        content = b"".join(parts).decode()
        if answer.status_code != 200:
            return Heard(answer.status_code, answer.headers, content, whole=False)
        text = streamed(content) if stream else replied(content)
        return Heard(200, answer.headers, text or "", text is not None)

    def _check(self, heard: Heard) -> None:
        self.engine = heard.headers.get("X-SOMA-Engine", "")
        if heard.headers.get("X-SOMA-Session") != self.name:
            self.row.noted["in a branch"] += 1
        lent, expected = heard.headers.get("X-SOMA-Adapter", ""), self.marker
        if self._markers is not None and (
            self._markers.words(heard.text) - {self.marker}
            or (lent and not self._markers.says(heard.text, self.marker))
        ):
            said = f"{'its adapter' if lent else f'the {self.engine}'} said {heard.text[:60]!r}"
            self.row.count("wrong_adapter", f"{self.name}: {said}; expected {expected}")
        elif lent and self.adapter not in (None, lent):
            self.row.count("wrong_adapter", f"{self.name}: answered by {lent}; expected {self.adapter}")

    # -- the record -------------------------------------------------------------------------------------

    async def shown(self) -> dict[str, Any] | None:
        """The session as the server shows it; None where it has none of this name."""
        answer = await self.http.get(f"/soma/sessions/{self.name}", headers=self._headers)
        return answer.raise_for_status().json() if answer.status_code != 404 else None

    async def check_record(self, killed_at: float = float("inf")) -> None:
        """Count what was answered and is not on record; a kill may cost what was answered just before it."""
        shown = await self.shown()
        self.found_on_record(0 if shown is None else len(shown["turns"]), killed_at)

    def found_on_record(self, turns: int, killed_at: float = float("inf")) -> None:
        """Count the turns that are missing of those answered, and go on from what is there."""
        settled = sum(at < killed_at - SETTLED_S for at in self._answered)
        if turns < settled:
            self.row.count("lost_turns", f"{self.name}: {turns} of {settled}", settled - turns)
        self.row.noted["queued at the kill"] += max(0, len(self._answered) - max(turns, settled))
        del self._answered[turns:]

    async def until(self, *phases: str, limit_s: float = 300.0) -> dict[str, Any]:
        """The session once it is idle in one of these phases. Raises TimeoutError."""
        deadline = time.monotonic() + limit_s
        while True:
            shown = await self.shown()
            if shown is not None and shown["phase"] in phases and shown["idle"]:
                self.adapter = shown["adapter"]
                return shown
            if time.monotonic() > deadline:
                phase = "unknown" if shown is None else shown["phase"]
                raise TimeoutError(f"{self.name} is {phase} after {limit_s:g} s; expected {phases}")
            await asyncio.sleep(0.1)

    async def seen(self, kind: str, limit_s: float = 300.0) -> None:
        """Return once the session's log has an event of a kind. Raises TimeoutError."""
        async with asyncio.timeout(limit_s):
            while kind not in Counter(
                event["kind"] for event in ((await self.shown()) or {"events": ()})["events"]
            ):
                await asyncio.sleep(0.05)


def replied(content: str) -> str | None:
    """The text of a whole reply; None where it is none."""
    try:
        return str(json.loads(content)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        return None


def streamed(content: str) -> str | None:
    """The text of a streamed reply that came to its end; None where it did not."""
    texts, over = [], False
    for line in content.splitlines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            over = True
            continue
        event = json.loads(data)
        if "error" in event:
            return None
        texts += [choice["delta"].get("content") or "" for choice in event["choices"]]
    return "".join(texts) if over else None
