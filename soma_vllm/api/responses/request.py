"""What OpenAI's Responses API may be asked here.

Guarantees: a parameter that is unknown, or asks for what nobody here does, is refused by its name and never
dropped; errors hold names, numbers and kinds, never text of the conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from soma_vllm.errors import BadRequest
from soma_vllm.sessions.state.identity import explicit_id

LOGPROBS = "message.output_text.logprobs"

REFUSED: Mapping[str, str] = {
    "background": "a response is not worked on after its request ended",
    "prompt": "prompt templates are not kept here",
    "context_management": "dialogues are not compacted here",
    "moderation": "nothing is moderated here",
}
"""Parameters of OpenAI's that nobody here serves, and why. Null, false and empty ask for nothing."""

PASSED = frozenset(
    {
        "cache_salt",
        "chat_template_kwargs",
        "frequency_penalty",
        "ignore_eos",
        "include_reasoning",
        "include_stop_str_in_output",
        "logit_bias",
        "media_io_kwargs",
        "min_p",
        "mm_processor_kwargs",
        "presence_penalty",
        "priority",
        "repetition_penalty",
        "seed",
        "service_tier",
        "session_id",
        "skip_special_tokens",
        "stop",
        "stop_token_ids",
        "structured_outputs",
        "top_k",
        "vllm_xargs",
        "watermarking",
    }
)
"""Parameters, most of them vLLM's, that a chat completion has under the same name. Its engine checks them."""

INDIFFERENT = frozenset(
    {
        "background_options",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "stream_options",
    }
)
"""Parameters of OpenAI's that no answer depends on."""


class Shape(BaseModel):
    """A JSON object as a client sends it: nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Conversation(Shape):
    """A dialogue by its id."""

    id: str


class FunctionTool(Shape):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class NamedFunction(Shape):
    """The one tool to call."""

    type: Literal["function"]
    name: str


class PlainText(Shape):
    """Text of any form."""

    type: Literal["text"]


class JsonObject(Shape):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Shape):
    """JSON of this schema."""

    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class Text(Shape):
    """The form of the answer."""

    format: Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Shape):
    """How much to think. Summaries may be asked for; the thoughts themselves are shown instead."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(Shape):
    """A request that can be served. Items of `input` are checked where they are translated."""

    model_config = ConfigDict(extra="allow")

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    conversation: str | Conversation | None = None
    metadata: dict[str, str] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: (
        list[
            Literal[
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
                "file_search_call.results",
                "message.input_image.image_url",
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "web_search_call.action.sources",
                "web_search_call.results",
            ]
        ]
        | None
    ) = None
    """All but the log-probabilities belong to things that no response from here holds."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Counts built-in tools, of which there are none."""
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    store: bool | None = None
    """False: the response cannot be gone on from by its id. Its turn is recorded as any other."""
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None

    @property
    def conversation_id(self) -> str | None:
        """The dialogue that a client names."""
        return self.conversation.id if isinstance(self.conversation, Conversation) else self.conversation

    @property
    def passed(self) -> dict[str, Any]:
        """Parameters for the engine as they came."""
        return {name: value for name, value in (self.model_extra or {}).items() if name in PASSED}

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's log-probabilities are to be shown."""
        return LOGPROBS in (self.include or ())


def body_schema() -> dict[str, Any]:
    """The JSON schema of a request as the server's description of itself shows it: without references."""
    schema = ResponsesRequest.model_json_schema()
    definitions = schema.pop("$defs")

    def inlined(part: Any) -> Any:
        if isinstance(part, list):
            return [inlined(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inlined(definitions[part["$ref"].rsplit("/", 1)[1]])
        return {name: inlined(value) for name, value in part.items() if name != "discriminator"}

    found: dict[str, Any] = inlined(schema)
    return found


def parse(body: object) -> ResponsesRequest:
    """A request's JSON, checked.

    Raises:
        BadRequest: it is wrong, or asks for what nobody here does; names the parameter.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"body: found {type(body).__name__}; expected a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, why in REFUSED.items():
        if given.pop(name, None):
            raise BadRequest(f"{name}: {why}; expected it to be left out", name)
    _check_tools(given.get("tools"))
    try:
        asked = ResponsesRequest.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, given) from None
    for name in asked.model_extra or ():
        if name not in PASSED | INDIFFERENT:
            raise BadRequest(f"{name[:100]}: found an unknown parameter; expected one that is served", name)
    if asked.conversation_id is not None:
        if asked.previous_response_id is not None:
            raise BadRequest(
                "found both conversation and previous_response_id; expected at most one", "conversation"
            )
        _check_id(asked.conversation_id)
    _check_choice(asked)
    return asked


def shown(value: object) -> str:
    """What was found, for an error: a name or number briefly, of anything else the kind."""
    return repr(value)[:100] if isinstance(value, str | bool | int | float) else type(value).__name__


def _check_tools(tools: object) -> None:
    """Say of a built-in tool that it is one, rather than that it lacks what functions have."""
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            param = f"tools[{index}].type"
            raise BadRequest(f"{param}: found {shown(kind)}; expected 'function', no tool is built in", param)


def _check_choice(asked: ResponsesRequest) -> None:
    names = {tool.name for tool in asked.tools or ()}
    choice = asked.tool_choice
    if choice == "required" and not names:
        raise BadRequest("tool_choice: found 'required', and no tools; expected at least one", "tool_choice")
    if isinstance(choice, NamedFunction) and choice.name not in names:
        raise BadRequest(
            "tool_choice: found a function that is not among the tools; expected one of them", "tool_choice"
        )


def _check_id(conversation: str) -> None:
    """A conversation's id is a session's id."""
    try:
        explicit_id({}, {"metadata": {"session_id": conversation}})
    except BadRequest as error:
        raise BadRequest(str(error).replace("session id", "conversation", 1), "conversation") from None


def _refusal(error: ValidationError, body: Mapping[str, Any]) -> BadRequest:
    """The most definite of pydantic's complaints, without what was sent: that may be what somebody said."""
    first = max(error.errors(include_url=False), key=lambda complaint: len(complaint["loc"]))
    param = _param(first["loc"], body, missing=first["type"] == "missing")
    complaint = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    if first["type"] == "missing":
        return BadRequest(f"{param}: found nothing; expected it to be there", param)
    value = first["input"]
    brief = isinstance(value, bool | int | float) or first["type"] == "literal_error"
    found = shown(value) if brief else type(value).__name__
    return BadRequest(f"{param}: found {found}; {complaint}", param)


def _param(loc: Sequence[int | str], body: Any, missing: bool) -> str:
    """A place in the body as OpenAI writes it. What is in pydantic's path but not in the body are its types."""
    path = ""
    for part in loc:
        if isinstance(body, dict) and part in body:
            path += f".{part}"
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            path += f"[{part}]"
        else:
            continue
        body = body[part]
    return (f"{path}.{loc[-1]}" if missing else path).lstrip(".")
