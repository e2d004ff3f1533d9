"""Watching a switched session for drift: sampled audits, and the turns that left the locality.

* A sampled turn of the surrogate is asked of the original too, in the background.
* A turn that went to the original because it left the locality is asked of the surrogate too: the original's
  answer is there already, so this evidence costs no time of the original.

Both yield a gap; enough breaches in a row roll the session back. Nothing here delays a reply.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable

from soma_vllm.config import Config
from soma_vllm.engines.base import Engine
from soma_vllm.errors import EngineError
from soma_vllm.scheduler.book import SessionBook
from soma_vllm.scheduler.holds import AdapterHolds
from soma_vllm.scheduler.ports import AdapterEngine, Encoder
from soma_vllm.scheduler.shadow import adapted_answer, gaps_between, shadow_answer
from soma_vllm.session.phases import Phase
from soma_vllm.session.session import Turn
from soma_vllm.types import AdapterRef, Message, Role, SessionKey

logger = logging.getLogger(__name__)


class DriftWatch:
    """Audits turns and rolls sessions back."""

    def __init__(
        self,
        config: Config,
        book: SessionBook,
        original: Engine,
        surrogate: AdapterEngine,
        encoder: Encoder,
        holds: AdapterHolds,
        retire: Callable[[AdapterRef], Awaitable[None]],
    ) -> None:
        self._config = config
        self._book = book
        self._original = original
        self._surrogate = surrogate
        self._encoder = encoder
        self._holds = holds
        self._retire = retire
        self._sample = random.Random(config.training.seed)

    def wants(self, turn: Turn) -> bool:
        """Whether this turn is to be audited: every locality miss, a share of the surrogate's turns."""
        if turn.phase is not Phase.SWITCHED or not turn.complete or not turn.answer:
            return False
        if turn.engine is Role.ORIGINAL:
            return turn.reason.startswith("locality")
        return self._sample.random() < self._config.gate.audit_rate

    async def audit(
        self, key: SessionKey, turn: Turn, asked: tuple[Message, ...], shown: tuple[Message, ...]
    ) -> None:
        """Measure one turn's gap and act on it. `asked` is the client's history, `shown` the surrogate's."""
        limit = self._config.max_new_tokens
        adapter = self._book.session(key).adapter
        try:
            if turn.engine is Role.SURROGATE:
                shadow = await shadow_answer(self._original, key.tenant, asked, limit)
            else:
                shadow = await adapted_answer(self._surrogate, self._holds, key.tenant, shown, limit, adapter)
            (value,) = await gaps_between(self._encoder, [turn.answer], [shadow])
        except EngineError as error:
            logger.info("an audit was dropped: %s", error)
            return
        await self._observe(key, turn, value)

    async def _observe(self, key: SessionKey, turn: Turn, value: float) -> None:
        session = self._book.note(key, "audited", turn=turn.number, gap=round(value, 4), served_by=turn.engine)
        if session.phase is not Phase.SWITCHED or not session.drift.demands_rollback(self._config.gate):
            return
        adapter = session.adapter
        self._book.note(
            key,
            "rolled_back",
            moving_gap=round(session.drift.moving(), 4),
            window=list(session.drift.window),
            breaches=session.drift.breaches,
            drift_threshold=self._config.gate.drift_threshold,
        )
        if adapter is not None:
            await self._retire(adapter)
