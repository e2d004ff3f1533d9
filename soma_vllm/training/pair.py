"""The owner of a pair's adapter: `soma distill` records it, and only that tenant's sessions start from it."""

from __future__ import annotations

from pathlib import Path

from soma_vllm.documents import read_json
from soma_vllm.errors import TrainingError
from soma_vllm.types import MANIFEST

ANYONE = "*"
"""The tenant of an adapter made of the operator's own dialogues: every tenant's sessions may start from it."""


def owner_of(directory: str | Path) -> str:
    """The tenant whose sessions the adapter was distilled from, or `ANYONE`.

    Raises:
        TrainingError: its manifest is missing or names no tenant.
    """
    file = Path(directory) / MANIFEST
    try:
        owner = read_json(file)["tenant"]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"lora.init_from: {file}: found no manifest with a tenant ({type(error).__name__}); expected a "
            "directory that soma distill wrote"
        ) from error
    return str(owner)


def may_start_from(owner: str, tenant: str) -> bool:
    """Whether sessions of `tenant` may start from an adapter of `owner`."""
    return owner in (ANYONE, tenant)
