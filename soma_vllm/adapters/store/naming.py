"""An adapter's name says where it lies, so that finding one among thousands opens one file.

    soma-<tenant>-<session>-v0001-17   <->   <tenant>/<session>/v0001

Guarantees: a client's session id never becomes part of a path, its digest does; a name that was not made here
names no place; two sessions, versions or numbers never share a name.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from soma_vllm.errors import AdapterError, NotFound
from soma_vllm.types import SessionKey

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_NAME = re.compile(rf"soma-({_TENANT.pattern})-([0-9a-f]{{16}})-v([0-9]{{4,9}})-([0-9]{{1,10}})")

LARGEST = 2**31 - 1
"""Largest number of an adapter: vLLM and SQL take it as a signed 32-bit integer."""


@dataclass(frozen=True)
class Place:
    """One version of one session's adapter."""

    tenant: str
    digest: str
    """Of the session's id."""
    version: int
    number: int

    @property
    def name(self) -> str:
        """vLLM's name of the adapter."""
        return f"soma-{self.tenant}-{self.digest}-v{self.version:04d}-{self.number}"

    @property
    def path(self) -> str:
        """Where it lies below a root, with slashes."""
        return f"{self.tenant}/{self.digest}/v{self.version:04d}"

    @property
    def numbered_path(self) -> str:
        """The same where no lock makes versions unique: no two adapters ever share it."""
        return f"{self.path}-{self.number}"


def place_of(name: str) -> Place:
    """The place that a name names.

    Raises:
        NotFound: it is no name of an adapter.
    """
    found = _NAME.fullmatch(name)
    place = found and Place(found[1], found[2], int(found[3]), int(found[4]))
    if not place or place.name != name:
        raise NotFound(f"adapter {name[:200]!r}: no such name was ever given out")
    return place


def home_of(key: SessionKey) -> str:
    """The folder of a session's versions, below a root, with slashes.

    Raises:
        AdapterError: the tenant is not a plain word.
    """
    return f"{checked(key.tenant)}/{digest_of_session(key)}"


def digest_of_session(key: SessionKey) -> str:
    """16 hexadecimal digits for a session's id, whatever a client wrote there."""
    return hashlib.sha256(key.session.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def checked(tenant: str) -> str:
    """A tenant that may be a folder.

    Raises:
        AdapterError: it may not.
    """
    if not _TENANT.fullmatch(tenant):
        raise AdapterError(f"tenant: found {tenant!r}; expected letters, digits, '-' and '_'")
    return tenant


def version_of(folder: str) -> int | None:
    """The version whose folder has this name; None for another folder."""
    digits = folder[1:]
    return int(digits) if folder[:1] == "v" and digits.isascii() and digits.isdigit() else None
