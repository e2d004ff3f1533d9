"""The import rule of the house, enforced."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import soma_vllm

PACKAGE = Path(soma_vllm.__file__).parent

FOUNDATION = frozenset(
    {"errors", "types", "documents", "config", "versions", "machine", "logs", "supervised", "private"}
)
STATE = FOUNDATION | {"sessions.state"}
SERVING = STATE | {"sessions", "adapters", "engines", "method", "models", "training", "adaptation"}
SERVER = SERVING | {"scheduler", "maintenance", "api", "baselines", "telemetry"}
BELOW: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "versions": frozenset(),
    "private": frozenset(),
    "logs": frozenset({"private"}),
    "supervised": frozenset(),
    "machine": frozenset({"errors"}),
    "types": frozenset({"errors"}),
    "documents": frozenset({"errors"}),
    "config": frozenset({"errors", "types", "documents", "private"}),
    "sessions.state": FOUNDATION,
    "sessions": STATE,
    "adapters": STATE,
    "method": STATE,
    "models": STATE,
    "engines": STATE | {"adapters"},
    "training": STATE | {"method"},
    "adaptation": SERVING - {"adaptation"},
    "scheduler": SERVING,
    "maintenance": SERVING,
    "baselines": SERVING | {"scheduler"},
    "telemetry": SERVING,
    "api": SERVING | {"scheduler", "maintenance"},
    "app": SERVER,
    "tools": SERVER | {"app"},
    "cli": SERVER | {"app", "tools"},
}
"""The rooms, and which others each may import. A room in a room, as `sessions.state`, has a line of its own."""

HEAVY = {
    "ray": {"training"},
    "vllm": {"engines", "method/chat_prompt.py"},
    "torch": {"method", "engines", "models", "tools/replay/probe.py"},
    "transformers": {"method", "models"},
    "peft": {"method"},
    "fastapi": {"api"},
    "sqlalchemy": {"sessions/sql"},
    "alembic": {"sessions/sql"},
    "matplotlib": {"tools"},
    "llmlingua": {"baselines"},
    "routellm": {"baselines"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(module: Path) -> set[str]:
    """Dotted names a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def place(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def room_of(dotted: str) -> str:
    """The room of a name below the package: the longest that has a line in the table."""
    parts = dotted.split(".")
    inner = ".".join(parts[:2])
    return inner if inner in BELOW else parts[0]


def room(module: Path) -> str:
    return room_of(place(module).removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize("module", modules(), ids=place)
def test_a_room_imports_only_itself_and_the_rooms_below_it(module: Path) -> None:
    if room(module) == "__init__":
        return
    ours = {
        room_of(name.removeprefix("soma_vllm.")) for name in imported(module) if name.startswith("soma_vllm.")
    }
    strangers = ours - {room(module)} - BELOW[room(module)]
    assert not strangers, f"{place(module)} imports {sorted(strangers)}"


@pytest.mark.parametrize("module", modules(), ids=place)
def test_heavy_packages_stay_in_the_rooms_that_own_them(module: Path) -> None:
    for package in {name.split(".")[0] for name in imported(module)} & HEAVY.keys():
        owned = any(Path(place(module)).is_relative_to(owner) for owner in HEAVY[package])
        assert owned, f"{place(module)} imports {package}"


@pytest.mark.parametrize("module", modules(), ids=place)
def test_vllm_is_touched_in_the_guarded_modules_only(module: Path) -> None:
    touches = any(name.split(".")[0] == "vllm" for name in imported(module))
    assert not touches or place(module).startswith(("engines/vllm/", "method/chat_prompt.py"))


@pytest.mark.parametrize("module", modules(), ids=place)
def test_every_module_says_in_its_first_lines_what_it_is(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), place(module)


LIGHT = ("scheduler", "sessions", "adapters", "adaptation", "maintenance", "telemetry", "config")
"""Rooms that load none of the packages below."""
LOADED_LATE = ("torch", "ray", "vllm", "transformers", "peft", "fastapi", "matplotlib")


def test_importing_the_light_rooms_loads_nothing_heavy() -> None:
    names = [
        f"soma_vllm.{place(module).removesuffix('.py').replace('/', '.').removesuffix('.__init__')}"
        for module in modules()
        if (place(module).split("/")[0] in LIGHT or "/" not in place(module))
        and place(module)
        not in ("__init__.py", "sessions/sql/migrations/env.py")  # which Alembic alone can load
    ]
    assert len(names) > 60  # the table's rooms are found
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {names!r}];"
        f"print([name for name in {LOADED_LATE!r} if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
