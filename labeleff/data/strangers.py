"""Images that do not belong: what an unlabelled pool is contaminated with, made from the parts of the phantom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import derive_seed
from labeleff.data import phantom

Kind = Literal["site", "absent", "anatomy"]

SCANNER = phantom.Site(contrast=-0.6, noise=0.8, blur=1.0, bias=0.8, gamma=1.4)
"""None of the sites of the population: inverted, noisy, blurred."""

# centre (z, y, x), radii and grey value of organs that the population has not, and that nobody labels
_OTHER_ORGANS = (
    ((0.0, 0.45, 0.0), (0.5, 0.14, 0.55), 0.9),
    ((0.1, -0.40, -0.20), (0.4, 0.20, 0.20), 1.1),
    ((-0.1, -0.35, 0.35), (0.3, 0.24, 0.10), -0.9),
    ((0.0, 0.05, 0.0), (0.6, 0.12, 0.12), -1.2),
)


def generate(
    kind: Kind, seed: int, patient: int, *, shape: Sequence[int], height: float | None = None
) -> NDArray[np.uint8]:
    """Return an image [*shape], scaled as the population's are; a pure function of its arguments.

    Args:
        kind: ``site``: the same anatomy seen by an unknown scanner; ``absent``: the body without its organs; ``anatomy``:
            other organs in other places.
        seed: Seed of the population.
        patient: Number of the stranger.
        shape: (z, y, x) for a volume, (y, x) for a slice at ``height``.
        height: z of a slice, in [-1, 1].
    """
    rng = np.random.Generator(np.random.Philox(derive_seed("stranger", kind, seed, patient)))
    lengths = (1, *shape) if len(shape) == 2 else tuple(shape)
    axes = [(np.arange(n) + 0.5) / n * 2 - 1 for n in lengths]
    if len(shape) == 2:
        axes[0] = np.array([0.0 if height is None else height])
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    if kind == "site":
        label, signal = phantom._anatomy(rng, grid)
    else:
        label, signal = np.zeros(grid.shape[1:], np.uint8), _body(rng, grid, organs=kind == "anatomy")
    scanner = SCANNER if kind == "site" else phantom.SITES[0]
    key = (seed, patient, f"{kind} {height}")
    return phantom._appearance(rng, scanner, grid, label, signal, noise_key=key).reshape(shape)


def _body(rng: np.random.Generator, grid: phantom.Field, *, organs: bool) -> phantom.Field:
    """Return the noise-free intensity of a body with distractors, and perhaps with other organs."""
    scale, shift = rng.normal(1.0, 0.09, 3), rng.normal(0, 0.07, 3)
    moved = phantom._rotate((grid - shift.reshape(3, 1, 1, 1)) / scale.reshape(3, 1, 1, 1), rng.normal(0, 0.16))
    moved = moved + phantom._waves(rng, moved, amplitude=0.035, components=3)
    body = phantom._ellipsoid(moved, (0, 0, 0), (1.4, 0.74, 0.86))
    signal = np.where(body < 1, phantom._TISSUE, phantom._OUTSIDE).astype(np.float32)
    phantom._distractors(rng, moved, body, signal)
    for centre, radii, grey in _OTHER_ORGANS if organs else ():
        place, size = np.asarray(centre) + rng.normal(0, 0.045, 3), np.asarray(radii) * np.exp(rng.normal(0, 0.14, 3))
        signal[(phantom._ellipsoid(moved, place, size) < 1) & (body < 0.97)] = grey * rng.normal(1.0, 0.22)
    return signal
