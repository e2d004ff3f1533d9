"""`soma.json`, what a store knows of an adapter, and the noun that is read from it.

Guarantees: a manifest is written once, with the adapter; one that is cut off, or of another format, is none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from soma_vllm.adapters.store.naming import Place
from soma_vllm.adapters.store.verify import AdapterFacts, Depth, FileFacts, verify
from soma_vllm.documents import parse_json
from soma_vllm.errors import AdapterError, AdapterRejected, DocumentError, NotFound
from soma_vllm.types import CONFIG, MANIFEST, WEIGHTS, AdapterRef, SessionKey, Signature

FORMAT = 2


@dataclass(frozen=True)
class PublishedAdapter:
    """One version of one session's adapter. Light: thousands stay in memory."""

    ref: AdapterRef
    key: SessionKey
    version: int
    """Grows with every publication of the session, from 1."""
    created: float
    """Unix time, seconds."""
    base_model: str
    rank: int
    owner: str
    """Id of the record that published it; the digest of that record's URL before records had ids."""
    weights: FileFacts
    config: FileFacts

    @property
    def size_bytes(self) -> int:
        """What it takes up, but for its manifest."""
        return self.weights.size + self.config.size

    def files(self) -> Mapping[str, FileFacts]:
        """What has to be there for an engine, by file name."""
        return {CONFIG: self.config, WEIGHTS: self.weights}

    def view(self) -> dict[str, Any]:
        """As JSON, for people."""
        return listed_view(self.ref.name, self.ref.number, self.key, self.facts())

    def facts(self) -> dict[str, Any]:
        """What the record keeps of it, beside its reference and its state."""
        named = ("version", "base_model", "rank", "size_bytes", "created")
        return {name: getattr(self, name) for name in named}


def listed_view(name: str, number: int, key: SessionKey, facts: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter as JSON, for people. Where it lies is the server's business."""
    return {
        "name": name,
        "number": number,
        "tenant": key.tenant,
        "session": key.session,
        "version": facts["version"],
        "base_model": facts["base_model"],
        "rank": facts["rank"],
        "bytes": facts["size_bytes"],
        "created": facts["created"],
    }


@dataclass(frozen=True)
class LocalAdapter:
    """An adapter whose files lie on this machine, whole, and byte by byte what was published."""

    ref: AdapterRef
    facts: AdapterFacts
    signature: Signature | None
    """What its trainer found that it does to a fixed text, where the manifest tells."""


def plain_json(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a training reports, as JSON has it.

    Raises:
        AdapterError: JSON cannot hold it.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(manifest), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"manifest cannot be written as JSON: {error}") from error
    return found


def document(
    key: SessionKey,
    place: Place,
    facts: AdapterFacts,
    base_model: str,
    owner: str,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """soma.json."""
    return {
        "format": FORMAT,
        "name": place.name,
        "number": place.number,
        "version": place.version,
        "tenant": key.tenant,
        "session": key.session,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "owner": owner,
        "base_model": base_model,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "modules": list(facts.modules),
        "weights": {"sha256": facts.weights.sha256, "bytes": facts.weights.size},
        "config": {"sha256": facts.config.sha256, "bytes": facts.config.size},
        "training": training,
    }


def spelt(content: Mapping[str, Any]) -> bytes:
    """The file's bytes."""
    return (json.dumps(content, indent=2) + "\n").encode()


def whole(content: bytes) -> Mapping[str, Any]:
    """All that a manifest says.

    Raises:
        AdapterError: it is not JSON.
    """
    try:
        found: Mapping[str, Any] = parse_json(content)
    except DocumentError as error:
        raise AdapterError(f"{MANIFEST} {error}") from error
    return found


def read(content: bytes | str, path: str) -> PublishedAdapter:
    """The adapter whose manifest this is, and whose files lie, or belong, at `path`.

    Raises:
        ValueError: it is no whole manifest of this format.
    """
    try:
        found = parse_json(content)
        if found["format"] != FORMAT:
            raise ValueError(f"found format {found['format']!r}; expected {FORMAT}")
        return PublishedAdapter(
            ref=AdapterRef(found["name"], found["number"], path),
            key=SessionKey(found["tenant"], found["session"]),
            version=found["version"],
            created=datetime.fromisoformat(found["created"]).timestamp(),
            base_model=found["base_model"],
            rank=found["rank"],
            owner=found["owner"],
            weights=FileFacts(found["weights"]["sha256"], found["weights"]["bytes"]),
            config=FileFacts(found["config"]["sha256"], found["config"]["bytes"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a manifest of format {FORMAT}") from error


def local(name: str, directory: Path) -> LocalAdapter:
    """The adapter of this name in a directory of this machine, its files read once and compared.

    Raises:
        NotFound: no manifest of this adapter is there.
        AdapterRejected: its files are missing, damaged or not those published.
        OSError: they cannot be read.
    """
    content = _manifest_bytes(name, directory)
    try:
        adapter = read(content, str(directory))
    except ValueError as error:
        raise NotFound(f"adapter {name}: {directory / MANIFEST}: {error}") from error
    if adapter.ref.name != name:
        raise NotFound(f"adapter {name}: found {adapter.ref.name} in {directory}")
    facts, _ = verify(directory, expected=adapter.files(), depth=Depth.QUICK, name=name)
    try:
        return LocalAdapter(adapter.ref, facts, signature_in(parse_json(content)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterRejected(name, [f"{MANIFEST}: found no whole signature: {error!r}"]) from error


def _manifest_bytes(name: str, directory: Path) -> bytes:
    try:
        return (directory / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NotFound(f"adapter {name}: {directory / MANIFEST} is missing") from error


def signature_in(manifest: Mapping[str, Any]) -> Signature | None:
    """The signature in a manifest; None where there is none.

    Raises:
        ValueError, KeyError, TypeError: there is something else in its place.
    """
    found = manifest.get("training", {}).get("signature")
    if found is None:
        return None
    signature = Signature(
        tuple(int(token) for token in found["tokens"]),
        tuple(float(value) for value in found["plain"]),
        tuple(float(value) for value in found["adapted"]),
    )
    lengths = {len(signature.plain), len(signature.adapted), len(signature.tokens) - 1}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"found lengths {sorted(lengths)}; expected one length")
    return signature
