"""A configured root, opened: a directory, or a URL of an object store."""

from __future__ import annotations

import hashlib
from pathlib import Path

from soma_vllm.adapters.remote import RemoteAdapterStore
from soma_vllm.adapters.store import AdapterStore
from soma_vllm.adapters.verify import NOTHING, Demands

AnyAdapterStore = AdapterStore | RemoteAdapterStore


def open_root(root: str, cache: str | Path, *, demands: Demands = NOTHING, record: str = "") -> AnyAdapterStore:
    """The store at `root`. `record` is the URL of the database that speaks of what is published here.

    Raises:
        AdapterError: nobody here speaks this kind of URL.
    """
    owner = hashlib.sha256(record.encode()).hexdigest()[:16] if record else ""
    if "://" in root:
        return RemoteAdapterStore(root, cache, demands=demands, owner=owner)
    return AdapterStore(Path(root), demands=demands, owner=owner)
