"""From an example to token ids: the surrogate's own chat template, then the original's answer and its end.

Guarantees: the prompt is what an engine would send for the same messages (`apply_chat_template` with the
generation prompt); an answer known token by token is those tokens, one known as text ends with the template's
end-of-turn token, so that an adapter learns when to stop; a shortened prompt keeps its end, a shortened answer
its beginning, and each keeps at least one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from soma_vllm.errors import TrainingError
from soma_vllm.types import Example, Message

_PROBE = "soma-end-of-turn-probe"


@dataclass(frozen=True)
class Rendered:
    """One turn as token ids of the surrogate."""

    turn: int
    prompt: tuple[int, ...]
    """At least one token."""
    answer: tuple[int, ...]
    """At least one token; the last is the end of turn unless the answer was cut."""
    teacher: tuple[NDArray[np.int32], NDArray[np.float32]] | None = field(
        default=None, compare=False, repr=False
    )
    """The original's likeliest tokens at each answer position and their log-probabilities, (n, k) each."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: its last `len(answer)` positions predict the answer's tokens."""
        return self.prompt + self.answer[:-1]

    def shortened(self, prompt: int, answer: int) -> Rendered:
        """At most the last `prompt` and the first `answer` tokens."""
        teacher = None if self.teacher is None else (self.teacher[0][:answer], self.teacher[1][:answer])
        return Rendered(self.turn, self.prompt[-prompt:], self.answer[:answer], teacher)

    def within(self, length: int) -> Rendered:
        """At most `length` tokens in all: the prompt gives way first, down to a quarter of the room."""
        room = max(length - len(self.answer), length // 4, 1)
        kept = min(room, len(self.prompt))
        return self.shortened(kept, max(length - kept, 1))


def render(tokenizer: Any, examples: Sequence[Example]) -> tuple[Rendered, ...]:
    """Examples as token ids, in order.

    Raises:
        TrainingError: no examples, an empty answer, or messages the chat template refuses; names the turns.
    """
    if not examples:
        raise TrainingError("found no examples; expected at least one turn with the original's answer")
    empty = [str(example.turn) for example in examples if not example.answer.strip()]
    if empty:
        raise TrainingError(f"turns {', '.join(empty)}: found an empty answer; expected the original's words")
    end = end_of_turn(tokenizer)
    return tuple(_rendered(tokenizer, example, end) for example in examples)


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """What an engine would read for `messages`, generation prompt included.

    Raises:
        TrainingError: the chat template refuses them, or they hold more than text.
    """
    plain = [_plain(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise TrainingError(f"the chat template refused the messages: {error}") from error
    return tuple(_ids(tokenizer, text))


def end_of_turn(tokenizer: Any) -> int:
    """Id of the special token the chat template puts after an assistant's message.

    The tokenizer's end-of-sequence token where the template puts none.

    Raises:
        TrainingError: there is neither.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for number in _ids(tokenizer, text.rpartition(_PROBE)[2]):
        if number in special:
            return int(number)
    if tokenizer.eos_token_id is None:
        raise TrainingError("found no end-of-turn token in the chat template and no eos_token; expected either")
    return int(tokenizer.eos_token_id)


def _rendered(tokenizer: Any, example: Example, end: int) -> Rendered:
    try:
        prompt = prompt_ids(tokenizer, example.messages)
    except TrainingError as error:
        raise TrainingError(f"turn {example.turn}: {error}") from error
    teacher = example.teacher
    if teacher is None:
        return Rendered(example.turn, prompt, (*_ids(tokenizer, example.answer), end))
    known = len(tokenizer)
    said = tokenizer.decode(list(teacher.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # An id beyond the vocabulary would be spelt as nothing.
    if said.strip() != example.answer.strip() or max(teacher.tokens) >= known:
        raise TrainingError(
            f"turn {example.turn}: the original's tokens do not spell its answer in the surrogate's "
            "vocabulary; expected two models with the same tokenizer"
        )
    # Padding rows of the original's output head, which the surrogate's may lack.
    unknown = teacher.top >= known
    top = np.where(unknown, np.int32(-1), teacher.top)
    logprobs = np.where(unknown, np.float32(-np.inf), teacher.logprobs)
    return Rendered(example.turn, prompt, teacher.tokens, (top, logprobs))


def _plain(message: Message) -> dict[str, Any]:
    """The message with its content as one string, as text-only templates expect it."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    kinds = [part.get("type") for part in content]
    if any(kind != "text" for kind in kinds):
        raise TrainingError(f"found content parts {kinds}; expected parts of type 'text' only")
    return {**message, "content": "".join(part["text"] for part in content)}


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
