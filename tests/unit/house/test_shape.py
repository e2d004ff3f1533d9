"""The measures that keep the package easy to enter: short files, few parameters, one name for one place."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import soma_vllm

PACKAGE = Path(soma_vllm.__file__).parent
BENCHMARKS = PACKAGE.parent / "benchmarks"
MOST_LINES = 350
MOST_PARAMETERS = 6
MOST_BODY_LINES = 60
"""Of a function, without its signature: a command takes a line or more for each option."""


def modules(*roots: Path) -> list[Path]:
    return sorted(path for root in roots for path in root.rglob("*.py"))


def place(module: Path) -> str:
    return module.relative_to(PACKAGE.parent).as_posix()


def functions(module: Path) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(qualified name, definition) of every function and method of a module."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    found.append((name, child))
                visit(child, f"{name}.")

    visit(ast.parse(module.read_text(encoding="utf-8")), "")
    return found


@pytest.mark.parametrize("module", modules(PACKAGE, BENCHMARKS), ids=place)
def test_no_file_is_longer_than_a_reader_holds_in_mind(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", modules(PACKAGE), ids=place)
def test_no_constructor_takes_more_than_six_parameters(module: Path) -> None:
    for name, function in functions(module):
        if name.endswith(".__init__"):
            arguments = function.args
            count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - 1
            assert count <= MOST_PARAMETERS, f"{name} takes {count}"


@pytest.mark.parametrize("module", modules(PACKAGE), ids=place)
def test_no_function_is_longer_than_a_screen(module: Path) -> None:
    for name, function in functions(module):
        assert function.end_lineno is not None
        lines = function.end_lineno - function.body[0].lineno + 1
        assert lines <= MOST_BODY_LINES, f"{name} has {lines} lines"


def test_no_two_files_share_a_base_name() -> None:
    counts = Counter(path.name for path in modules(PACKAGE) if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []
