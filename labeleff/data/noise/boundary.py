"""Boundaries drawn in the wrong place: by a distance, by size, moved, blurred, bent, jittered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import CubicSpline
from torch.nn.functional import interpolate

from labeleff.data.noise.base import NEVER, Change, Effect, Mask, NoiseModel, Organ
from labeleff.registry import register

REFERENCE_AREA = 1000.0
MARGIN = 32


def roughness_field(organ: Organ, amplitude: float) -> NDArray[np.float64]:
    """Return a smooth random field [*S] within ± half of ``amplitude`` in-plane voxels, mm.

    It orders voxels of equal distance, so that a boundary can move by less than a voxel and is not a perfect level set.
    """
    shape, voxel = organ.mask.shape, min(organ.lengths)
    if not amplitude:
        return np.zeros(shape)
    sigma = [0.0 if length == NEVER else 2.0 for length in organ.lengths]
    noise = ndimage.gaussian_filter(organ.rng("roughness").standard_normal(shape), sigma, mode="wrap")
    return np.asarray(np.clip(noise / (3 * noise.std()), -1, 1) * amplitude * voxel / 2)


@register("noise", "distance")
@dataclass(frozen=True, kw_only=True)
class Distance(NoiseModel):
    """Dilation or erosion by a distance: {distance to the mask < L}, or {distance to the outside >= L}.

    The "DE" noise of Yao et al., ICLR 2023, and GSD-Net, which draw L in voxels; here in mm, on anisotropic grids too.

    Args:
        level: L of a case is drawn evenly between these, mm.
        roughness: Voxels by which the boundary is unsteady. 0: exact level sets, as the authors draw them; targets are
            then met only as nearly as whole layers of voxels allow.
    """

    level: tuple[float, float] = (2.0, 4.0)
    roughness: float = 1.0

    def strength(self, organ: Organ) -> float:
        """Return L, mm, the same draw for all classes of a case."""
        low, high = self.level
        return float(low + (high - low) * organ.rng("level", of_case=True).random())

    def effect(self, organ: Organ) -> Effect:
        """Return the mask grown or shrunk by a distance in mm."""
        inside = organ.mask if not organ.over else ~organ.mask
        distance = ndimage.distance_transform_edt(inside, sampling=organ.lengths)
        rough = np.asarray(distance) + roughness_field(organ, self.roughness)
        if organ.over:
            return lambda s: Change(organ.mask | (rough < s))
        return lambda s: Change(organ.mask & (rough >= s))


@register("noise", "area_normalised")
@dataclass(frozen=True, kw_only=True)
class AreaNormalised(NoiseModel):
    """ADELE's noise on SegTHOR: every slice of an organ is eroded or dilated n times as if its area were 1000 pixels.

    So the relative damage is the same for small and large organs (Liu et al., CVPR 2022, authors' code): the mask is
    resized by sqrt(1000 / area), cubic, thresholded above 0, processed n times by a 3 x 3 square, and resized back.

    With a target the same is done for a real n on the original grid, by chessboard distance in units of
    sqrt(area / 1000). Authors' parity: no target, ``order: [1, 3, 4, 2]`` on SegTHOR.

    Args:
        times: Numbers n that a slice draws from.
        roughness: With a target: voxels by which the boundary is unsteady.
    """

    times: tuple[int, ...] = (2, 3, 4)
    roughness: float = 1.0

    def strength(self, organ: Organ) -> float:  # noqa: ARG002
        """Return nothing of use: slices draw n for themselves."""
        return 1.0

    def effect(self, organ: Organ) -> Effect:
        """Return the masks of the authors' procedure, or of its real-valued form where there is a target."""
        if self.target_dice is None:
            change = self._authors(organ)
            return lambda s: change if s else Change(organ.mask)
        spread = np.zeros(organ.mask.shape)
        masks, out = organ.slices(organ.mask), organ.slices(spread)
        for mask, target in zip(masks, out, strict=True):
            if mask.any():
                distance = ndimage.distance_transform_cdt(~mask if organ.over else mask, metric="chessboard")
                target[...] = distance / np.sqrt(mask.sum() / REFERENCE_AREA)
            else:
                target[...] = np.inf
        voxel = min(organ.lengths)
        areas = np.sqrt(np.maximum(masks.sum((1, 2)), 1) / REFERENCE_AREA)
        shape = [1] * organ.mask.ndim
        if organ.mask.ndim == 3:
            shape[organ.slice_axis] = -1
        rough = spread + roughness_field(organ, self.roughness) / voxel / areas.reshape(shape)
        if organ.over:
            return lambda s: Change(organ.mask | (rough <= s))
        return lambda s: Change(organ.mask & (rough > s))

    def _authors(self, organ: Organ) -> Change:
        """Return the authors' change: over or under and n are drawn per slice, the direction by ``over``."""
        modes, counts = organ.rng("modes", of_case=True), organ.rng("times", of_case=True)
        new, erase = organ.mask.copy(), np.zeros_like(organ.mask)
        slices = zip(organ.slices(organ.mask), organ.slices(new), organ.slices(erase), strict=True)
        for mask, target, gone in slices:
            over, times = modes.random() < self.over, int(counts.choice(self.times))
            if not mask.any():
                continue
            found = _normalised(mask, times, over)
            target[...] = (mask | found) if over else (mask & found)
            if not over:
                gone[...] = mask != found  # where cubic resizing overshoots, neighbours are erased too
        return Change(new, erase=erase, free=True)


def _normalised(mask: Mask, times: int, over: bool) -> Mask:
    """Return a slice's mask eroded or dilated as if it had 1000 pixels."""
    factor = np.sqrt(REFERENCE_AREA / mask.sum())
    shape = [max(1, round(n * factor)) for n in mask.shape]
    small = _resized(mask, shape)
    process = ndimage.binary_dilation if over else ndimage.binary_erosion
    return _resized(np.asarray(process(small, np.ones((3, 3), bool), iterations=times)), list(mask.shape))


def _resized(mask: Mask, shape: list[int]) -> Mask:
    image = torch.from_numpy(np.ascontiguousarray(mask)).float()[None, None]
    resized = interpolate(image, size=shape, mode="bicubic", align_corners=False)
    return np.asarray((resized[0, 0] > 0).numpy())


@register("noise", "markov")
@dataclass(frozen=True, kw_only=True)
class Markov(NoiseModel):
    """Markov boundary noise: T steps, each of which flips some voxels of the outer or of the inner boundary.

    Yao et al., "Learning to Segment from Noisy Annotations: A Spatial Correction Approach", ICLR 2023. In every step the
    outer boundary (background that touches the mask) is taken with probability ``theta1``, else the inner one, and each
    of its voxels is flipped with probability ``theta2``; in the end every voxel is flipped with probability ``theta3``,
    the mask is smoothed and cut at one half. Where structures are drawn too small, ``theta1`` means the inner boundary.
    What T does depends on size and resolution, so prefer a target.

    Args:
        steps: T.
        theta1: Probability of the boundary of the case's direction. JSRT 0.8, BraTS 0.7.
        theta2: Probability that a boundary voxel is flipped.
        theta3: Probability that any voxel is flipped in the end. JSRT 0.2, BraTS 0.
        smooth: Standard deviation of the last smoothing, voxels; 0: 2 in slices and 1 in volumes, as the authors.
    """

    steps: int = 80
    theta1: float = 0.8
    theta2: float = 0.05
    theta3: float = 0.0
    smooth: float = 0.0
    first_try: ClassVar[float] = 40.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= p <= 1 for p in (self.theta1, self.theta2, self.theta3)) or self.steps < 0:
            raise ValueError("theta1, theta2 and theta3 are probabilities, steps is 0 or more")

    def strength(self, organ: Organ) -> float:  # noqa: ARG002
        """Return T."""
        return float(self.steps)

    def effect(self, organ: Organ) -> Effect:
        """Return the mask after so many steps; earlier states are kept, so that a search walks the chain once."""
        crop = _box(organ.mask, MARGIN)
        flat = self.in_plane or organ.mask.ndim == 2
        sigma = self.smooth or (2.0 if flat else 1.0)
        sigmas = [sigma if not self.in_plane or a in organ.plane else 0.0 for a in range(organ.mask.ndim)]
        cross = ndimage.generate_binary_structure(organ.mask.ndim, 1)
        if self.in_plane and organ.mask.ndim == 3:
            index: list[Any] = [slice(None)] * 3
            index[organ.slice_axis] = [0, 2]
            cross[tuple(index)] = False
        rng = organ.rng("chain")
        flips = organ.rng("flips").random(organ.mask[crop].shape) < self.theta3
        states = [organ.mask[crop].copy()]
        outer_share = self.theta1 if organ.over else 1 - self.theta1

        def after(steps: int) -> Change:
            while len(states) <= steps:
                states.append(self._step(states[-1], cross, rng, outer_share))
            if not steps:
                return Change(organ.mask)
            new = organ.mask.copy()
            blurred = ndimage.gaussian_filter((states[steps] ^ flips).astype(np.float32), sigmas, truncate=2 / sigma)
            new[crop] = blurred > 0.5
            return Change(new)

        return lambda s: after(round(min(s, 4000.0)))

    def _step(self, mask: Mask, cross: Mask, rng: np.random.Generator, outer_share: float) -> Mask:
        if rng.random() < outer_share:
            edge = ndimage.binary_dilation(mask, cross) & ~mask
        else:
            edge = mask & ~ndimage.binary_erosion(mask, cross, border_value=1)
        where = np.flatnonzero(edge)
        new = mask.copy()
        new.flat[where[rng.random(len(where)) < self.theta2]] ^= True
        return new


def _box(mask: Mask, margin: int) -> tuple[slice, ...]:
    """Return the bounding box of a mask with a margin."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(slice(max(0, b.start - margin), min(n, b.stop + margin)) for b, n in zip(box, mask.shape, strict=True))


@register("noise", "affine")
@dataclass(frozen=True, kw_only=True)
class Affine(NoiseModel):
    """A structure turned about its centre and shifted, within the slices of a volume, as by a careless registration.

    One draw for all classes of a case; with a target, angle and shift of each class are scaled together.

    Args:
        rotate: Largest angle, degrees; drawn evenly to either side.
        shift: Longest shift, mm; its direction is drawn evenly.
    """

    rotate: float = 15.0
    shift: float = 6.0
    directed: ClassVar[bool] = False

    def strength(self, organ: Organ) -> float:  # noqa: ARG002
        """Return 1: the drawn angle and shift as they are."""
        return 1.0

    def effect(self, organ: Organ) -> Effect:
        """Return the mask moved by multiples of the drawn angle and shift."""
        draw = organ.rng("motion", of_case=True)
        angle = np.deg2rad(self.rotate) * draw.uniform(-1, 1)
        direction, length = draw.uniform(0, 2 * np.pi), self.shift * draw.uniform(0.5, 1)
        first, second = organ.plane
        sizes = np.asarray(organ.lengths)
        centre = np.asarray(ndimage.center_of_mass(organ.mask))
        grid = np.indices(organ.mask.shape, dtype=np.float64)

        def moved(s: float) -> Change:
            if not s:
                return Change(organ.mask)
            turn = min(abs(s * angle), np.pi) * np.sign(angle)
            y = (grid[first] - centre[first]) * sizes[first] - s * length * np.sin(direction)
            x = (grid[second] - centre[second]) * sizes[second] - s * length * np.cos(direction)
            source = grid.copy()
            source[first] = centre[first] + (np.cos(turn) * y + np.sin(turn) * x) / sizes[first]
            source[second] = centre[second] + (np.cos(turn) * x - np.sin(turn) * y) / sizes[second]
            return Change(_sampled(organ.mask, source))

        return moved


def _sampled(mask: Mask, source: NDArray[np.float64]) -> Mask:
    """Return a mask read at other places, nearest neighbour; outside is background."""
    return np.asarray(ndimage.map_coordinates(mask.astype(np.uint8), source, order=0, cval=0).astype(bool))


@register("noise", "elastic")
@dataclass(frozen=True, kw_only=True)
class Elastic(NoiseModel):
    """The label bent by a smooth random displacement, the image not; one field for all classes of a case.

    Args:
        amplitude: Longest displacement, mm.
        grid: Distance of the control points, voxels, each displaced evenly at random.
        smooth: Standard deviation of the smoothing between them, voxels.
    """

    amplitude: float = 4.0
    grid: int = 12
    smooth: float = 4.0
    directed: ClassVar[bool] = False
    first_try: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid < 2 or self.smooth <= 0:
            raise ValueError("grid is at least 2 voxels, smooth is above 0")

    def strength(self, organ: Organ) -> float:  # noqa: ARG002
        """Return the amplitude, mm."""
        return self.amplitude

    def effect(self, organ: Organ) -> Effect:
        """Return the mask displaced by a field of so many mm."""
        rng, shape = organ.rng("field", of_case=True), organ.mask.shape
        coarse = [max(2, -(-n // self.grid) + 1) for n in shape]
        grid = np.indices(shape, dtype=np.float64)
        at = grid * ((np.asarray(coarse) - 1) / np.maximum(np.asarray(shape) - 1, 1)).reshape(-1, *[1] * len(shape))
        field = np.zeros_like(grid)
        for axis in organ.plane if self.in_plane else range(len(shape)):
            drawn = ndimage.map_coordinates(rng.uniform(-1, 1, coarse), at, order=1)
            field[axis] = ndimage.gaussian_filter(drawn, self.smooth)
        longest = np.sqrt((field**2).sum(0)).max()
        field /= longest * np.asarray(organ.lengths).reshape(-1, *[1] * len(shape))
        return lambda s: Change(_sampled(organ.mask, grid + s * field) if s else organ.mask)


@register("noise", "contour")
@dataclass(frozen=True, kw_only=True)
class Contour(NoiseModel):
    """Contours drawn with an unsteady hand, slice by slice: the boundary is moved along its normal by a random spline.

    Around the centre of a slice's mask the displacement is a periodic cubic spline through normal draws at a number of
    angles; from slice to slice the draws follow an autoregression, since annotators copy the slice before. Where a target cannot
    be met, since a structure has no room to grow, the draws are mirrored.

    Args:
        sigma: Standard deviation of the displacement, mm.
        points: Control points around a contour.
        correlation: Of the draws of neighbouring slices, in [0, 1).
        bias: Mean displacement in the case's direction, in units of sigma; 0: unbiased.
    """

    sigma: float = 2.0
    points: int = 12
    correlation: float = 0.7
    bias: float = 0.0
    first_try: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points < 3 or not 0 <= self.correlation < 1:
            raise ValueError("points is at least 3, correlation in [0, 1)")

    def strength(self, organ: Organ) -> float:  # noqa: ARG002
        """Return sigma, mm."""
        return self.sigma

    def effect(self, organ: Organ) -> Effect:
        """Return the mask whose contours are moved by so many mm times the drawn splines."""
        signed, moved = np.full(organ.mask.shape, np.inf), np.zeros(organ.mask.shape)
        side = 1 if organ.over else -1
        rng, lengths = organ.rng("knots"), [organ.lengths[a] for a in organ.plane]
        half, knots = min(lengths) / 2, rng.standard_normal(self.points)
        planes = zip(organ.slices(organ.mask), organ.slices(signed), organ.slices(moved), strict=True)
        for mask, distance, displacement in planes:
            fresh = rng.standard_normal(self.points)
            knots = self.correlation * knots + np.sqrt(1 - self.correlation**2) * fresh
            if mask.any():
                out = ndimage.distance_transform_edt(~mask, sampling=lengths)
                distance[...] = np.where(
                    mask, half - ndimage.distance_transform_edt(mask, sampling=lengths), out - half
                )
                displacement[...] = side * (_around(mask, lengths, knots) + self.bias)
        return lambda s: Change(signed < s * moved)


def _around(mask: Mask, lengths: list[float], knots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return, for every pixel of a slice, the periodic spline through knots at its angle about the mask's centre."""
    centre = ndimage.center_of_mass(mask)
    y, x = (
        (axis - c) * n for axis, c, n in zip(np.indices(mask.shape, dtype=np.float64), centre, lengths, strict=True)
    )
    angles = np.linspace(0, 2 * np.pi, len(knots) + 1)
    spline = CubicSpline(angles, [*knots, knots[0]], bc_type="periodic")
    return np.asarray(spline(np.arctan2(y, x) % (2 * np.pi)))
