"""The gate's encoder off the event loop, with a memory for texts it has seen."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

REMEMBERED = 4096
"""Vectors kept: some 6 MB with 384 dimensions."""


class Encoder(Protocol):
    """A fixed sentence encoder, off the event loop."""

    async def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, shape (n, d); zeros for empty text."""
        ...


class ThreadedEncoder:
    """Runs a blocking encoder on one thread of its own; keeps vectors by digest, never text."""

    def __init__(self, encode: Callable[[Sequence[str]], NDArray[np.float32]]) -> None:
        self._encode = encode
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="soma-encoder")
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    async def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, shape (n, d); zeros for empty text."""
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        unknown = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        found = {key: self._known[key] for key in keys if key in self._known}
        if unknown:
            loop = asyncio.get_running_loop()
            vectors = await loop.run_in_executor(self._thread, self._encode, list(unknown.values()))
            found |= dict(zip(unknown, vectors, strict=True))
            self._remember(found)
        return np.stack([found[key] for key in keys])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _remember(self, vectors: dict[bytes, NDArray[np.float32]]) -> None:
        self._known.update(vectors)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
