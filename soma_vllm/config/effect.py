"""Keys that a configuration gives and that change nothing in its mode, as lines to say at start.

Guarantee: a key is named only if the file or an override gives it, and only where the condition under which it
is read does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from pydantic import BaseModel

from soma_vllm.config.learning import Mining, Payback, Prices
from soma_vllm.config.root import Config
from soma_vllm.types import Candidate


@dataclass(frozen=True)
class Condition:
    """When some keys are read."""

    keys: frozenset[str]
    """Dotted."""
    holds: Callable[[Config], bool]
    """Whether they are."""
    mode: str
    """The dotted key whose value decides."""


def _all(section: str, model: type[BaseModel]) -> frozenset[str]:
    return frozenset(f"{section}.{name}" for name in model.model_fields)


CONDITIONS = (
    Condition(
        _all("mining", Mining) - {"mining.enabled"}, lambda c: c.mining.enabled is True, "mining.enabled"
    ),
    Condition(
        frozenset({"prefix.anchor", "prefix.anchor_words", "prefix.anchor_role", "prefix.window_step"}),
        lambda c: c.prefix.mode == "anchored",
        "prefix.mode",
    ),
    Condition(frozenset({"prefix.summary_words"}), lambda c: c.prefix.mode != "full", "prefix.mode"),
    Condition(
        frozenset({"compressed_prefix_turns"}),
        # Other policies may have prefixes of their own.
        lambda c: c.prefix.mode != "full" or c.policy != "soma",
        "prefix.mode",
    ),
    Condition(frozenset({"gate.surprise_threshold"}), lambda c: c.gate.audit == "score", "gate.audit"),
    Condition(
        _all("payback", Payback) | _all("prices", Prices),
        lambda c: c.adaptation.payback == "auto",
        "adaptation.payback",
    ),
    Condition(
        _all("payback", Payback) | _all("prices", Prices) | {"adaptation.payback"},
        lambda c: Candidate.ADAPTER in c.adaptation.candidates,
        "adaptation.candidates",
    ),
)
"""Every key here is read elsewhere, under its condition alone."""


def given(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """The dotted keys that were given, in the order of the model."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name not in section.model_fields_set:
            continue
        if isinstance(value, BaseModel):
            yield from given(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def without_effect(config: Config) -> list[str]:
    """A line a mode in which given keys change nothing, and one where drift may pass what was accepted."""
    keys, found = list(given(config)), dict[str, list[str]]()
    for condition in CONDITIONS:
        if not condition.holds(config):
            idle = found.setdefault(condition.mode, [])
            idle += [key for key in keys if key in condition.keys and key not in idle]
    lines = [
        f"these keys of your file have no effect with {mode}: {_value(config, mode)}: {', '.join(idle)}"
        for mode, idle in found.items()
        if idle
    ]
    gate = config.gate
    if gate.drift_threshold > gate.accept_threshold:
        lines.append(
            f"a session let in by gate.accept_threshold: {gate.accept_threshold:g} is served on up to a mean "
            f"gap of gate.drift_threshold: {gate.drift_threshold:g}"
        )
    return lines


def exposed(config: Config) -> list[str]:
    """A line for each way in which `access.mode: open` leaves a server to whoever reaches it."""
    server, lines = config.server, list[str]()
    if config.access.mode != "open":
        return lines
    if not _is_loopback(server.host):
        lines.append(
            f"access.mode: open on {server.host}:{server.port}: whoever reaches this address is served "
            "at your cost, and all who send no key share the tenant `public`, whose dialogues each of them "
            "lists, reads and deletes; set access.mode: keys, or server.host: 127.0.0.1"
        )
    if any(given is not None for name, given in config.limits if name != "policies"):
        lines.append(
            "limits hold for a bearer token, and with access.mode: open any new token is a new tenant with "
            "limits of its own; set access.mode: keys"
        )
    return lines


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _value(config: Config, key: str) -> str:
    """A value as YAML would give it."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value).lower()
