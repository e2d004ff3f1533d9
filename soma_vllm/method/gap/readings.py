"""What a sentence encoder makes of a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Reading:
    """The vector of one text, and those of its tokens."""

    vector: npt.NDArray[np.float32]
    """(d,) unit vector; zeros for text without words."""
    spans: tuple[tuple[int, int], ...] = ()
    """(n,) characters of each token: first, and one past the last."""
    tokens: npt.NDArray[np.float32] | None = None
    """(n, d) unit vectors of the tokens in their context; None for text without words."""
