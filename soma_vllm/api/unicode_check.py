"""Refuses bodies that hold half a surrogate pair: JSON can spell it, and no tokenizer, store or encoder reads
it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from soma_vllm.errors import BadRequest


def require_unicode(body: Mapping[str, Any]) -> None:
    """Check every text of a JSON object, its keys included.

    Raises:
        BadRequest: one is not Unicode text, or lies too deep to be read; names the field that it stands in.
    """
    for name, value in body.items():
        param = name.encode("ascii", "backslashreplace").decode()[:100]
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except RecursionError:
            raise BadRequest(f"{param}: found too many levels; expected fewer", param) from None
        except UnicodeEncodeError:
            raise BadRequest(f"{param}: found half a surrogate pair; expected Unicode text", param) from None
