"""Blank the code of every GPU but Hopper in a CUDA shared object, so that it compresses to a fraction.

`.nv_fatbin` is a row of containers, each a row of entries; an entry is PTX (kind 1) or machine code (kind 2)
for one architecture. Only payloads are blanked: headers and sizes stay, so no offset moves. The driver reads
a payload when one of its kernels is first launched, so what is never launched may be blank as long as
CUDA_MODULE_LOADING is LAZY. vLLM's containers without code for sm_90 hold quantised kernels only. With
PATTERN, a regular expression, machine code whose kernels' names do not match is blanked too (uncompressed
code only). Needs binutils' readelf.

    python benchmarks/gpu/keep_sm90.py SOURCE TARGET [PATTERN]
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MAGIC = 0xBA55ED50
CODE = 2
HOPPER = 90


def fatbin_range(path: Path) -> tuple[int, int]:
    """Offset and end of `.nv_fatbin` in the file, in bytes.

    Raises:
        ValueError: the file has no such section.
    """
    table = subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True).stdout
    lines = [row for row in table.splitlines() if " .nv_fatbin" in row]
    if not lines:
        raise ValueError(f"found no section .nv_fatbin in {path}; expected a CUDA shared object")
    fields = lines[0].split("]", 1)[1].split()
    return int(fields[3], 16), int(fields[3], 16) + int(fields[4], 16)


def containers(data: bytearray, at: int, end: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """(kind, architecture, start, size) of the entries of each container between two offsets of `data`."""
    while at + 16 <= end:
        magic, _, head, size = struct.unpack_from("<IHHQ", data, at)
        if magic != MAGIC:
            at += 8
            continue
        entry, stop, entries = at + head, at + head + size, []
        while entry + 64 <= stop:
            kind, _, skip, length = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            entries.append((kind, arch, entry + skip, length))
            entry += skip + length
        yield entries
        at = (stop + 7) & ~7


def blank(source: Path, target: Path, pattern: str | None) -> None:
    """Write `source` to `target`, which may be the same, with Hopper's code alone; print how much that is."""
    data = bytearray(source.read_bytes())
    wanted = re.compile(pattern.encode()) if pattern else None
    counts: Counter[str] = Counter()
    for entries in containers(data, *fatbin_range(source)):
        for kind, arch, start, size in entries:
            keep = (kind, arch) == (CODE, HOPPER)
            if keep and wanted and not wanted.search(data, start, start + size):
                keep = False
            counts["kept" if keep else "blanked"] += size
            if not keep:
                data[start : start + size] = bytes(size)
    target.write_bytes(data)
    sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sorted(counts.items()))
    print(f"[kit] {source.name}: {sizes}")


if __name__ == "__main__":
    blank(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
