"""A configured root, opened: a directory, or a URL of an object store."""

from __future__ import annotations

from pathlib import Path

from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.adapters.store.object_store import ObjectStoreAdapterStore
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.adapters.store.verify import NOTHING, Demands


def open_root(root: str, cache: str | Path, *, demands: Demands = NOTHING, owner: str = "") -> AdapterStore:
    """The store at `root`. `owner` names the record that speaks of what is published here.

    Raises:
        AdapterError: no installed package opens this kind of URL.
    """
    if "://" in root:
        return ObjectStoreAdapterStore(root, cache, demands=demands, owner=owner)
    return FilesystemAdapterStore(Path(root), demands=demands, owner=owner)
