"""Generated chest radiographs: regions that overlap, as those of a projection do.

A patient is a pure function of (seed, patient). What lies behind one another adds up: lungs let light through, the heart lies
over a part of the left lung, the collarbones over the tops of both; ribs are there and nobody labels them. Space is measured in
units of half the image, [-1, 1] per axis in the order y, x; y points down, and the patient's right is on the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import derive_seed

CLASSES = ("background", "right lung", "left lung", "heart", "right collarbone", "left collarbone")
CHEST_VERSION = 1
RIBS = 7
_BODY, _LUNG, _HEART, _BONE, _RIB = 0.9, -0.62, 0.40, 0.30, 0.16


def generate(seed: int, patient: int, *, shape: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image and label [*shape] of one patient; bit r of the label is set where the region ``CLASSES[r + 1]`` is.

    Args:
        seed: Seed of the population.
        patient: Number of the patient.
        shape: (y, x).
    """
    rng = np.random.Generator(np.random.Philox(derive_seed("chest", CHEST_VERSION, seed, patient)))
    y, x = np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1 for n in shape], indexing="ij")
    angle, (high, wide) = rng.normal(0, 0.05), rng.normal(1, 0.07, 2)
    down, right = rng.normal(0, 0.04, 2)
    y, x = (y - down) / high, (x - right) / wide
    y, x = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
    y, x = y + _wave(rng, y, x), x + _wave(rng, y, x)

    body = np.exp(-np.maximum(np.abs(x) - 0.86, 0) * 30)
    image = _BODY * body
    regions = []
    for side in (-1, 1):  # the patient's right lung, the left one
        centre, radii = _jittered(rng, (0.0, 0.42 * side), 0.03), _scaled(rng, (0.68, 0.30), 0.10)
        lung = (np.abs((y - centre[0]) / radii[0]) ** 2.6 + np.abs((x - centre[1]) / radii[1]) ** 2.0) < 1
        lung &= y < centre[0] + 0.72 * radii[0] - 0.25 * np.abs(x - centre[1])  # the dome of the diaphragm
        image = image + _LUNG * rng.normal(1, 0.08) * lung
        regions.append(lung)
    centre, radii = _jittered(rng, (0.24, 0.14), 0.03), _scaled(rng, (0.30, 0.34), 0.12)
    heart = _turned(y - centre[0], x - centre[1], rng.normal(0.45, 0.12), radii) < 1
    image = image + _HEART * rng.normal(1, 0.12) * heart
    regions.append(heart)
    for side in (-1, 1):
        centre, radii = _jittered(rng, (-0.52, 0.44 * side), 0.025), _scaled(rng, (0.055, 0.36), 0.10)
        bone = _turned(y - centre[0], x - centre[1], side * rng.normal(0.22, 0.06), radii) < 1
        image = image + _BONE * rng.normal(1, 0.15) * bone
        regions.append(bone)
    spread = rng.normal(0.22, 0.01)
    for number in range(RIBS):
        middle = -0.62 + spread * number + rng.normal(0, 0.01)
        image = image + _RIB * body * (np.abs(y - middle - 0.30 * np.abs(x) ** 1.6) < 0.028)
    image = image + 0.35 * np.exp(-((x / 0.10) ** 2)) * body  # the spine
    image = image + 0.10 * _wave(rng, 3 * y, 3 * x, amplitude=1) + 0.06 * rng.standard_normal(image.shape)
    label = np.zeros(image.shape, np.uint8)
    for bit, region in enumerate(regions):
        label |= (region & (np.abs(x) < 0.92)).astype(np.uint8) << bit
    scaled = np.clip((image + 0.2) / 2.0, 0, 1) ** rng.normal(1, 0.1)
    return np.round(255 * scaled).astype(np.uint8), label


def _jittered(rng: np.random.Generator, centre: tuple[float, float], sd: float) -> NDArray[np.float64]:
    return np.asarray(centre) + rng.normal(0, sd, 2)


def _scaled(rng: np.random.Generator, radii: tuple[float, float], sd: float) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = np.asarray(radii) * np.exp(rng.normal(0, sd, 2))
    return scaled


def _turned(
    y: NDArray[np.float64], x: NDArray[np.float64], angle: float, radii: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the squared distance from the origin in units of the radii of an ellipse that is turned: below 1 is inside."""
    along, across = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
    distance: NDArray[np.float64] = (along / radii[0]) ** 2 + (across / radii[1]) ** 2
    return distance


def _wave(
    rng: np.random.Generator, y: NDArray[np.float64], x: NDArray[np.float64], *, amplitude: float = 0.03
) -> NDArray[np.float64]:
    """Return a smooth random field: a few plane waves of low frequency."""
    field = np.zeros_like(y)
    for _ in range(3):
        ky, kx = rng.normal(0, 1.8, 2)
        field += (
            rng.normal(0, amplitude / np.sqrt(3)) * np.sqrt(2) * np.sin(ky * y + kx * x + rng.uniform(0, 2 * np.pi))
        )
    return field
