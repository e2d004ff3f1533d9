"""Which configuration keys a source reads: attribute chains are followed from a `Config` or a section of it.

`config.gate.audit`, `gate = config.gate; gate.audit`, `def f(gate: Gate): gate.audit` and `self._gate.audit`
read `gate.audit`; `reply.audit` reads nothing. Types are inferred file by file, from annotations and
assignments.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from pydantic import BaseModel

from soma_vllm.config import Config

Reads = set[tuple[type[BaseModel], str]]
"""(section, key) pairs."""

CONFIG_NAMES = frozenset({"config", "_config"})
"""Names that hold a `Config` wherever they are seen, as `parts.config` of another module."""


def unread(sources: Iterable[str], root: type[Config] = Config) -> list[str]:
    """Dotted keys of `root` that none of the sources reads."""
    found: Reads = set()
    for source in sources:
        found |= _File(ast.parse(source), root).reads()
    return [key for key, section, leaf in keys(root) if not _is_read(section, leaf, found)]


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """(dotted key, section, name) of every value below a model."""
    for name, section in sections(model).items():
        if section is None:
            yield f"{prefix}{name}", model, name
        else:
            yield from keys(section, f"{prefix}{name}.")


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """The fields of a model, each with the section it is; None for a value."""
    annotations = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        name: found if isinstance(found, type) and issubclass(found, BaseModel) else None
        for name, found in annotations.items()
    }


def _is_read(section: type[BaseModel], leaf: str, found: Reads) -> bool:
    """Read from its own section, or from a base that has it too, as `Engine` has the keys of both engines."""
    return any((base, leaf) in found for base in section.__mro__ if issubclass(base, BaseModel))


class _File:
    """What the names of one file hold."""

    def __init__(self, tree: ast.Module, root: type[Config]) -> None:
        self._tree = tree
        self._held: dict[str, set[type[BaseModel]]] = {name: {root} for name in CONFIG_NAMES}
        self._classes = _imported_sections(tree, root)
        self._returned: dict[str, set[type[BaseModel]]] = {}

    def reads(self) -> Reads:
        self._annotations()
        while self._assignments():
            pass
        return {
            (section, node.attr)
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Attribute)
            for section in self._types(node.value)
            if node.attr in section.model_fields
        }

    def _annotations(self) -> None:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.arg) and node.annotation is not None:
                self._hold(node.arg, self._named(node.annotation))
            elif isinstance(node, ast.AnnAssign):
                self._hold(_name(node.target), self._named(node.annotation))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
                self._returned[node.name] = self._named(node.returns)

    def _assignments(self) -> bool:
        """Whether anything new was learned."""
        learned = False
        for node in ast.walk(self._tree):
            if not isinstance(node, ast.Assign):
                continue
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for one, value in pairs:
                    learned |= self._hold(_name(one), self._types(value))
        return learned

    def _hold(self, name: str | None, types: set[type[BaseModel]]) -> bool:
        if name is None or types <= self._held.get(name, set()):
            return False
        self._held.setdefault(name, set()).update(types)
        return True

    def _types(self, node: ast.expr) -> set[type[BaseModel]]:
        """The sections that an expression may hold."""
        if isinstance(node, ast.Call):
            copied = isinstance(node.func, ast.Attribute) and node.func.attr in ("model_copy", "for_serving")
            return self._types(node.func.value) if copied else self._returned.get(_name(node.func) or "", set())
        if isinstance(node, ast.IfExp):
            return self._types(node.body) | self._types(node.orelse)
        found = set(self._held.get(_name(node) or "", ()))
        if isinstance(node, ast.Attribute):
            for owner in self._types(node.value):
                section = sections(owner).get(node.attr)
                found |= {section} if section is not None else set()
        return found

    def _named(self, annotation: ast.expr) -> set[type[BaseModel]]:
        names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
        return {self._classes[name] for name in names & self._classes.keys()}


def _imported_sections(tree: ast.Module, root: type[Config]) -> dict[str, type[BaseModel]]:
    """Names in this file of sections that it imports from the configuration."""
    import soma_vllm.config as package

    found: dict[str, type[BaseModel]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("soma_vllm.config"):
            for alias in node.names:
                section = root if alias.name == "Config" else getattr(package, alias.name, None)
                if isinstance(section, type) and issubclass(section, BaseModel):
                    found[alias.asname or alias.name] = section
    return found


def _name(node: ast.expr) -> str | None:
    """`gate` of a variable, `_gate` of `self._gate`."""
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None
