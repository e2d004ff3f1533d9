"""From an example to token ids: the surrogate's own chat template, then the original's answer and its end.

Guarantees: the prompt is what the surrogate's engine reads for the same request, as the engine said or as
`method/chat_prompt.py` makes it; an answer known token by token is those tokens, one known as text ends with
the template's end-of-turn token, so that an adapter learns when to stop; a shortened prompt keeps its end, a
shortened answer its beginning, and each keeps at least one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soma_vllm.errors import TrainingError
from soma_vllm.method.chat_prompt import prompt_ids
from soma_vllm.types import Example

__all__ = ["Rendered", "end_of_turn", "prompt_ids", "render"]

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
        prompt = example.prompt or prompt_ids(tokenizer, example.messages, example.fields)
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


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
