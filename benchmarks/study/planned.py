"""A study that was read and checked: what is played, on which servers, with which truth."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from soma_vllm.config import Config, Prices
from study.capacity import Targets
from study.checks import Check
from study.plan import Block, Dialogues


@dataclass(frozen=True)
class Stage:
    """What is played on one server."""

    overrides: tuple[str, ...]
    blocks: tuple[Block, ...]
    ladders: tuple[Block, ...] = ()
    """Blocks whose arms have their capacity found, beginning at the rate of these."""
    drift: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Study:
    """One run, read and checked."""

    options: argparse.Namespace
    config: Config
    tariffs: dict[str, Prices]
    dialogues: Dialogues
    stages: tuple[Stage, ...]
    checks: Mapping[str, tuple[Check | None, ...]] = field(default_factory=dict)
    """By dialogue."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """By dialogue: the turn with which its topic changes."""
    frozen: Mapping[str, Any] | None = None
    """What the test part was frozen with."""

    @property
    def blocks(self) -> list[Block]:
        """Those of the arms themselves, in the order of play."""
        return [block for stage in self.stages for block in stage.blocks]

    @property
    def targets(self) -> Targets:
        """What a user accepts."""
        return Targets(self.options.target_ttft, self.options.target_latency)
