"""Write configuration.md and metrics.md from the code: `make docs`.

Guarantees: configuration.md holds every key with its type, bounds, default and the words below it in its class;
metrics.md holds every Prometheus series of soma_vllm's own. The same code gives the same files, byte by byte.
tests/unit/house/test_reference.py fails where they are out of date.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import soma_vllm
from soma_vllm.config import Config

HERE = Path(__file__).parent
WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}
METERS = {"Counter", "Gauge", "Histogram"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

CONFIGURATION = """# Configuration

*Written by `make docs` from `soma_vllm/config/`; change it there.*

One YAML file, given by `--config`. `--set key=value` overrules it, such as `--set gate.accept_threshold=0.1`,
and may be repeated. Unknown keys are refused, and values are not converted between types. All mistakes are
reported together, before anything heavy starts; `soma-serve --config … --check` does no more than that.
[serving.md](serving.md) says what the keys are for, [paper_map.md](paper_map.md) which symbol of the paper is
which key. A dash stands where the source has no words beside the name.
"""
METRICS = """# Metrics

*Written by `make docs` from the code that registers them; change it there.*

`/metrics` has these series beside vLLM's own. Labels are closed sets: no series names a session, an adapter or
a tenant. A histogram has the series `…_bucket`, `…_sum` and `…_count`.
"""


def configuration() -> str:
    """The text of configuration.md."""
    return "\n".join([CONFIGURATION, *section(Config, "")]).rstrip() + "\n"


def section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A section's own keys, then its sections."""
    fields = {f"{prefix}{name}": (name, field) for name, field in model.model_fields.items()}
    nested = {path: field.annotation for path, (_, field) in fields.items() if is_model(field.annotation)}
    words = docstrings(model)
    yield f"## {f'`{prefix[:-1]}`' if prefix else 'At the top'}\n"
    yield one_line(inspect.getdoc(model) or "") + "\n"
    if len(fields) > len(nested):
        yield "| key | value | default | |\n|---|---|---|---|"
    for path, (name, field) in fields.items():
        if path not in nested:
            cells = (f"`{path}`", kind(field.annotation, field.metadata), f"`{shown(default(field))}`")
            yield "| " + " | ".join([*cells, one_line(words.get(name, "-")).replace("|", "\\|")]) + " |"
    yield ""
    for path, below in nested.items():
        yield from section(below, f"{path}.")


def is_model(annotation: Any) -> bool:
    """Whether a field is a section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field in the source, those of its bases too."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if cls is BaseModel or not issubclass(cls, BaseModel):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = below.value.value
    return found


def kind(annotation: Any, metadata: Any = ()) -> str:
    """A type in words, such as "integer ≥ 1 or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for one in arguments[1:] for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return kind(arguments[0], inner)
    if origin in (Union, UnionType):
        some = [kind(one, metadata) for one in arguments if one is not NoneType]
        return " or ".join([*some, "null"] if NoneType in arguments else some)
    if origin is Literal:
        return ", ".join(f"`{shown(one)}`" for one in arguments)
    if origin is tuple:
        return f"list of: {kind(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{shown(one)}`" for one in annotation)
    bounds = [
        f"{sign} {shown(getattr(one, name))}"
        for one in metadata
        for name, sign in BOUNDS.items()
        if getattr(one, name, None) is not None
    ]
    return f"{WORDS[annotation]} {' and '.join(bounds)}".rstrip()


def default(field: FieldInfo) -> Any:
    """What holds where a file does not say."""
    return field.get_default(call_default_factory=True)


def shown(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, Enum):
        return shown(value.value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, str) and re.fullmatch(r"\S(.*\S)?", value):
        return value
    if isinstance(value, float) and value.is_integer():
        return f"{value:.1f}"
    return json.dumps(value)


def one_line(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())


def metrics() -> str:
    """The text of metrics.md."""
    rows = sorted(row for module in Path(soma_vllm.__file__).parent.rglob("*.py") for row in series(module))
    return "\n".join([METRICS, "| series | type | labels | |\n|---|---|---|---|", *rows]) + "\n"


def series(module: Path) -> Iterator[str]:
    """A row for each series that a module registers. Read off its source, so that nothing heavy is loaded."""
    for call in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in METERS):
            continue
        if all(keyword.arg != "registry" for keyword in call.keywords):
            continue  # a Counter of the standard library
        name, words, *more = (ast.literal_eval(argument) for argument in call.args)
        shown_name = f"`{name}_total`" if call.func.id == "Counter" else f"`{name}`"
        labels = ", ".join(f"`{label}`" for label in (more[0] if more else ()))
        yield f"| {shown_name} | {call.func.id.lower()} | {labels} | {words} |"


def main() -> None:
    """Write both."""
    (HERE / "configuration.md").write_text(configuration(), encoding="utf-8")
    (HERE / "metrics.md").write_text(metrics(), encoding="utf-8")


if __name__ == "__main__":
    main()
