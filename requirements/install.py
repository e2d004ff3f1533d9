"""Install a lock file as it stands (`--no-deps`), and say what to do when the CPU build of torch is not found.

python requirements/install.py requirements/cpu.lock [pip arguments]
"""

import re
import subprocess
import sys

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def main(lock: str, *pip_arguments: str) -> int:
    """Exit code of pip."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "-q"]
    done = subprocess.run(
        [*command, *pip_arguments, "-r", lock], stderr=subprocess.PIPE, text=True, check=False
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    print("\n".join(errors), file=sys.stderr, end="\n" if errors else "")
    if done.returncode and re.search(r"torch==\S*\+cpu", done.stderr):
        print(
            "\nThe package index at hand does not carry torch's CPU build. PyTorch's own wheel index does:\n"
            f'  make setup PIP_ARGS="--extra-index-url {CPU_WHEELS}"\n'
            'or, with the wheel in a local folder:\n  make setup PIP_ARGS="--find-links /path/to/wheels"',
            file=sys.stderr,
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
