"""`python -m soma_vllm.engines.vllm.argument_check`: vLLM's own reading of command lines, in its own process.

Reads a JSON object of argument lists by role from stdin, and writes one of what is wrong with each, null where
nothing is. vLLM's parser ends its process where an argument is wrong, and its import takes some ten seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence


def objection(arguments: Sequence[str]) -> str | None:
    """Why vLLM would refuse a command line; None where it would not."""
    from soma_vllm.engines.vllm.internals import parse_arguments, validate_api_server_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            validate_api_server_args(parse_arguments(arguments))
    except SystemExit:
        last = said.getvalue().strip().rpartition("\n")[2]
        return last.partition("error: ")[2] or last or "an argument that ends vLLM"
    except Exception as error:  # whatever vLLM's validation raises is a refusal
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    """Check the command lines on stdin."""
    print(json.dumps({role: objection(arguments) for role, arguments in json.load(sys.stdin).items()}))


if __name__ == "__main__":
    main()
