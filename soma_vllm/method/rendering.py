"""From an example to token ids: the surrogate's own chat template, then the original's answer and its end.

Guarantees: the prompt is what an engine would send for the same messages (`apply_chat_template` with the
generation prompt); the answer ends with the template's end-of-turn token, so that an adapter learns when to
stop; a shortened prompt keeps its end, a shortened answer its beginning, and neither is ever cut to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError

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
    """At least one token; the last is the end of turn unless the answer was shortened."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: its last `len(answer)` positions predict the answer's tokens."""
        return self.prompt + self.answer[:-1]

    def shortened(self, prompt: int, answer: int) -> Rendered:
        """At most the last `prompt` and the first `answer` tokens."""
        return Rendered(self.turn, self.prompt[-prompt:], self.answer[:answer])

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
    return tuple(
        Rendered(
            turn=example.turn,
            prompt=tuple(_ids(tokenizer, _prompt_text(tokenizer, example))),
            answer=(*_ids(tokenizer, example.answer), end),
        )
        for example in examples
    )


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


def answer_logits(
    model: Any,
    rendered: Rendered,
    soft_prompt: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits (n, V) that predict the n answer tokens, teacher-forced; no other position meets the output head.

    `soft_prompt` (L, d), where given, is prepended at the embedding layer, before the whole prompt.
    """
    ids = torch.tensor([rendered.inputs], device=model.device)
    length = ids.shape[1] + (0 if soft_prompt is None else len(soft_prompt))
    # Numbered positions and not a count: a count slices the hidden states, and the strides of a slice make
    # torch copy the whole output head (1-2 s for 150,000 words on one core).
    keep = torch.arange(length - len(rendered.answer), length, device=model.device)
    if soft_prompt is None:
        output = model(input_ids=ids, use_cache=False, logits_to_keep=keep)
    else:
        words = model.get_input_embeddings()(ids)
        embeds = torch.cat([soft_prompt.to(words.dtype).unsqueeze(0), words], dim=1)
        output = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=keep)
    logits: torch.Tensor = output.logits[0]
    return logits


def answer_ids(model: Any, rendered: Rendered) -> torch.Tensor:
    """The answer's token ids (n,) on the model's device."""
    return torch.tensor(rendered.answer, device=model.device)


def _prompt_text(tokenizer: Any, example: Example) -> str:
    messages = [_plain(message, example.turn) for message in example.messages]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise TrainingError(f"turn {example.turn}: the chat template refused the messages: {error}") from error
    return text


def _plain(message: Message, turn: int) -> dict[str, Any]:
    """The message with its content as one string, as text-only templates expect it."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    kinds = [part.get("type") for part in content]
    if any(kind != "text" for kind in kinds):
        raise TrainingError(f"turn {turn}: found content parts {kinds}; expected parts of type 'text' only")
    return {**message, "content": "".join(part["text"] for part in content)}


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
