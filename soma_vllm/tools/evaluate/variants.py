"""What is compared: one table of methods, each under a prefix. A new method is a new row.

A variant is written `method@prefix`, such as `kd@anchored`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from soma_vllm.config import Config, Lora, Mining, Prefix
from soma_vllm.errors import ConfigError

PREFIXES: tuple[str, ...] = get_args(Prefix.model_fields["mode"].annotation)
PLAIN = "plain"


@dataclass(frozen=True)
class Method:
    """How an adapter is trained; everything not named here is as configured."""

    objective: Literal["nll", "kd"]
    mining: bool
    hardness: Literal["divergence", "reference"] = "divergence"
    from_pair: bool = False
    """Starts from the pair's adapter and not from nothing."""


METHODS: Mapping[str, Method | None] = {
    PLAIN: None,
    "uniform": Method("nll", mining=False),
    "soma-reference": Method("nll", mining=True, hardness="reference"),
    "soma": Method("nll", mining=True),
    "kd": Method("kd", mining=False),
    "soma-kd": Method("kd", mining=True),
    "kd-init": Method("kd", mining=False, from_pair=True),
}
"""name -> how; None trains nothing."""


@dataclass(frozen=True)
class Variant:
    """A method under a prefix."""

    method: str
    prefix: str

    @property
    def name(self) -> str:
        """As it is written on the command line and in the report."""
        return f"{self.method}@{self.prefix}"

    @property
    def how(self) -> Method | None:
        """The row of `METHODS`."""
        return METHODS[self.method]

    @property
    def baseline(self) -> Variant | None:
        """What it has to beat: the plain surrogate under the same prefix; for that one, under full history."""
        if self.method != PLAIN:
            return Variant(PLAIN, self.prefix)
        return None if self.prefix == "full" else Variant(PLAIN, "full")

    def config(self, config: Config) -> Config:
        """The configuration under which this variant would run."""
        changed = {"prefix": config.prefix.model_copy(update={"mode": self.prefix})}
        return config.model_copy(update=changed)

    def mining(self, mining: Mining) -> Mining:
        """Stage 1 of this variant."""
        assert self.how is not None, "the plain surrogate mines nothing"
        return mining.model_copy(update={"enabled": self.how.mining, "hardness": self.how.hardness})

    def lora(self, lora: Lora) -> Lora:
        """Stage 2 of this variant."""
        assert self.how is not None, "the plain surrogate trains nothing"
        start = lora.init_from if self.how.from_pair else None
        return lora.model_copy(update={"objective": self.how.objective, "init_from": start})


def choose(names: Sequence[str], config: Config) -> tuple[Variant, ...]:
    """The variants to measure: those named, else all; with the baselines they are compared to.

    `kd-init` is among all where `lora.init_from` is given.

    Raises:
        ConfigError: a name is not in the table, or needs an adapter that is not given.
    """
    mode = config.prefix.mode
    if names:
        problems = [problem for name in names if (problem := _problem(name, config))]
        if problems:
            raise ConfigError("soma evaluate", problems)
        chosen = [Variant(*name.split("@")) for name in names]
    else:
        chosen = [Variant(PLAIN, prefix) for prefix in PREFIXES]
        trained = (
            name for name, how in METHODS.items() if how and (config.lora.init_from or not how.from_pair)
        )
        chosen += [Variant(name, mode) for name in trained]
    needed = [
        Variant(PLAIN, "full"),
        *(v.baseline for v in chosen if v.baseline),
        Variant(PLAIN, mode),
        *chosen,
    ]
    unique = dict.fromkeys(needed)
    order = list(METHODS)
    return tuple(sorted(unique, key=lambda v: (order.index(v.method), PREFIXES.index(v.prefix))))


def as_configured(config: Config) -> Variant:
    """The variant that a server with this configuration would train."""
    mined = config.mining.enabled is True
    if config.lora.init_from is not None and config.lora.objective == "kd" and not mined:
        method = "kd-init"
    elif config.lora.objective == "kd":
        method = "soma-kd" if mined else "kd"
    elif mined:
        method = "soma" if config.mining.hardness == "divergence" else "soma-reference"
    else:
        method = "uniform"
    return Variant(method, config.prefix.mode)


def _problem(name: str, config: Config) -> str | None:
    method, at, prefix = name.partition("@")
    if not at or method not in METHODS or prefix not in PREFIXES:
        return (
            f"--variant {name}: expected METHOD@PREFIX with METHOD one of {', '.join(METHODS)} "
            f"and PREFIX one of {', '.join(PREFIXES)}"
        )
    how = METHODS[method]
    if how is not None and how.from_pair and config.lora.init_from is None:
        return f"--variant {name}: found no adapter to start from; expected --init DIR or lora.init_from"
    return None
