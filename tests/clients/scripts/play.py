"""What every script here does: a question a line in, the client's answer as a line of JSON out, until the end.

The server is in BASE_URL, the key in API_KEY. What libraries print goes to stderr, so that stdout holds answers
alone.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

BASE_URL = os.environ["BASE_URL"]
KEY = os.environ["API_KEY"]
MAX_TOKENS = 16

_answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def seen(headers: Mapping[str, str]) -> dict[str, str]:
    """What a reply's headers say, for clients that show them."""
    return {"session": headers["x-soma-session"], "engine": headers["x-soma-engine"]}


def play(say: Callable[[str], dict[str, Any]]) -> None:
    """Answer every line; `say` gives `text`, and what else it was shown."""
    for line in sys.stdin:
        print(json.dumps(say(line.rstrip("\n"))), file=_answers, flush=True)
