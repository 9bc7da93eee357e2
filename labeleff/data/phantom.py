"""Phantoms: generated patients with a consistent anatomy, the data set that travels with the package.

A patient is a pure function of (seed, patient, site). Three organs keep their relative position, size and shape while
all of them vary from patient to patient; contrast is low against texture and noise; distractors have the intensity of
an organ where no organ is, so that position, and not grey value alone, tells them apart. Few labels are really too few.
Space is measured in units of half the field of view, [-1, 1] per axis in the order z, y, x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import derive_seed

Field = NDArray[np.floating[Any]]

CLASSES = ("background", "large", "paired", "small")
GENERATOR_VERSION = 1

# centre (z, y, x) and radii of each organ; the paired one is mirrored in x
_ORGANS = (
    (1, ((0.02, -0.12, 0.30),), (0.62, 0.30, 0.34)),
    (2, ((-0.02, 0.34, -0.36), (-0.02, 0.34, 0.36)), (0.52, 0.20, 0.18)),
    (3, ((0.05, 0.02, -0.26),), (0.46, 0.18, 0.20)),
)
_TISSUE, _OUTSIDE = 0.0, -2.2
_CONTRAST = {1: 0.95, 2: 0.90, 3: -0.90}


@dataclass(frozen=True)
class Site:
    """How a scanner sees the same anatomy."""

    contrast: float = 1.0
    noise: float = 0.35
    blur: float = 0.0
    bias: float = 0.35
    gamma: float = 1.0


SITES = (
    Site(),
    Site(contrast=0.75, noise=0.65, bias=0.6, gamma=0.85),
    Site(contrast=1.25, noise=0.35, blur=0.7, bias=0.3, gamma=1.2),
    Site(contrast=-0.9, noise=0.5, blur=0.4, bias=0.5),
)


def generate(
    seed: int, patient: int, *, shape: Sequence[int], site: int = 0, height: float | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image and label [*shape] of one patient, the image scaled to 0 … 255.

    Args:
        seed: Seed of the population.
        patient: Number of the patient.
        shape: (z, y, x) for a volume, (y, x) for a slice at ``height``.
        site: Scanner, an index into :data:`SITES`.
        height: z of a slice, in [-1, 1].
    """
    rng = np.random.Generator(np.random.Philox(derive_seed("phantom", GENERATOR_VERSION, seed, patient)))
    lengths = (1, *shape) if len(shape) == 2 else tuple(shape)
    axes = [(np.arange(n) + 0.5) / n * 2 - 1 for n in lengths]
    if len(shape) == 2:
        axes[0] = np.array([0.0 if height is None else height])
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    label, signal = _anatomy(rng, grid)
    image = _appearance(rng, SITES[site % len(SITES)], grid, label, signal, noise_key=(seed, patient, str(height)))
    return image.reshape(shape), label.reshape(shape)


def _anatomy(rng: np.random.Generator, grid: Field) -> tuple[NDArray[np.uint8], Field]:
    """Return the label and the noise-free intensity of a patient on a grid [3, z, y, x]."""
    angle, scale = rng.normal(0, 0.16), rng.normal(1.0, 0.09, 3)
    shift = rng.normal(0, 0.07, 3)
    moved = _rotate((grid - shift.reshape(3, 1, 1, 1)) / scale.reshape(3, 1, 1, 1), angle)
    moved = moved + _waves(rng, moved, amplitude=0.035, components=3)
    body = _ellipsoid(moved, (0, 0, 0), (1.4, 0.74, 0.86))
    label = np.zeros(grid.shape[1:], np.uint8)
    signal = np.where(body < 1, _TISSUE, _OUTSIDE).astype(np.float32)
    _distractors(rng, moved, body, signal)
    for index, centres, radii in _ORGANS:
        grey = _CONTRAST[index] * rng.normal(1.0, 0.22)
        for centre in centres:
            place = np.asarray(centre) + rng.normal(0, 0.045, 3)
            size = np.asarray(radii) * np.exp(rng.normal(0, 0.14, 3))
            organ = _ellipsoid(_rotate(moved - place.reshape(3, 1, 1, 1), rng.normal(0, 0.25)), (0, 0, 0), size)
            organ = organ + _waves(rng, moved, amplitude=0.16, components=2)[0]
            inside = (organ < 1) & (body < 0.97)
            label[inside], signal[inside] = index, grey
    return label, signal


def _distractors(rng: np.random.Generator, grid: Field, body: Field, signal: Field) -> None:
    """Put blobs with the intensity of organs anywhere into the body; organs are painted over them."""
    for _ in range(rng.integers(6, 11)):
        centre = rng.uniform((-0.8, -0.6, -0.7), (0.8, 0.6, 0.7))
        radii = rng.uniform(0.09, 0.24, 3)
        grey = _CONTRAST[int(rng.integers(1, 4))] * rng.normal(1.0, 0.22)
        signal[(_ellipsoid(grid, centre, radii) < 1) & (body < 0.97)] = grey


def _appearance(
    rng: np.random.Generator,
    site: Site,
    grid: Field,
    label: NDArray[np.uint8],
    signal: Field,
    *,
    noise_key: tuple[int, int, str],
) -> NDArray[np.uint8]:
    """Return what a scanner sees: texture, bias field, blur and noise over the signal."""
    from scipy import ndimage

    inside = signal > (_TISSUE + _OUTSIDE) / 2
    texture = sum(_waves(rng, grid * f, amplitude=0.22, components=4)[0] for f in (3.0, 7.0))
    image = np.where(inside, site.contrast * signal + texture * (1 + 0.5 * (label == 1)), signal)
    image = image + site.bias * _waves(rng, grid, amplitude=1.0, components=2)[0]
    if site.blur:
        image = ndimage.gaussian_filter(image, [0 if n == 1 else site.blur for n in image.shape])
    grain = np.random.Generator(np.random.Philox(derive_seed("phantom-noise", *noise_key)))
    image = image + site.noise * grain.standard_normal(image.shape)
    # fixed window, so that grey values mean the same in every image of a site
    scaled = np.clip((image + 4.0) / 8.0, 0, 1) ** site.gamma
    return np.round(scaled * 255).astype(np.uint8)


def _ellipsoid(
    grid: Field,
    centre: Sequence[float] | Field,
    radii: Sequence[float] | Field,
) -> Field:
    """Return the squared distance from a centre in units of the radii: below 1 is inside."""
    offset = grid - np.asarray(centre, np.float32).reshape(3, 1, 1, 1)
    return np.asarray(((offset / np.asarray(radii, np.float32).reshape(3, 1, 1, 1)) ** 2).sum(0))


def _rotate(grid: Field, angle: float) -> Field:
    """Rotate in the (y, x) plane."""
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.stack([grid[0], cosine * grid[1] - sine * grid[2], sine * grid[1] + cosine * grid[2]])


def _waves(rng: np.random.Generator, grid: Field, *, amplitude: float, components: int) -> Field:
    """Return a smooth random vector field [3, z, y, x]: a few plane waves of low frequency."""
    field = np.zeros_like(grid)
    for _ in range(components):
        direction = rng.normal(0, 1.6, (3, 3)).astype(np.float32)
        phase = rng.uniform(0, 2 * np.pi, 3).astype(np.float32)
        strength = (rng.normal(0, amplitude, 3) / np.sqrt(components)).astype(np.float32)
        for axis in range(3):
            wave = np.tensordot(direction[axis], grid, 1) + phase[axis]
            field[axis] += strength[axis] * np.sqrt(np.float32(2)) * np.sin(wave)
    return field
