"""Which of vLLM's parsers a model needs for calls of tools and for thoughts, told by its folder.

Guarantees: nothing here imports vLLM, and nothing fails on a folder without the files it reads; the same folder
gives the same choice. Markers are those of the chat templates that vLLM's parsers were written for
(`vllm.tool_parsers`, `vllm.reasoning`, vLLM 0.32); the first that is found decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from soma_vllm.config import Engine

CALLS = (
    ("[TOOL_CALLS]", "mistral"),
    ("<|channel|>", "openai"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<seed:tool_call>", "seed_oss"),
    ("<longcat_tool_call>", "longcat"),
    ("<start_function_call>", "functiongemma"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "deepseek_v3"),
    ("functools", "phi4_mini_json"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary of argument name', "llama3_json"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
)
"""What a chat template writes of calls, and the parser that reads it."""

DEFAULT_CALLS = "hermes"
"""Where the template says nothing of tools. It leaves text without its mark as it is."""

THOUGHTS = {
    "gpt_oss": "openai_gptoss",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_5": "qwen3",
    "qwen3_next": "qwen3",
    "glm4_moe": "glm45",
    "minimax_m2": "minimax_m2",
    "seed_oss": "seed_oss",
    "deepseek_v3": "deepseek_v3",
}
"""Of architectures whose models think, where the template says that this one does."""

OPENED = ("<think>", "<|channel|>", "<seed:think>")
"""Marks with which thoughts begin in a template."""


def parser_arguments(engine: Engine, model_path: str) -> list[str]:
    """Arguments of `vllm serve` for both parsers, as configured or as the model's folder tells."""
    tools, thoughts = engine.tool_parser, engine.reasoning_parser
    tools = tool_parser_of(Path(model_path)) if tools == "auto" else tools
    found = reasoning_parser_of(Path(model_path)) if thoughts == "auto" else thoughts
    arguments = [] if tools == "none" else ["--enable-auto-tool-choice", "--tool-call-parser", tools]
    return arguments if found in (None, "none") else [*arguments, "--reasoning-parser", str(found)]


def tool_parser_of(folder: Path) -> str:
    """The name of the parser for a model's calls of tools."""
    template = chat_template(folder)
    return next((name for mark, name in CALLS if mark in template), DEFAULT_CALLS)


def reasoning_parser_of(folder: Path) -> str | None:
    """The name of the parser for a model's thoughts; None for one that does not think."""
    template = chat_template(folder)
    if not any(mark in template for mark in OPENED):
        return None
    kind = _read(folder / "config.json").get("model_type")
    if isinstance(kind, str) and kind in THOUGHTS:
        return THOUGHTS[kind]
    # A template that opens the thoughts itself belongs to a model that always thinks, as DeepSeek-R1 does.
    _, _, opening = template.rpartition("add_generation_prompt")
    return "deepseek_r1" if "<think>" in opening and "</think>" not in opening else None


def chat_template(folder: Path) -> str:
    """The text of a model's chat template; empty without one. Of several, all of them."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        found = _read(folder / "tokenizer_config.json").get("chat_template")
    named = found if isinstance(found, list) else [{"template": found}]
    return "\n".join(str(one.get("template") or "") for one in named if isinstance(one, dict))


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
