"""Install with pip: in silence where it works, and with all of pip's words where it does not.

python requirements/install.py requirements/cpu.lock [pip arguments]   a lock file as it stands (`--no-deps`)
python requirements/install.py --project                               this project, editable

Guarantees: an index that does not answer is told at once, not after pip's retries of each package;
warnings and notices of pip and setuptools are not shown; a C++ source that did not compile is told with the
compiler's first error, and is no failure.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "soma_vllm" / "engines" / "vllm" / "kernels"
PIP = (sys.executable, "-m", "pip")
QUIET = ("--disable-pip-version-check", "--root-user-action=ignore", "--no-input", "--no-deps")
ANSWER_S = 10
"""How long the index may stay silent; pip asks twice."""
SLOW_S = 20
SOURCES = {
    "--index-url",
    "-i",
    "--extra-index-url",
    "--find-links",
    "-f",
    "--trusted-host",
    "--proxy",
    "--cert",
}
"""Of pip's arguments, those that say where packages are."""


def main(what: str, *pip_arguments: str) -> int:
    """Exit code of pip."""
    if what == "--project":
        return project()
    if is_installed(what, pip_arguments):
        return 0
    if no_answer := index(pip_arguments):
        print(no_answer, file=sys.stderr)
        return 1
    done = pip("install", *QUIET, "--quiet", *pip_arguments, "-r", what)
    if done.returncode and re.search(r"torch==\S*\+cpu", done.stderr):
        print(
            "\nThe package index at hand does not carry torch's CPU build. PyTorch's own wheel index does:\n"
            f'  make setup PIP_ARGS="--extra-index-url {CPU_WHEELS}"\n'
            'or, with the wheel in a local folder:\n  make setup PIP_ARGS="--find-links /path/to/wheels"',
            file=sys.stderr,
        )
    return done.returncode


def is_installed(lock: str, pip_arguments: tuple[str, ...]) -> bool:
    """Whether everything that a lock file pins is there already, asked without a network."""
    if "--target" in pip_arguments:
        return False
    asked = [*PIP, "install", *QUIET, "--quiet", "--no-index", "-r", lock]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it; where it fails, print everything that it said."""
    done = subprocess.run([*PIP, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr, end="")
    return done


def index(pip_arguments: tuple[str, ...]) -> str | None:
    """Why nothing can be installed; None where the index knows a package that every lock needs.

    Asked through pip, so that its configuration, proxies and certificates are those of the installation.
    """
    if "--no-index" in pip_arguments:
        return None
    look = ["index", "versions", "setuptools", "--disable-pip-version-check", "--no-input"]
    began = time.monotonic()
    patience = ("--retries", "1", "--timeout", str(ANSWER_S))
    done = subprocess.run(
        [*PIP, *look, *patience, *sources(pip_arguments)], capture_output=True, text=True, check=False
    )
    took = time.monotonic() - began
    if done.returncode == 0:
        if took > SLOW_S:
            print(f"[setup] one page of the package index took {took:.0f} s: set-up may take half an hour")
        return None
    why = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING: pip index"))
    return (
        f"[setup] the package index does not answer, so nothing was installed:\n{why}\n"
        "[setup] choose another with PIP_INDEX_URL, or a proxy with HTTPS_PROXY; what pip uses: pip config list"
    )


def sources(pip_arguments: tuple[str, ...]) -> list[str]:
    """Those of pip's arguments that say where packages are."""
    found, value_follows = [], False
    for argument in pip_arguments:
        name = argument.partition("=")[0]
        if value_follows or name in SOURCES:
            found.append(argument)
        value_follows = name in SOURCES and "=" not in argument
    return found


def project() -> int:
    """Install this project; say what is slower where its C++ sources did not compile."""
    done = pip("install", *QUIET, "--verbose", "--no-build-isolation", "--editable", str(ROOT))
    if done.returncode:
        return done.returncode
    for source in sorted(KERNELS.glob("_*.cpp")):
        built = list(KERNELS.glob(f"{source.stem}.*.so"))
        newest = max(one.stat().st_mtime for one in (source, *KERNELS.glob("*.h")))
        if not any(one.stat().st_mtime >= newest for one in built):
            error = re.search(r"^.*\berror:.*$", done.stdout + done.stderr, re.MULTILINE | re.IGNORECASE)
            said = f": {error[0].strip()}" if error else ""
            print(f"[setup] {source.name} was not compiled, torch computes its products, slower{said}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
