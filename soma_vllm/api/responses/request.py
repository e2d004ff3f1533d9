"""A request of OpenAI's Responses API, checked.

Guarantees: a parameter that is unknown or not supported is refused by its name and never dropped; errors hold
names, numbers and kinds, never text of the conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from openai.types.responses import ResponseFormatTextJSONSchemaConfig, ResponseIncludable
from openai.types.responses.response import Conversation
from openai.types.shared import ReasoningEffort, ResponseFormatJSONObject, ResponseFormatText
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from soma_vllm.errors import BadRequest
from soma_vllm.sessions.state.identity import explicit_id

REFUSED: Mapping[str, str] = {
    "prompt": "stored prompt templates are not supported",
    "context_management": "compaction is not supported",
    "moderation": "moderation is not supported",
}
"""Parameters of OpenAI's that are not supported. Null, false and empty ask for nothing."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PASSED = _names(
    "cache_salt chat_template_kwargs ignore_eos include_reasoning include_stop_str_in_output logit_bias "
    "media_io_kwargs min_p mm_processor_kwargs priority repetition_penalty seed service_tier session_id "
    "skip_special_tokens stop stop_token_ids structured_outputs top_k vllm_xargs watermarking"
)
"""Parameters, most of them vLLM's, that a chat completion has under the same name. Its engine checks them."""

INDIFFERENT = _names("background_options prompt_cache_options prompt_cache_retention stream_options")
"""Parameters of OpenAI's that no answer depends on."""

NOT_ECHOED = {"conversation", "include", "input", "model", "store", "stream", "text"}
"""Parameters that a response does not repeat as they are."""

Summary = Literal["auto", "concise", "detailed"]
Format = ResponseFormatText | ResponseFormatJSONObject | ResponseFormatTextJSONSchemaConfig


class FunctionTool(BaseModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = Field(default=None, exclude=True)


class NamedFunction(BaseModel):
    """The one tool to call."""

    type: Literal["function"]
    name: str


class Text(BaseModel):
    """The form of the answer."""

    format: Annotated[Format, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(BaseModel):
    """How much to reason. The reasoning itself is shown, so that summaries are accepted and have no effect."""

    effort: ReasoningEffort = None
    summary: Summary | None = None
    generate_summary: Summary | None = Field(default=None, exclude=True)


class ResponsesRequest(BaseModel):
    """A request that can be served; parameters that it leaves out have OpenAI's defaults.

    Items of `input` are checked where they are translated.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    conversation: str | Conversation | None = None
    metadata: dict[str, str] = {}
    tools: list[FunctionTool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    text: Text = Text()
    reasoning: Reasoning = Reasoning()
    include: list[ResponseIncludable] = []
    """All but the log-probabilities belong to items that no response of this server holds."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Counts built-in tools, of which there are none."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_logprobs: Annotated[int, Field(ge=0)] = 0
    store: bool = True
    """False: nothing of what was said is stored, no later request can continue from the response by its id, and
    its session learns nothing."""
    background: bool = False
    stream: bool = False
    truncation: Literal["auto", "disabled"] = "disabled"
    user: str | None = None
    frequency_penalty: Any = 0.0
    presence_penalty: Any = 0.0
    """Checked by the engine, as those in `PASSED`."""
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    _passed: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def passed(self) -> Mapping[str, Any]:
        """Those of the parameters in `PASSED` that were given."""
        return self._passed

    @property
    def conversation_id(self) -> str | None:
        """The dialogue that a client names."""
        return self.conversation.id if isinstance(self.conversation, Conversation) else self.conversation

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's log-probabilities are to be shown."""
        return "message.output_text.logprobs" in self.include

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named parameters that the client sent."""
        return {name: getattr(self, name) for name in names if name in self.model_fields_set}

    def echoed(self) -> dict[str, Any]:
        """The parameters as a response repeats them."""
        text = self.text.model_dump(by_alias=True, exclude_none=True)
        return {
            **self.model_dump(exclude=NOT_ECHOED),
            "conversation": None if self.conversation is None else {"id": self.conversation_id},
            "service_tier": "default",
            "text": {"format": {"type": "text"}, **text},
        }


def body_schema() -> dict[str, Any]:
    """The JSON schema of a request for the server's OpenAPI description: without references."""
    schema = ResponsesRequest.model_json_schema()
    definitions = schema.pop("$defs")

    def inlined(part: Any) -> Any:
        if isinstance(part, list):
            return [inlined(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            # What OpenAI's types do not name is refused, as it is of our own.
            return {**inlined(definitions[part["$ref"].rsplit("/", 1)[1]]), "additionalProperties": False}
        return {name: inlined(value) for name, value in part.items() if name != "discriminator"}

    found: dict[str, Any] = inlined(schema)
    return found


def parse(body: object) -> ResponsesRequest:
    """A request's JSON, checked.

    Raises:
        BadRequest: it is wrong, or asks for what is not supported; names the parameter.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"body: found {type(body).__name__}; expected a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, why in REFUSED.items():
        if given.pop(name, None):
            raise BadRequest(f"{name}: {why}; expected it to be left out", name)
    named = {name: value for name, value in given.items() if name in ResponsesRequest.model_fields}
    try:
        request = ResponsesRequest.model_validate(named, strict=True, extra="forbid")
    except ValidationError as error:
        raise _refusal(error, given) from None
    for name, value in given.items():
        if name in PASSED:
            request._passed[name] = value
        elif name not in named and name not in INDIFFERENT:
            raise BadRequest(f"{name[:100]}: found an unknown parameter; expected one that is served", name)
    if request.conversation_id is not None:
        if request.previous_response_id is not None:
            raise BadRequest(
                "found both conversation and previous_response_id; expected at most one", "conversation"
            )
        _check_id(request.conversation_id)
    if request.background and not request.store:
        raise mistake("background", "true with store: false", "a response that is stored")
    _check_choice(request)
    return request


def mistake(param: str, found: str, expected: str) -> BadRequest:
    """The error that names a wrong parameter, what was found there and what was expected."""
    return BadRequest(f"{param}: found {found}; expected {expected}", param)


def shown(value: object) -> str:
    """What was found, for an error: a name or number briefly, of anything else the kind."""
    return repr(value)[:100] if isinstance(value, str | bool | int | float) else type(value).__name__


def _check_choice(request: ResponsesRequest) -> None:
    names = {tool.name for tool in request.tools}
    choice = request.tool_choice
    if choice == "required" and not names:
        raise mistake("tool_choice", "'required', and no tools", "at least one")
    if isinstance(choice, NamedFunction) and choice.name not in names:
        raise mistake("tool_choice", "a function that is not among the tools", "one of them")


def _check_id(conversation: str) -> None:
    """A conversation's id is a session's id."""
    try:
        explicit_id({}, {"metadata": {"session_id": conversation}})
    except BadRequest as error:
        raise BadRequest(str(error).replace("session id", "conversation", 1), "conversation") from None


def _refusal(error: ValidationError, body: Mapping[str, Any]) -> BadRequest:
    """The most specific of pydantic's complaints, without what was sent: that may be conversation text."""
    first = max(error.errors(include_url=False), key=lambda complaint: len(complaint["loc"]))
    param = _param(first["loc"], body, missing=first["type"] == "missing")
    complaint = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    if first["type"] == "missing":
        return mistake(param, "nothing", "it to be there")
    value = first["input"]
    brief = isinstance(value, bool | int | float) or first["type"] == "literal_error"
    found = shown(value) if brief else type(value).__name__
    return BadRequest(f"{param}: found {found}; {complaint}", param)


def _param(loc: Sequence[int | str], body: Any, missing: bool) -> str:
    """A place in the body as OpenAI writes it. Parts of pydantic's path that the body lacks name its types."""
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
