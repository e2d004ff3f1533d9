"""Says what this machine is, what set-up will take on it, and what it lacks, before minutes are spent.

python requirements/check_machine.py cpu|cuda

Guarantees: needs the standard library only, takes under two seconds, changes nothing. One line for each thing
that is missing, with what to do about it. Exit code 1 only for what makes set-up impossible.
"""

import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (3, 11)
COMPILERS = ("g++", "c++", "clang++")
ENVIRONMENT_GB = {"cpu": 6.0, "cuda": 16.0}
"""What .venv takes on disk, with room for pip to unpack in."""
MODELS_GB = 7.0
"""The embedded pair: 2.5 GB of downloads, and what they are converted to."""
MEMORY_GB = 14.0
"""What the embedded pair is served in, its trainers included."""
TINY_MEMORY_GB = 6.0
"""The same for tiny random models."""
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def main(device: str) -> int:
    """Exit code: 0 where set-up can go on."""
    print(
        f"[machine] {processor()}; {memory_gb():.0f} GB of memory and {disk_gb(ROOT):.0f} GB of disk are free"
    )
    impossible = [*interpreter(), *disk(device)]
    for line in (*compiler(), *memory(), *room_for_models(), *network()):
        print(f"[machine] {line}")
    for line in impossible:
        print(f"[machine] {line}", file=sys.stderr)
    if not impossible:
        print("[machine] set-up takes 3 to 6 minutes with a fast index; most of it is copying files")
    return 1 if impossible else 0


def processor() -> str:
    """Cores, model and the instruction set that decides how fast products are."""
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpuinfo('model name') or platform.machine()}, {products()}"
    )


def products() -> str:
    """The fastest kind of product that the processor has, in words."""
    flags = set(cpuinfo("flags").split())
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return "AVX-512 with bf16" if "avx512_bf16" in flags else "AVX-512"
    return "AVX2" if {"avx2", "fma"} <= flags else "neither AVX2 nor AVX-512: models are served very slowly"


def cpuinfo(key: str) -> str:
    """The first processor's value, or nothing."""
    pairs = (line.partition(":") for line in read("/proc/cpuinfo"))
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")


def memory_gb() -> float:
    """Memory that processes may still take: what the kernel has, within what a container may have."""
    lines = read("/proc/meminfo")
    free = next((float(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")), 0.0)
    for limit, used in CGROUP_FILES:
        bounds = [read(f"/sys/fs/cgroup/{name}") for name in (limit, used)]
        if all(bounds) and all(bound[0].isdigit() for bound in bounds):
            # The kernel gives file cache back when processes ask for memory.
            stat = (line.split() for line in read(f"/sys/fs/cgroup/{Path(limit).parent}/memory.stat"))
            cache = next((int(n) for name, n in stat if name.endswith("inactive_file")), 0)
            free = min(free, (int(bounds[0][0]) - int(bounds[1][0]) + cache) / 2**30)
    return free


def read(path: str) -> list[str]:
    """Lines of a file; none where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def interpreter() -> list[str]:
    """What is wrong with this Python."""
    if sys.version_info[:2] != PYTHON:
        return [
            f"found Python {platform.python_version()}; expected 3.11: make setup PYTHON=/path/to/python3.11"
        ]
    return []


def compiler() -> list[str]:
    """What a machine without a compiler, or without Python's headers, has to know."""
    lost = "the C++ products are not built, and adapters and prompts are computed several times slower"
    if not any(map(shutil.which, COMPILERS)):
        return [f"no C++ compiler: {lost}. On Debian: apt install g++; then make -B setup"]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return [f"no Python.h: {lost}. On Debian: apt install python3.11-dev; then make -B setup"]
    return []


def memory() -> list[str]:
    """What too little memory rules out."""
    free = memory_gb()
    if free < TINY_MEMORY_GB:
        return [f"too little memory to serve even tiny models ({TINY_MEMORY_GB:.0f} GB): make check will do"]
    if free < MEMORY_GB:
        return [
            f"the embedded pair needs {MEMORY_GB:.0f} GB of memory: make demo may not start; make smoke will"
        ]
    return []


def disk(device: str) -> list[str]:
    """Where the disk cannot hold what is installed."""
    need, found = ENVIRONMENT_GB[device], disk_gb(ROOT)
    if (ROOT / ".venv" / "bin" / "python").exists() or found >= need:
        return []
    return [f"set-up needs {need:.0f} GB of disk below {ROOT}; found {found:.1f} GB"]


def room_for_models() -> list[str]:
    """Where the disk cannot hold the embedded models, which come after set-up."""
    home = Path(os.environ.get("SOMA_HOME") or Path.home() / ".cache" / "soma-vllm").expanduser()
    if (home / "models").exists() or disk_gb(home) >= MODELS_GB:
        return []
    return [
        f"make models, demo and test need {MODELS_GB:.0f} GB more below {home}: SOMA_HOME=… puts them elsewhere"
    ]


def disk_gb(folder: Path) -> float:
    """What is free where a folder is, or will be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free / 2**30


def network() -> list[str]:
    """Which way packages come, where it is not the usual one."""
    proxies = sorted({name.upper() for name in PROXIES if os.environ.get(name)})
    return [f"pip and make models go through the proxy in {', '.join(proxies)}"] if proxies else []


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
