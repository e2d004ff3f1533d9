"""Resolve requirements/*.in into one lock per device, with uv (part of requirements/build.lock).

python requirements/resolve.py [further arguments of `uv pip compile`]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
HEADER = (
    "# Resolved by `make lock` from requirements/*.in for Python 3.11. Installed with --no-deps.\n"
    f"# {', '.join(LEFT_OUT)} are left out: they break beside torch's CPU build, and nothing here needs them.\n"
)


def resolve(device: str, *arguments: str) -> None:
    """Write requirements/<device>.lock."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as excludes:
        excludes.write("\n".join(LEFT_OUT))
        excludes.flush()
        sources = [str(HERE / f"{name}.in") for name in (device, "base", "dev")]
        resolved = subprocess.run(
            [
                *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python-version", "3.11"),
                *("--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links"),
                *("--excludes", excludes.name),
                *arguments,
                *sources,
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    (HERE / f"{device}.lock").write_text(HEADER + resolved, encoding="utf-8")
    print(f"requirements/{device}.lock: {len(resolved.splitlines())} packages")


if __name__ == "__main__":
    for name in ("cpu", "cuda"):
        resolve(name, *sys.argv[1:])
