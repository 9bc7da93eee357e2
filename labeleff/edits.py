"""How labels change: edits a method makes itself, questions it asks, and what it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Author = Literal["given", "oracle", "person", "pseudo", "corrected"]


class Edit(NamedTuple):
    """A change to one case's labels, in voxels of the stored case.

    ``label`` is written at ``origin`` where ``mask`` is true (everywhere if None). IGNORE takes knowledge away.
    """

    case: str
    label: NDArray[np.uint8]  # [*box]
    author: Author
    origin: tuple[int, ...] | None = None  # None: the box is the whole case
    mask: NDArray[np.bool_] | None = None
    confidence: float = float("nan")
    note: str = ""


class Question(NamedTuple):
    """A box of voxels whose label an annotator asks a person, or the simulated oracle, for. It is clipped to the case."""

    case: str
    origin: tuple[int, ...]
    size: tuple[int, ...]
    score: float = 0.0
    note: str = ""


class Reviewed(NamedTuple):
    """What an annotator sees of one case. Never a label that nobody has given."""

    case: str
    probs: Tensor  # [T, K, *S] probabilities of T samples, float32, CPU
    label: NDArray[np.uint8]  # [*S] the current revision; IGNORE where nobody has said
    given: NDArray[np.uint8]  # [*S] as first given
    spacing: tuple[float, ...]  # mm; NaN where unknown
    features: Mapping[str, Tensor] = {}
    asked: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()  # origin and size of the boxes asked about before
    truth: NDArray[np.uint8] | None = None  # [*S], only for an annotator that owns up to it (Annotator.oracle)
