"""Turns with tools on real engines: the surrogate has them where it called as the original did before.

Random models call nothing by themselves: the requests name the function, and its schema leaves one value.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.server import Running

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}
NAMED = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}


class ToolDialogue:
    """A client that keeps the history with its calls and answers them."""

    def __init__(self, running: Running, name: str) -> None:
        self._create = running.client("key").chat.completions.with_raw_response.create
        self._headers = {"X-Session-ID": name, "X-SOMA-Force": "plain"}
        self.messages: list[Any] = []
        self.told = ("", "")

    def ask(self, *messages: dict[str, Any], max_tokens: int = 200, **fields: Any) -> Any:
        """The answer's message; `told` is who gave it, and why."""
        self.messages += messages
        sent = {"messages": self.messages, "max_tokens": max_tokens, "temperature": 0, **fields}
        raw = self._create(model="soma", extra_headers=self._headers, **sent)
        self.told = raw.headers["X-SOMA-Engine"], raw.headers["X-SOMA-Reason"]
        message = raw.parse().choices[0].message
        self.messages.append(message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}))
        return message

    def call(self, question: str, **fields: Any) -> tuple[str, Any]:
        """The function that an answer calls, and its arguments."""
        message = self.ask(user(question), **{**NAMED, **fields})
        assert message.tool_calls, (message, self.told)
        (made,) = message.tool_calls
        self.messages.append({"role": "tool", "tool_call_id": made.id, "content": "rain"})
        return made.function.name, json.loads(made.function.arguments)

    def streamed(self, question: str) -> tuple[str, Any]:
        """`call` by a stream; the history stays as it was."""
        sent = {"messages": [*self.messages, user(question)], "max_tokens": 200, "temperature": 0, **NAMED}
        raw = self._create(model="soma", extra_headers=self._headers, stream=True, **sent)
        self.told = raw.headers["X-SOMA-Engine"], raw.headers["X-SOMA-Reason"]
        deltas = [chunk.choices[0].delta for chunk in raw.parse() if chunk.choices]
        parts = [part.function for delta in deltas for part in delta.tool_calls or ()]
        arguments = "".join(part.arguments or "" for part in parts)
        return "".join(part.name or "" for part in parts), json.loads(arguments)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def switched(tiny_server: Running) -> ToolDialogue:
    dialogue = ToolDialogue(tiny_server, "tools-on-engines")
    for number in (1, 2):
        assert dialogue.call(f"weather {number}, please") == ("weather", {"city": "Oslo"})
        dialogue.ask(user(f"question {number} about the weather"))
    dialogue.ask(user("question 3 about the weather"))
    session = tiny_server.until("tools-on-engines", "SWITCHED", "ORIGINAL_ONLY")
    assert session["phase"] == "SWITCHED"
    return dialogue


def test_calls_of_the_same_tools_are_the_surrogates(switched: ToolDialogue) -> None:
    assert switched.call("weather 4, please") == ("weather", {"city": "Oslo"})
    engine, reason = switched.told
    assert (engine, reason.split(",")[0]) == ("surrogate", "switched to plain")
    switched.ask(user("question 5 about the weather"), tools=[WEATHER], tool_choice="none")
    assert switched.told[0] == "surrogate"


def test_other_tools_than_were_checked_are_the_originals(switched: ToolDialogue) -> None:
    other = {
        **WEATHER["function"],
        "parameters": {**PARAMETERS, "description": "The day's", "minProperties": 1},
    }
    switched.call("weather 6, please", tools=[{"type": "function", "function": other}])
    assert switched.told == ("original", "other tools than were checked")


def test_a_streamed_call_of_the_surrogates_comes_whole(switched: ToolDialogue) -> None:
    assert switched.streamed("weather 7, please") == ("weather", {"city": "Oslo"})
    assert switched.told[0] == "surrogate"
