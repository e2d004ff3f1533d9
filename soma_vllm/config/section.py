"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number_as_text(value: object) -> object:
    """A number that stands where text is meant, such as `cpu_cores: 0`."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_number_as_text)]
"""Text, which YAML may have taken for a number."""
Positive = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Base of every section: frozen, closed to unknown keys, strict about types (an int passes for a float)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
