"""The kit for a machine with a GPU keeps up with the package: what it names exists, what it runs is there.

No step is run here; `make gpu-rehearsal` does that.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import struct
import subprocess
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest
from gpu import keep_sm90  # type: ignore[import-not-found]
from gpu.collect import collected  # type: ignore[import-not-found]
from gpu.rehearsal.judge import wrong  # type: ignore[import-not-found]

from soma_vllm.config import load_config

ROOT = Path(__file__).parents[3]
KIT = ROOT / "benchmarks" / "gpu"
PYTHON = sorted(KIT.rglob("*.py"))
OTHERS = sorted(path for path in KIT.rglob("*") if path.suffix in {".sh", ".md", ".yaml"})
DOTTED = re.compile(r"soma_vllm(?:\.\w+)+")


def place(path: Path) -> str:
    return path.relative_to(KIT).as_posix()


def named(path: Path) -> set[str]:
    """Dotted names of the package in a file: what it imports, anywhere, and what its text mentions."""
    source = path.read_text(encoding="utf-8")
    names = set(DOTTED.findall(source))
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "soma_vllm":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def found(name: str) -> ModuleSpec | None:
    """The module of that name; nothing is imported on the way, heavy packages least of all."""
    package, _, last = name.rpartition(".")
    if not package:
        return importlib.util.find_spec(last)
    spec = found(package)
    if spec is None or spec.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, spec.submodule_search_locations)


def defined(module: ModuleSpec) -> set[str]:
    """Names at the top level of a module's source."""
    assert module.origin is not None
    names: set[str] = set()
    for node in ast.parse(Path(module.origin).read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name for alias in node.names}
            case ast.Assign() | ast.AnnAssign():
                names |= {
                    part.id
                    for part in ast.walk(node)
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
                }
    return names


def exists(name: str) -> bool:
    """Whether it is a module of the package, or a name that one of its modules defines."""
    package, _, attribute = name.rpartition(".")
    module = found(package)
    return found(name) is not None or (module is not None and attribute in defined(module))


@pytest.mark.parametrize("path", [*PYTHON, *OTHERS], ids=place)
def test_what_the_kit_names_of_the_package_exists(path: Path) -> None:
    missing = sorted(name for name in named(path) if not exists(name))
    assert not missing, f"benchmarks/gpu/{place(path)} names {missing}"


def test_the_check_finds_what_the_steps_rest_on() -> None:
    names = set().union(*(named(path) for path in PYTHON))
    assert {"soma_vllm.method.recipe.adapt", "soma_vllm.api.plugin"} <= names
    assert not exists("soma_vllm.method.no_such_module")
    assert not exists("soma_vllm.method.recipe.no_such_function")


@pytest.mark.parametrize("path", sorted(KIT.rglob("*.sh")), ids=place)
def test_a_shell_script_of_the_kit_parses(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_step_is_run_by_a_call_or_imported_by_one_that_is() -> None:
    steps = {path.stem: path.read_text(encoding="utf-8") for path in (KIT / "steps").glob("*.py")}
    calls = "".join((KIT / f"call{number}.sh").read_text(encoding="utf-8") for number in (1, 2))
    run = {Path(script).stem for script in re.findall(r"\w+\.py", calls)}
    assert run <= steps.keys()
    imported = {name for source in steps.values() for name in re.findall(r"^from (\w+) import", source, re.M)}
    assert steps.keys() - run - imported == set()


def test_the_configuration_of_the_served_pair_is_valid() -> None:
    models = [f"{key}=a-model" for key in ("original_model", "surrogate_model", "encoder.model")]
    config = load_config(KIT / "steps" / "cuda.yaml", models)
    assert (config.original.device, config.surrogate.device, config.training.device) == ("cuda",) * 3


SERVED = [
    {"step": "serve", "what": "ready", "good": True},
    {"step": "serve", "what": "dialogue", "phase": "SWITCHED", "with_adapter": 4, "failed": []},
    {"step": "serve", "what": "original restarted", "back_after_s": 3.0},
    {"step": "serve", "what": "stopped", "rc": 0, "left": []},
    {"step": "serve", "what": "ended", "rc": 0, "seconds": 60},
]


def test_a_rehearsal_in_which_all_went_well_has_nothing_wrong() -> None:
    assert wrong(SERVED) == []


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"good": False}),
        (1, {"with_adapter": 0}),
        (1, {"failed": ["503"]}),
        (2, {"back_after_s": None}),
        (3, {"left": ["a process"]}),
        (4, {"rc": 124}),
    ],
)
def test_a_rehearsal_is_wrong_where_one_figure_is(number: int, change: dict[str, object]) -> None:
    lines = [line | change if at == number else line for at, line in enumerate(SERVED)]
    assert len(wrong(lines)) == 1


def test_a_rehearsal_without_lines_is_wrong() -> None:
    assert wrong([])
    assert wrong([SERVED[4]])


def test_collected_lines_know_their_call_and_leave_out_what_was_cut(tmp_path: Path) -> None:
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    machine = {"step": "check", "what": "machine", "gpu": "a card", "packages": {"torch": "2"}}
    ended = {"step": "check", "what": "ended", "rc": 0, "seconds": 3}
    figure = {"step": "beside", "what": "alone", "gap_ms": 2.5}
    files[0].write_text(f"{json.dumps(machine)}\n{json.dumps(ended)}\n")
    files[1].write_text(f'{json.dumps(figure)}\n{{"step": "besi')
    assert collected(files) == {
        "card": "a card",
        "packages": {"torch": "2"},
        "ended": {"1.check": 0},
        "lines": [{"call": 2, **figure}],
    }


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    """An entry of a fat binary: a header of 64 bytes and its payload."""
    head = struct.pack("<HHIQ", kind, 0, 64, len(payload)).ljust(28, b"\0")
    return (head + struct.pack("<I", architecture)).ljust(64, b"\0") + payload


def test_only_code_for_hopper_is_left_of_a_library_and_nothing_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = (
        entry(2, 80, b"a" * 16) + entry(2, 90, b"wanted_0") + entry(2, 90, b"other_00") + entry(1, 90, b"p" * 8)
    )
    whole = b"before__" + struct.pack("<IHHQ", keep_sm90.MAGIC, 1, 16, len(entries)) + entries + b"behind__"
    library, kept = tmp_path / "library.so", tmp_path / "kept.so"
    library.write_bytes(whole)
    monkeypatch.setattr(keep_sm90, "fatbin_range", lambda path: (8, len(whole) - 8))
    keep_sm90.blank(library, kept, "wanted")
    expected = whole.replace(b"a" * 16, bytes(16)).replace(b"other_00", bytes(8)).replace(b"p" * 8, bytes(8))
    assert kept.read_bytes() == expected
