"""The arms: which policy answers each turn, with which settings, and on which cores.

Guarantees: every arm may use all cores of the machine, `original_one_core` apart, which shows what the second
one is worth; arms that need the same server share it.

Where only one engine works at a time it has all cores (`WHOLE`); where both work, each has the cores that the
configuration gives it, which together are all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from soma_vllm.config import Config

WHOLE = "all cores"
SPLIT = "each engine its own"

PAPER = (
    "mining.enabled=true",
    "mining.tail=positions",
    "mining.hardness=divergence",
    "lora.objective=nll",
    "lora.checkpoints=[]",
    "adaptation.candidates=[adapter]",
    "adaptation.payback=always",
    "gate.min_agreement=0",
    "gate.min_gain=0",
    "prefix.mode=sliding",
)
"""The published method: fixed W, mining, hardness weights, a session adapter by hard labels, the sliding
prefix, the cosine gate and rollback. Steps and iterations are the configuration's own."""


@dataclass(frozen=True)
class Arm:
    """One arm. A name that is not in `ARMS` is a policy's, served as the configuration says."""

    policy: str
    """Of turns after the warm start; `warm` of those in it."""
    warm: str | None = None
    """None: the policy's own."""
    cores: str = SPLIT
    overrides: tuple[str, ...] = ()
    gated: bool = False
    """Whether sessions are watched for drift."""


ARMS: Mapping[str, Arm] = {
    "original": Arm("original", cores=WHOLE),
    "original_one_core": Arm("original"),
    "surrogate": Arm("surrogate", cores=WHOLE),
    "switch_all": Arm("surrogate", warm="original"),
    "random": Arm("surrogate", warm="original"),
    "history_prefix": Arm("history_prefix"),
    "history_ft": Arm("history_ft"),
    "speculative": Arm("speculative", cores=WHOLE, overrides=("original.draft_tokens=4",)),
    "soma_paper": Arm("soma", overrides=PAPER, gated=True),
    # Adapters of a whole workload will be an arm of their own here, beside this one without any.
    "soma": Arm("soma", gated=True),
}


def arm(name: str) -> Arm:
    """An arm by its name."""
    return ARMS.get(name, Arm(name))


def overrides(name: str, config: Config) -> tuple[str, ...]:
    """What an arm's server is started with, beyond the configuration."""
    found = arm(name)
    own = list(found.overrides)
    if name == "soma_paper":
        own.append("gate.gap=encoder")
    if found.cores == WHOLE and _pinned(config):
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        own += [f"original.cpu_cores='{cores}'", f"surrogate.cpu_cores='{cores}'"]
    return tuple(own)


def hardware(name: str, config: Config) -> dict[str, int]:
    """Cores of each engine in an arm; 1 where it computes on a device, or is not pinned."""
    if not _pinned(config):
        return {"original": 1, "surrogate": 1}
    if arm(name).cores == WHOLE:
        return dict.fromkeys(("original", "surrogate"), len(os.sched_getaffinity(0)))
    return {"original": count(config.original.cpu_cores), "surrogate": count(config.surrogate.cpu_cores)}


def count(cores: str | None) -> int:
    """Cores in a list such as 0-3,5."""
    if not cores:
        return 1
    ends = [part.partition("-") for part in cores.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)


def _pinned(config: Config) -> bool:
    engines = (config.original, config.surrogate)
    return all(engine.device == "cpu" and engine.cpu_cores is not None for engine in engines)


def policies(name: str, turns: int, warm: int, switched: bool = True) -> tuple[str, ...]:
    """Who is asked for each turn of a session; `switched`: whether the random arm drew this one."""
    found = arm(name)
    first = found.warm or found.policy
    later = found.policy if switched else first
    return tuple(first if number < warm else later for number in range(turns))


def drawn(sessions: int, share: float, seed: str) -> list[bool]:
    """Which sessions the random arm switches: `share` of them, rounded."""
    chosen = random.Random(seed).sample(range(sessions), round(share * sessions))
    return [number in chosen for number in range(sessions)]


def together(order: Sequence[str], config: Config) -> list[list[str]]:
    """Arms that share a server side by side, in the order of their first; `random` after `soma`."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(order, key=lambda name: name == "random"):
        found.setdefault(overrides(name, config), []).append(name)
    return list(found.values())
