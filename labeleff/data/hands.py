"""Generated raters: people who each draw the organs of a phantom with borders of their own.

Apart from the generator of phantoms, which is frozen so that results can name its hash.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from labeleff.batch import derive_seed
from labeleff.data.phantom import GENERATOR_VERSION, _waves


def drawn_by(rater: int, label: NDArray[np.uint8], *key: int | str) -> NDArray[np.uint8]:
    """Return a label [*S] as one of several people draws it: its borders moved by a smooth field, 4 % of a half field of view.

    Args:
        rater: Number of the person.
        label: The true label.
        key: What else the drawing is a function of.
    """
    rng = np.random.Generator(np.random.Philox(derive_seed("phantom-rater", GENERATOR_VERSION, rater, *key)))
    lengths = (1, *label.shape) if label.ndim == 2 else label.shape
    grid = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n * 2 - 1 for n in lengths), indexing="ij")).astype(np.float32)
    moved = grid + _waves(rng, grid * 4, amplitude=0.04, components=4)
    voxels = (moved + 1) / 2 * np.reshape(lengths, (3, 1, 1, 1)) - 0.5
    drawn: NDArray[np.uint8] = ndimage.map_coordinates(label.reshape(lengths), voxels, order=0, mode="nearest")
    return drawn.reshape(label.shape)
