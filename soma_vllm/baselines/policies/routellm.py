"""Baseline: each query goes to the original or to the plain surrogate, by RouteLLM's estimate alone.

The package `routellm` runs in a process of its own. A score is not a decision: its router says how likely only
the original's answer would do; the threshold is the configuration's, calibrated on logged queries for a share
of them that the original is to answer (`threshold_for`, `soma calibrate-router`). As in the package, the query
alone is scored, not the history.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from soma_vllm.baselines.policies.package_process import process_of
from soma_vllm.config import Config
from soma_vllm.errors import ConfigError
from soma_vllm.scheduler.policies.base import TurnQuery
from soma_vllm.sessions.state.adaptation_rules import AdaptationRules
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.transcript import text_of
from soma_vllm.types import Role, Route


class Router:
    """RouteLLM's estimate, from a process that starts when it is first needed."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError: the router needs weights, and none are named."""
        settings = config.baselines.routellm
        if settings.checkpoint is None and settings.router != "random":
            problem = f"found null; expected the weights of router {settings.router}, a model or its folder"
            raise ConfigError("config", [f"baselines.routellm.checkpoint: {problem}"])
        router = {"router": settings.router}
        self._process = process_of(config, "routellm", router, "checkpoint", settings.checkpoint)

    async def start(self) -> None:
        """Load the router. Raises PolicyUnavailable."""
        await self._process.start()

    async def scores(self, queries: Sequence[str]) -> list[float]:
        """For each query how likely only the original's answer would do, in [0, 1].

        Raises:
            PolicyUnavailable: the router cannot tell now.
        """
        found = await self._process.ask({"texts": list(queries)})
        return [float(score) for score in found]

    async def close(self) -> None:
        """End its process."""
        await self._process.close()


class RoutellmPolicy:
    """Routes each query by its score."""

    adapting: AdaptationRules | None = None

    def __init__(self, config: Config) -> None:
        """Raises ConfigError: no threshold, or no weights."""
        threshold = config.baselines.routellm.threshold
        if threshold is None:
            problem = "found null; expected a number in [0, 1], such as `soma calibrate-router` prints"
            raise ConfigError("config", [f"baselines.routellm.threshold: {problem}"])
        self._threshold = threshold
        self._router = Router(config)

    async def open(self) -> None:
        """Load the router."""
        await self._router.start()

    async def close(self) -> None:
        """End its process."""
        await self._router.close()

    async def prepare(self, session: Session, asked: TurnQuery) -> float:
        """The score of the query."""
        (score,) = await self._router.scores([text_of(asked.messages[-1])])
        return score

    def route(self, session: Session, asked: TurnQuery) -> Route:
        """The original at the threshold and above, as in the package."""
        to_original = asked.prepared >= self._threshold
        reason = f"win rate {asked.prepared:.4f} {'not below' if to_original else 'below'} {self._threshold:g}"
        return Route(Role.ORIGINAL if to_original else Role.SURROGATE, None, asked.messages, reason)


def threshold_for(scores: Sequence[float], share: float) -> float:
    """The threshold at which the original answers `share`, in [0, 1], of queries with these scores.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("found no scores; expected at least one")
    return float(np.quantile(np.asarray(scores, dtype=np.float64), 1.0 - share))
