"""Histories from a small language of what clients do to them, before the application of `support.api_services`.

Each is gone through twice, once by a tenant alone and once by one beside whom another does what it likes under
the same session ids: to both the server behaves alike, and neither hears the other's markers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from itertools import zip_longest
from typing import Any
from urllib.parse import quote

import httpx
from hypothesis import given
from hypothesis import strategies as st

from support.api_services import MARKER, marker, tenant_of
from support.fuzzing import Fuzzing, fuzzed

CHAT = "/v1/chat/completions"
Message = dict[str, Any]

LOOKALIKES = (
    "session",
    "sessіon",
    "ｓession",
    "sess\u200bion",
    "session\u0301",
    "SESSION",
    "session/../session",
)
"""One word to the eye, and seven ids."""

texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ("", " ", "\0", "\x1b[2J", "../../etc/passwd", "a\ud800b", "\udfff", "e\u0301", "é", "[DONE]")
    ),
    st.sampled_from(LOOKALIKES),
    st.text(st.characters(codec=None, categories=["Cs", "Cc", "Cf", "Zs", "Co"]), max_size=10),
)
"""Also what no tokenizer takes."""

names = st.one_of(st.none(), st.sampled_from(LOOKALIKES), texts, st.just("x" * 1_000))
places = st.integers(0, 7)
moves = st.one_of(
    st.tuples(st.just("go on"), texts),
    st.tuples(st.just("go on"), texts),
    st.tuples(st.just("repeat"), places),
    st.tuples(st.just("edit"), places, texts),
    st.tuples(st.just("contradict"), places, texts),
    st.tuples(st.just("branch"), places),
    st.tuples(st.just("forget"), places),
    st.tuples(st.just("call a tool"), texts),
    st.tuples(st.just("result"), texts),
    st.tuples(st.just("swap"), places),
    st.tuples(st.just("rename"), names),
    st.tuples(st.just("go on"), texts),
    st.tuples(st.just("remove"), places),
    st.tuples(st.just("respond"), texts),
)
ways = st.sampled_from(("header", "metadata", "transcript"))
extras = st.sampled_from(
    (
        {},
        {"stream": True},
        {"headers": {"X-SOMA-Force": "adapter"}},
        {"headers": {"X-SOMA-Policy": "surrogate"}},
    )
)


class Client:
    """One tenant's side of a history. What it did to its transcript it goes on from."""

    def __init__(self, fuzzing: Fuzzing, tenant: str, session: str, way: str, extra: Mapping[str, Any]) -> None:
        self._fuzzing = fuzzing
        self._tenant = tenant
        self.session: str | None = session
        self._way = way
        self._extra = extra
        self.messages: list[Message] = [{"role": "system", "content": marker(tenant)}]
        self.responses: list[str] = []
        self.answers: list[tuple[Any, ...]] = []
        """What the server answered, without what differs from tenant to tenant."""

    def make(self, move: tuple[Any, ...]) -> None:
        """Do to the history what a move says, and send it."""
        kind, argument, *rest = move
        if kind == "rename":
            self.session = argument
        elif kind == "remove":
            named = quote((self.session or "none")[:300], safe="", errors="replace")
            self._call("DELETE", f"/soma/sessions/{named}")
        elif kind == "respond":
            self._respond(argument)
        else:
            getattr(self, f"_{kind.replace(' ', '_')}")(argument, *rest)
            self._ask()

    def _go_on(self, text: str) -> None:
        self.messages.append({"role": "user", "content": f"{marker(self._tenant)} {text}"})

    def _repeat(self, place: int) -> None:
        pass

    def _edit(self, place: int, text: str) -> None:
        self.messages[place % len(self.messages)]["content"] = text

    def _contradict(self, place: int, text: str) -> None:
        self.messages.insert(1 + place % len(self.messages), {"role": "assistant", "content": text})

    def _branch(self, place: int) -> None:
        del self.messages[1 + place % len(self.messages) :]
        self._go_on("another way")

    def _forget(self, place: int) -> None:
        del self.messages[: place % len(self.messages)]

    def _call_a_tool(self, text: str) -> None:
        function = {"name": "look_up", "arguments": text}
        call = {"id": "call_1", "type": "function", "function": function}
        self.messages.append({"role": "assistant", "content": None, "tool_calls": [call]})

    def _result(self, text: str) -> None:
        self.messages.append({"role": "tool", "tool_call_id": "call_1", "content": text})

    def _swap(self, place: int) -> None:
        place %= len(self.messages)
        self.messages[0], self.messages[place] = self.messages[place], self.messages[0]

    def _ask(self) -> None:
        headers = dict(self._extra.get("headers", {}))
        body: dict[str, Any] = {"model": "soma", "messages": self.messages, "stream": "stream" in self._extra}
        if self.session is not None:
            if self._way == "header":
                headers["X-Session-ID"] = self.session.encode("utf-8", "replace")
            elif self._way == "metadata":
                body["metadata"] = {"session_id": self.session}
        answer = self._call("POST", CHAT, json=body, headers=headers)
        if answer.status_code == HTTPStatus.OK and not body["stream"]:
            self.messages.append(answer.json()["choices"][0]["message"])

    def _respond(self, text: str) -> None:
        body: dict[str, Any] = {"model": "soma", "input": f"{marker(self._tenant)} {text}"}
        if self.responses:
            body["previous_response_id"] = self.responses[-1]
        answer = self._call("POST", "/v1/responses", json=body)
        if answer.status_code == HTTPStatus.OK:
            self.responses.append(answer.json()["id"])

    def steal(self, other: Client) -> None:
        """Another's responses are not there."""
        for response in other.responses:
            body = {"model": "soma", "input": "and?", "previous_response_id": response}
            assert self._call("POST", "/v1/responses", json=body).status_code == HTTPStatus.NOT_FOUND

    def sessions(self) -> list[tuple[str, int]]:
        """The phase and the number of turns of each of its sessions. It sees no others."""
        listed = self._call("GET", "/soma/sessions?limit=1000").json()["data"]
        assert {row["tenant"] for row in listed} <= {tenant_of(self._tenant)}
        return sorted((row["phase"], row["turns"]) for row in listed)

    def look(self) -> None:
        """Whatever its sessions are called, each can be shown."""
        for row in self._call("GET", "/soma/sessions?limit=1000").json()["data"]:
            # The dots too: httpx follows `..` by itself.
            shown = self._call("GET", f"/soma/sessions/{quote(row['session'], safe='').replace('.', '%2E')}")
            assert shown.status_code == HTTPStatus.OK, row
            assert not MARKER.findall(shown.text)

    def _call(self, method: str, path: str, **more: Any) -> httpx.Response:
        answer = self._fuzzing.send(method, path, self._tenant, **more)
        found = set(MARKER.findall(answer.text + json.dumps(dict(answer.headers))))
        assert found <= {self._tenant}, (method, path)
        told = [answer.headers.get(f"X-SOMA-{name}") for name in ("Engine", "Phase", "Reason")]
        self.answers.append((method, answer.status_code, *told, bool(answer.headers.get("X-SOMA-Adapter"))))
        self._fuzzing.settle()
        return answer


def histories(fuzzing: Fuzzing, examples: int) -> Callable[[], None]:
    """Plays so many histories."""

    @given(
        moved=st.lists(moves, min_size=4, max_size=7),
        beside=st.lists(moves, min_size=4, max_size=7),
        way=ways,
        extra=extras,
    )
    @fuzzed(examples)
    def played(moved: list[Any], beside: list[Any], way: str, extra: Any) -> None:
        fuzzing.examples += 1
        number = fuzzing.examples
        alone, one, other = (
            Client(fuzzing, f"{name}{number}", "a history", way, extra) for name in ("alone", "one", "other")
        )
        for move in moved:
            alone.make(move)
        for mine, theirs in zip_longest(moved, beside):
            for client, move in ((one, mine), (other, theirs)):
                if move is not None:
                    client.make(move)
        assert one.answers == alone.answers
        assert one.sessions() == alone.sessions()
        one.steal(other)
        if number % 10 == 0:
            one.look()
        fuzzing.heard()

    return played
