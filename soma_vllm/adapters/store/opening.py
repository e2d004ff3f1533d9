"""A configured root, opened: a directory, or a URL of an object store."""

from __future__ import annotations

from pathlib import Path

from soma_vllm.adapters.store.filesystem import AdapterStore
from soma_vllm.adapters.store.object_store import RemoteAdapterStore
from soma_vllm.adapters.store.verify import NOTHING, Demands

AnyAdapterStore = AdapterStore | RemoteAdapterStore


def open_root(root: str, cache: str | Path, *, demands: Demands = NOTHING, owner: str = "") -> AnyAdapterStore:
    """The store at `root`. `owner` names the record that speaks of what is published here.

    Raises:
        AdapterError: nobody here speaks this kind of URL.
    """
    if "://" in root:
        return RemoteAdapterStore(root, cache, demands=demands, owner=owner)
    return AdapterStore(Path(root), demands=demands, owner=owner)
