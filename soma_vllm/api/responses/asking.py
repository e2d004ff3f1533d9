"""One request of the Responses API on its way: what it names is read, the dispatch is asked, the answer is
kept.

Guarantees: a response is kept only once its turn is on record, and only where its request lets it be stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Request

from soma_vllm.api.responses.convert import Frame, chat_body, new_id
from soma_vllm.api.responses.input_items import messages_of, prompt
from soma_vllm.api.responses.request import ResponsesRequest
from soma_vllm.api.responses.stored import Items, ObjectRecord, listed
from soma_vllm.api.responses.stream import ResponseEvents, response_of
from soma_vllm.engines.sse import serialize
from soma_vllm.errors import BadRequest, SomaError
from soma_vllm.scheduler.dispatcher import DISPATCH_NAME, Answer, ChatRequest, Dispatcher
from soma_vllm.sessions.state.identity import tenant_of
from soma_vllm.types import Message


class Asking:
    """The request, filled in by `read`."""

    def __init__(
        self, request: ResponsesRequest, http: Request, record: ObjectRecord, dispatcher: Dispatcher
    ) -> None:
        self.tenant = tenant_of(http.headers.get("authorization"))
        self.request = request
        self.added: list[Message] | None = None
        """What the request adds to its dialogue."""
        self.shown: Items = ()
        """The same as items with ids."""
        self.chat: ChatRequest
        self._id = new_id("resp")
        self._http = http
        self._record = record
        self._dispatcher = dispatcher
        self._conversation: str | None = None
        """The conversation on record that it goes on."""

    async def read(self) -> None:
        """Find what the request names.

        Raises:
            NotFound: it is not on record.
            SomaError: it cannot be read, or the request is wrong.
        """
        given = await self._record.resolved(self.tenant, self.request.input)
        self.added = messages_of(given)
        self.shown = listed(given)
        session, history = await self._so_far()
        background = self.request.background
        body = chat_body(self.request, prompt(self.request.instructions, history, self.added))
        self.chat = ChatRequest(
            {**body, "stream": True, "stream_options": {"include_usage": True}} if background else body,
            dict(self._http.headers),
            None if background else self._http,  # no client waits, so that none can leave
            session=session,
            response=self._id if self.request.store else None,
        )

    async def whole(self) -> tuple[dict[str, Any], Mapping[str, str]]:
        """The response in one piece, and its headers. Raises SomaError."""
        answer = await self._dispatcher.chat(self.chat)
        response = response_of(self._frame(answer), answer.body)
        self._keep(response)
        return response, answer.headers

    async def opened(self) -> Answer:
        """The response in events. Raises SomaError."""
        answer = await self._dispatcher.chat(self.chat)
        return answer.streaming(ResponseEvents(answer.events, self._frame(answer), self._keep))

    async def events(self) -> ResponseEvents:
        """The events of a response in the background, which its job keeps. Raises SomaError."""
        answer = await self._dispatcher.chat(self.chat)
        return ResponseEvents(answer.events, self._frame(answer))

    def frame(self) -> Frame:
        """What is known of the response before it is begun."""
        return Frame(self.request, self._id, self.request.model or DISPATCH_NAME, self.request.store)

    def failure(self, error: SomaError) -> list[str]:
        """The events of a response of which nothing came."""
        event = {"type": "response.failed", "sequence_number": 0, "response": self.frame().failed(str(error))}
        return [serialize(json.dumps(event), "response.failed")]

    def _frame(self, answer: Answer) -> Frame:
        # An answer of an engine that was asked by its name belongs to no session and is not recorded.
        stored = self.request.store and "X-SOMA-Session" in answer.headers
        return Frame(self.request, self._id, answer.model, stored)

    def _keep(self, response: Mapping[str, Any]) -> None:
        if self.request.store:
            self._record.keep(self.tenant, response, self.shown, self._conversation)

    async def _so_far(self) -> tuple[str | None, tuple[Message, ...]]:
        """(the session that the request names, its messages so far)."""
        previous, name = self.request.previous_response_id, self.request.conversation_id
        if previous is not None:
            await self._record.require_there(self.tenant, previous)
            said = await self._dispatcher.said(self.tenant, previous)
            return said.session, said.messages
        if name is None:
            return None, ()
        items = await self._record.history(self.tenant, name)
        if items is None:
            return name, await self._dispatcher.conversation(self.tenant, name)
        if not self.request.store:
            raise BadRequest(
                "store: found false with a conversation; expected true: it keeps its items", "store"
            )
        self._conversation = name
        if items:
            return name, tuple(messages_of(items))
        return name, await self._dispatcher.conversation(self.tenant, name)  # raises where its text is gone
