"""docs/configuration.md and docs/metrics.md: what the code says, all of it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector
from pydantic import BaseModel

import soma_vllm.telemetry as telemetry
from soma_vllm.config import Config

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generator, which is a script."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys of a configuration, dotted."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("name", ["configuration", "metrics"])
def test_a_generated_document_is_up_to_date(generate: ModuleType, name: str) -> None:
    written = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert written == getattr(generate, name)(), f"docs/{name}.md is out of date: run make docs"


def test_every_key_has_one_row(generate: ModuleType) -> None:
    rows = [line for line in generate.configuration().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(
        keys(Config), key=[r.split("`")[1] for r in rows].index
    )
    assert {row.count("|") - row.count("\\|") for row in rows} == {5}


def test_a_row_gives_type_bounds_default_and_the_words_of_the_source(generate: ModuleType) -> None:
    text = generate.configuration()
    row = "| `warm_window` | integer ≥ 1 and ≤ 64 | `4` | W: turns the original answers before the session may"
    assert row in text
    assert "| `lora.top_layers` | integer > 0 or null | `null` | " in text
    assert "| `original.block_size` | `16`, `32`, `64`, `128` | `32` | " in text
    assert "| `adaptation.candidates` | list of: `plain`, `adapter`, `original` | `[plain, adapter]` | " in text


class Registry(CollectorRegistry):
    """Remembers what is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.collectors: list[Any] = []

    def register(self, collector: Collector) -> None:
        super().register(collector)
        self.collectors.append(collector)


def registered() -> Iterator[str]:
    """The rows of what the classes of `soma_vllm.telemetry` register."""
    for found in pkgutil.iter_modules(telemetry.__path__):
        module = importlib.import_module(f"{telemetry.__name__}.{found.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and list(inspect.signature(cls).parameters) == ["registry"]:
                registry = Registry()
                cls(registry=registry)
                yield from (row(collector) for collector in registry.collectors)


def row(collector: Any) -> str:
    """What the document says of a series."""
    (family,) = collector.describe()
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = ", ".join(f"`{label}`" for label in collector._labelnames)
    return f"| `{name}` | {family.type} | {labels} | {family.documentation} |"


def test_the_series_are_those_that_are_registered(generate: ModuleType) -> None:
    rows = [line for line in generate.metrics().splitlines() if line.startswith("| `")]
    live = set(registered())
    assert any(
        one.startswith("| `soma_turns_total` | counter | `engine`, `phase`, `adapter` |") for one in live
    )
    assert live <= set(rows)
    (other,) = set(rows) - live
    assert other == "| `soma_refusals_total` | counter | `reason` | Refused requests by reason. |"
    assert len({one.split("`")[1] for one in rows}) == len(rows)
