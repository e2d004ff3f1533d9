"""What an adapter store of thousands costs: publishing, listing and resolving, in a directory and over fsspec.

One adapter of rank 8 is published `--adapters` times, over `--tenants` tenants, one per session. Publishing and
resolving are timed one by one (median and 95th percentile); listing, which reads every manifest and which a
server does once, at its start, as a whole. `resolve` reads and digests the weights, as each load does; `get`
reads the manifest. The weights are small (`--width`), so that it is the store that is measured. Times depend on
the disk: publishing waits for it again and again. Over fsspec the far side is another folder of the same disk.

    python benchmarks/adapter_store.py [--adapters 10000] [--kind KIND] [--root DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from soma_vllm.adapters.store.opening import open_root
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.types import SessionKey

KINDS = ("directory", "fsspec")
SAMPLES = 200
RANK = 8


def trained(directory: Path, width: int) -> Path:
    """A plain LoRA as a trainer leaves it."""
    directory.mkdir()
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.{kind}.lora_{side}.weight": torch.ones(
            (RANK, width) if side == "A" else (width, RANK)
        )
        for layer in range(2)
        for kind in ("q_proj", "v_proj")
        for side in "AB"
    }
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def timed(work: Callable[[], object]) -> float:
    """Milliseconds that work takes."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def measured(opened: Callable[[], AdapterStore], files: Path, adapters: int, tenants: int) -> dict[str, Any]:
    """Milliseconds of every operation on one store."""
    store, draw = opened(), random.Random(0)
    publishing = []
    for number in range(adapters):
        key = SessionKey(f"tenant{number % tenants}", str(number))
        publishing.append(timed(lambda key=key: store.publish(key, files, base_model="small", manifest={})))
        if (number + 1) % 1000 == 0:
            Console(stderr=True).print(f"published {number + 1}")
    fresh = opened()
    listing = timed(fresh.list)
    names = [one.ref.name for one in draw.sample(fresh.list(), min(SAMPLES, adapters))]
    first = opened()
    results = {
        "publish, the first hundred": publishing[:100],
        "publish, the last hundred": publishing[-100:],
        "get, by a store that has read nothing": [timed(lambda name=name: first.get(name)) for name in names],
        "resolve": [timed(lambda name=name: first.resolve(name)) for name in names],
        "list all": [listing],
        "list one tenant": [timed(lambda: fresh.list("tenant1")) for _ in range(20)],
    }
    retired = names[:50]
    results["retire"] = [timed(lambda name=name: store.retire(name)) for name in retired]
    return {
        name: {"median_ms": statistics.median(times), "p95_ms": sorted(times)[int(len(times) * 0.95) - 1]}
        for name, times in results.items()
    }


@contextmanager
def folder(root: str | None) -> Iterator[Path]:
    """Where to work; a folder of our own is deleted in the end."""
    with tempfile.TemporaryDirectory(prefix="adapter-store-", dir=root) as made:
        yield Path(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--root", help="existing folder to work in; without it a temporary one")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of store; repeatable; without it both")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    found = {}
    for kind in chosen.kind or KINDS:
        with folder(chosen.root) as here:
            files = trained(here / "trained", chosen.width)
            root = str(here / "root") if kind == "directory" else f"file://{here}/root"
            found[kind] = measured(
                lambda root=root, here=here: open_root(root, here / "cache"),
                files,
                chosen.adapters,
                chosen.tenants,
            )
    table = Table("operation", *(f"{kind}: median, p95 (ms)" for kind in found))
    for name in next(iter(found.values())):
        cells = (f"{rows[name]['median_ms']:.2f}, {rows[name]['p95_ms']:.2f}" for rows in found.values())
        table.add_row(name, *cells)
    Console().print(f"{chosen.adapters} adapters of {chosen.tenants} tenants, {platform.machine()}", table)
    if chosen.json:
        document = {"adapters": chosen.adapters, "tenants": chosen.tenants, "results": found}
        chosen.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
