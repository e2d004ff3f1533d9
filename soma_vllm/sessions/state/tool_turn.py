"""Turns in which tools may be called: which of them can be checked, and under which tools they stood.

Guarantee: pure; descriptions do not count, so that a tool whose description names the date stays the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from soma_vllm.sessions.state.answer_print import as_json
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.turn import Turn
from soma_vllm.types import Role


def may_call(fields: Mapping[str, Any]) -> bool:
    """Whether a request, or a turn's `fields`, lets the model call tools."""
    return bool(fields.get("tools")) and fields.get("tool_choice") != "none"


def tools_print(tools: object) -> str:
    """Digest of the functions that a request declares: their names and parameters, in any order."""
    listed = tools if isinstance(tools, list | tuple) else [tools]
    functions = [tool.get("function", tool) if isinstance(tool, Mapping) else tool for tool in listed]
    declared = [
        as_json([f.get("name"), _undescribed(f.get("parameters"))] if isinstance(f, Mapping) else f)
        for f in functions
    ]
    return hashlib.sha256("\n".join(sorted(declared)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def checkable_turns(session: Session) -> tuple[Turn, ...]:
    """Turns of the present warm start that the original answered whole, and might have answered with calls."""
    return tuple(turn for turn in session.turns[session.warm_from :] if _checkable(turn))


def _checkable(turn: Turn) -> bool:
    whole = turn.complete and turn.kept and turn.stored and not turn.begun
    said = bool(turn.calls or turn.answer.strip())
    return turn.engine is Role.ORIGINAL and whole and said and may_call(turn.fields)


def _undescribed(schema: Any) -> Any:
    """A schema without descriptions; a property of that name has a schema, no text."""
    if isinstance(schema, Mapping):
        kept = (item for item in schema.items() if item[0] != "description" or not isinstance(item[1], str))
        return {name: _undescribed(value) for name, value in kept}
    return [_undescribed(one) for one in schema] if isinstance(schema, list) else schema
