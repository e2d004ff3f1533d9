"""A benchmark once more with the lower instruction set, so that one machine shows both.

Guarantees: nothing is run where the processor has no more than AVX2, or where it was lowered already; the child
has the same arguments, prints its own table, and names in it what it was lowered to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soma_vllm.machine import InstructionSet, instruction_set, lowered_environment


def once_more(script: str, arguments: Sequence[str]) -> dict[str, Any] | None:
    """The document that `script` writes with AVX2 only; None where that is what this process has anyway."""
    if instruction_set() not in (InstructionSet.AVX512_BF16, InstructionSet.AVX512):
        return None
    print("\nonce more with AVX2 only", flush=True)
    with tempfile.TemporaryDirectory(prefix="soma-lowered-") as folder:
        path = Path(folder) / "lowered.json"
        subprocess.run(
            [sys.executable, script, *arguments, "--json", str(path)],
            env={**os.environ, **lowered_environment()},
            check=True,
        )
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
