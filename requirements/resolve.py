"""Resolve requirements/*.in into one lock per device, with uv (part of requirements/build.lock), into one of
what the baselines need beside it, in their own directory, and into one for each load generator and each client
of clients/; npm writes the lock of the clients in JavaScript.

python requirements/resolve.py [further arguments of `uv pip compile`]
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
HEADER = (
    "# Resolved by `make lock` from requirements/*.in for Python 3.11. Installed with --no-deps.\n"
    f"# {', '.join(LEFT_OUT)} are left out: they break beside torch's CPU build, and nothing here needs them.\n"
)


BASELINES_HEADER = (
    "# Resolved by `make lock` from llmlingua.in and routellm.in for Python 3.11: what these need beside\n"
    "# cpu.lock.\n"
    "# Installed by `make baselines` with --no-deps, in a directory of its own. litellm is left out: only the\n"
    "# part of routellm that answers requests itself imports it.\n"
)

TOOLS = ("guidellm", "aiperf")
TOOL_HEADER = (
    "# Resolved by `make lock` from {tool}.in for Python 3.11. Installed by `make load-tools` with --no-deps,\n"
    "# in an environment of its own.\n"
)

CLIENT_HEADER = (
    "# Resolved by `make lock` from {client}.in for Python 3.11. Installed by `make clients` with --no-deps,\n"
    "# in an environment of its own.\n"
)


def resolve(lock: str, names: Sequence[str], left_out: Sequence[str], header: str, *arguments: str) -> None:
    """Write requirements/<lock>.lock."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as excludes:
        excludes.write("\n".join(left_out))
        excludes.flush()
        sources = [str(HERE / f"{name}.in") for name in names]
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
    (HERE / f"{lock}.lock").write_text(header + resolved, encoding="utf-8")
    print(f"requirements/{lock}.lock: {len(resolved.splitlines())} packages")


def locked(lock: str) -> list[str]:
    """Names of the packages in requirements/<lock>.lock."""
    lines = (HERE / f"{lock}.lock").read_text(encoding="utf-8").splitlines()
    return [line.partition("==")[0] for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    for device in ("cpu", "cuda"):
        resolve(device, (device, "base", "dev"), LEFT_OUT, HEADER, *sys.argv[1:])
    beside = [*locked("cpu"), "litellm", *LEFT_OUT]
    resolve("baselines", ("llmlingua", "routellm"), beside, BASELINES_HEADER, *sys.argv[1:])
    for tool in TOOLS:
        resolve(tool, (tool,), ("setuptools",), TOOL_HEADER.format(tool=tool), *sys.argv[1:])
    for client in sorted(path.stem for path in (HERE / "clients").glob("*.in")):
        lock, header = f"clients/{client}", CLIENT_HEADER.format(client=client)
        resolve(lock, (lock,), ("setuptools",), header, *sys.argv[1:])
    if shutil.which("npm"):  # whose lock names no host, so that any registry serves
        options = ("--package-lock-only", "--omit-lockfile-registry-resolved", "--no-audit", "--no-fund")
        subprocess.run(["npm", "install", *options], cwd=HERE / "clients" / "node", check=True)
