"""Which parsers of vLLM's a model's folder asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from soma_vllm.config import Original
from soma_vllm.engines.vllm.parser_choice import (
    CALLS,
    DEFAULT_CALLS,
    THOUGHTS,
    parser_arguments,
    reasoning_parser_of,
    tool_parser_of,
)


def model(folder: Path, template: str, kind: str = "qwen2", beside: bool = True) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if beside:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


QWEN = "{%- for tool in tools %}...<tool_call>\n{...}\n</tool_call>"
R1 = "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("template", "parser"),
    [
        (QWEN, "hermes"),
        (QWEN + "<function=example>", "qwen3_coder"),
        ("<|python_tag|>", "llama3_json"),
        ("[TOOL_CALLS]", "mistral"),
        ("{{ messages }}", DEFAULT_CALLS),
    ],
)
def test_a_template_tells_how_tools_are_called(
    tmp_path: Path, template: str, parser: str, beside: bool
) -> None:
    assert tool_parser_of(model(tmp_path, template, beside=beside)) == parser


@pytest.mark.parametrize(
    ("template", "kind", "parser"),
    [
        (QWEN, "qwen2", None),
        ("{% if enable_thinking %}<think>", "qwen3", "qwen3"),
        (QWEN, "qwen3", None),
        (R1, "qwen2", "deepseek_r1"),
        ("<think>{{ old }}</think>{% if add_generation_prompt %}answer{% endif %}", "qwen2", None),
        ("<|channel|>", "gpt_oss", "openai_gptoss"),
    ],
)
def test_thoughts_are_parsed_where_the_model_thinks(
    tmp_path: Path, template: str, kind: str, parser: str | None
) -> None:
    assert reasoning_parser_of(model(tmp_path, template, kind)) == parser


def test_the_configuration_overrules_the_folder(tmp_path: Path) -> None:
    path = str(model(tmp_path, QWEN))
    assert parser_arguments(Original(), path) == ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    assert parser_arguments(Original(tool_parser="none"), path) == []
    named = Original(tool_parser="xlam", reasoning_parser="qwen3")
    assert parser_arguments(named, path) == [
        *("--enable-auto-tool-choice", "--tool-call-parser", "xlam"),
        *("--reasoning-parser", "qwen3"),
    ]


def test_a_folder_without_files_or_with_broken_ones_has_the_default(tmp_path: Path) -> None:
    assert tool_parser_of(tmp_path / "none") == DEFAULT_CALLS
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    (tmp_path / "config.json").write_text("{")
    assert (tool_parser_of(tmp_path), reasoning_parser_of(tmp_path)) == (DEFAULT_CALLS, None)


def test_every_choice_is_a_parser_of_vllms() -> None:
    tools = set(ToolParserManager.list_registered())
    assert {name for _, name in CALLS} | {DEFAULT_CALLS} <= tools
    assert {*THOUGHTS.values(), "deepseek_r1"} <= set(ReasoningParserManager.list_registered())
