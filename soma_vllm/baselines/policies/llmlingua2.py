"""Baseline: the original answers every turn, under a history that LLMLingua-2 has compressed.

The package `llmlingua` runs in a process of its own. System messages and the query stay as they are; every
earlier message that is plain text is compressed by itself, once, so that a history's compressed beginning never
changes and stays in the engine's prefix cache.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from soma_vllm.baselines.policies.package_process import process_of
from soma_vllm.config import Config
from soma_vllm.errors import ConfigError
from soma_vllm.scheduler.policies.base import TurnQuery
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Message, Role, Route

REMEMBERED = 4096
"""Compressed messages kept: some 2 MB."""

KINDS = ("xlm-roberta-large", "bert-base-multilingual-cased")
"""What the package tells a compressor's tokenizer by: its folder's or model's name must hold one of these."""


class Llmlingua2Policy:
    """The original under a compressed history."""

    adapting: AdaptationRules | None = None

    def __init__(self, config: Config) -> None:
        """Raises ConfigError: there is no compressor that the package knows."""
        self._settings = config.baselines.llmlingua2
        model = self._settings.model
        if model is None or not any(kind in model for kind in KINDS):
            wanted = f"a compressor whose name holds {' or '.join(KINDS)}"
            raise ConfigError("config", [f"baselines.llmlingua2.model: found {model!r}; expected {wanted}"])
        device = {"device": config.baselines.device}
        self._process = process_of(config, "llmlingua2", device, "model", model)
        self._known: OrderedDict[bytes, str] = OrderedDict()

    async def open(self) -> None:
        """Load the compressor."""
        await self._process.start()

    async def close(self) -> None:
        """End its process."""
        await self._process.close()

    async def prepare(self, session: Session, asked: TurnQuery) -> tuple[Message, ...]:
        """The history, compressed."""
        texts = [message["content"] for message in asked.messages[:-1] if _compressible(message)]
        short = dict(zip(texts, await self._compressed(texts), strict=True))
        return tuple(
            {**message, "content": short[message["content"]]}
            if index < len(asked.messages) - 1 and _compressible(message)
            else message
            for index, message in enumerate(asked.messages)
        )

    def route(self, session: Session, asked: TurnQuery) -> Route:
        """Always the original."""
        before, after = (sum(map(_length, messages)) for messages in (asked.messages, asked.prepared))
        share = after / before if before else 1.0
        return Route(Role.ORIGINAL, None, asked.prepared, f"compressed to {share:.2f} of its characters")

    async def _compressed(self, texts: Sequence[str]) -> list[str]:
        """Each text, shorter; one that would vanish stays whole."""
        digests = {text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts}
        new = [text for text in digests if digests[text] not in self._known]
        if new:
            request = {
                "texts": new,
                "rate": self._settings.rate,
                "force_tokens": list(self._settings.force_tokens),
            }
            found = await self._process.ask(request)
            for text, short in zip(new, found, strict=True):
                self._known[digests[text]] = short if short.strip() else text
        short_texts = [self._known[digests[text]] for text in texts]
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return short_texts


def _compressible(message: Message) -> bool:
    """Whether a message of the history is plain text of a user, an assistant or a tool."""
    content = message.get("content")
    return message.get("role") != "system" and isinstance(content, str) and bool(content.strip())


def _length(message: Message) -> int:
    content = message.get("content")
    return len(content) if isinstance(content, str) else 0
