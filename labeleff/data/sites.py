"""A second site of the phantom: patients of the same population, seen and built differently, made from its parts.

The source is the phantom itself, bit for bit. What sets the target apart is a :class:`Shift`, each part of which can be
switched off on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import derive_seed
from labeleff.data import phantom

GENERATOR_VERSION = 1


@dataclass(frozen=True)
class Shift:
    """What is different at another site; the defaults are no difference.

    Args:
        inverted: Classes that are dark where they were bright, or bright where they were dark.
        contrast: Factor of all contrasts within the body; negative: everything is inverted.
        gamma: Exponent of grey values on their scale of 0 … 1: above 1, what is dark becomes hard to tell apart.
        noise: Standard deviation of the noise, in the unit of the contrasts, which are about 0.9.
        blur: Standard deviation of the blur, voxels: a lower resolution on the same grid.
        organs: Factor of the radii of the organs.
    """

    inverted: tuple[str, ...] = ()
    contrast: float = 1.0
    gamma: float = phantom.SITES[0].gamma
    noise: float = phantom.SITES[0].noise
    blur: float = 0.0
    organs: float = 1.0


def generate(
    seed: int, patient: int, *, shape: Sequence[int], shift: Shift, height: float | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image and label [*shape] of a patient at another site, the image scaled as the phantom's are.

    Without any difference that is :func:`labeleff.data.phantom.generate`, bit for bit.

    Args:
        seed: Seed of the population.
        patient: Number of the patient.
        shape: (z, y, x) for a volume, (y, x) for a slice at ``height``.
        shift: What is different.
        height: z of a slice, in [-1, 1].
    """
    rng = np.random.Generator(np.random.Philox(derive_seed("phantom", phantom.GENERATOR_VERSION, seed, patient)))
    lengths = (1, *shape) if len(shape) == 2 else tuple(shape)
    axes = [(np.arange(n) + 0.5) / n * 2 - 1 for n in lengths]
    if len(shape) == 2:
        axes[0] = np.array([0.0 if height is None else height])
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    label, signal = _anatomy(rng, grid, shift)
    scanner = phantom.Site(shift.contrast, shift.noise, shift.blur, gamma=shift.gamma)
    key = (seed, patient, str(height))
    return phantom._appearance(rng, scanner, grid, label, signal, noise_key=key).reshape(shape), label.reshape(shape)


def _anatomy(rng: np.random.Generator, grid: phantom.Field, shift: Shift) -> tuple[NDArray[np.uint8], phantom.Field]:
    """Return label and noise-free intensity on a grid [3, z, y, x]: the phantom's draws in the phantom's order."""
    angle, scale = rng.normal(0, 0.16), rng.normal(1.0, 0.09, 3)
    moved = phantom._rotate((grid - rng.normal(0, 0.07, 3).reshape(3, 1, 1, 1)) / scale.reshape(3, 1, 1, 1), angle)
    moved = moved + phantom._waves(rng, moved, amplitude=0.035, components=3)
    body = phantom._ellipsoid(moved, (0, 0, 0), (1.4, 0.74, 0.86))
    label = np.zeros(grid.shape[1:], np.uint8)
    signal = np.where(body < 1, phantom._TISSUE, phantom._OUTSIDE).astype(np.float32)
    phantom._distractors(rng, moved, body, signal)
    for index, centres, radii in phantom._ORGANS:
        sign = -1 if phantom.CLASSES[index] in shift.inverted else 1
        grey = sign * phantom._CONTRAST[index] * rng.normal(1.0, 0.22)
        for centre in centres:
            place = np.asarray(centre) + rng.normal(0, 0.045, 3)
            size = shift.organs * np.asarray(radii) * np.exp(rng.normal(0, 0.14, 3))
            turned = phantom._rotate(moved - place.reshape(3, 1, 1, 1), rng.normal(0, 0.25))
            organ = phantom._ellipsoid(turned, (0, 0, 0), size)
            organ = organ + phantom._waves(rng, moved, amplitude=0.16, components=2)[0]
            inside = (organ < 1) & (body < 0.97)
            label[inside], signal[inside] = index, grey
    return label, signal
