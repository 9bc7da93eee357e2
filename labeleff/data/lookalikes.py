"""Images that are copies of one another although their files differ: mirrored, saved again, resized, cropped.

Images are compared by the correlation of their structure: reduced, the slow changes of brightness taken away, so that
two hearts that lie in the same place do not count as one. Measured on left atrium, ACDC and nuclei: images of different people
reach 0.6, 0.52 and 0.34, frames of one person from 0.83 on, copies 0.93 and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

COPY = 0.93
"""Correlation from which two images are the same one."""
ALIKE = 0.4
"""Correlation from which two images deserve a look: perhaps scans of one person, or neighbouring slices."""
SIDE: Mapping[int, int] = {2: 48, 3: 24}
"""Length of an axis of reduced images, about, by the number of axes."""
SMALLEST_CROP = 0.2
"""Share of an image that a crop has at least to be looked for."""
MOST = 4000
"""Images from which pairs are too many to be compared."""
_BLUR = 1.5
_CANDIDATE = 0.5
_WORK = 2e10
_FRAME = 0.1
"""Correlation of the middle pair from which images share something that is no sign of copies; 0.06 for hearts, 0 for nuclei."""
_FEW = 8
_TEMPLATE: Mapping[int, int] = {2: 64, 3: 24}
Field = NDArray[np.float32]


@dataclass(frozen=True)
class Match:
    """Two images that look alike.

    Args:
        one: A case.
        two: A later case; where ``how`` is ``a crop of``, the smaller one.
        score: Correlation of their structure.
        how: ``""`` as they are, ``mirrored``, ``turned``, or ``a crop of``.
    """

    one: str
    two: str
    score: float
    how: str = ""

    @property
    def is_copy(self) -> bool:
        """They are the same image, not two that look alike."""
        return self.score >= COPY


def factors_for(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return by how much images are reduced along each axis, so that the usual one comes to about :data:`SIDE`."""
    middle = np.median(np.array(shapes), axis=0)
    side = SIDE[len(middle)]
    return tuple(max(1, round(float(n) / side)) for n in middle)


def reduced(image: NDArray[np.generic], factors: Sequence[int]) -> Field:
    """Return the mean of blocks, *factors voxels each, of an image [C, *S], channels averaged.

    What is left over beside whole blocks is cut from both ends, so that a mirrored image gives a mirrored result.
    """
    grey = np.asarray(image, np.float32).mean(axis=0)
    factors = [min(f, n) for f, n in zip(factors, grey.shape, strict=True)]
    cut = tuple(slice((n % f) // 2, (n % f) // 2 + n - n % f) for n, f in zip(grey.shape, factors, strict=True))
    blocks = [part for n, f in zip(grey[cut].shape, factors, strict=True) for part in (n // f, f)]
    within = tuple(range(1, 2 * grey.ndim, 2))
    return np.asarray(grey[cut].reshape(blocks).mean(axis=within, dtype=np.float32))


def matches(
    images: Mapping[str, Field],
    *,
    factors: Sequence[int],
    full: Callable[[str], NDArray[np.generic]],
    apart: Callable[[str, str], bool],
) -> tuple[list[Match], str]:
    """Return pairs of images that look alike, the most alike first, and what was not looked for.

    Args:
        images: Reduced images by case, of 2 or 3 axes, all with the same factors.
        factors: These factors.
        full: Reads the image [C, *S] of a case; asked for few, where a crop has to be made sure of.
        apart: Whether a pair of cases is worth knowing about, such as one that two roles share.
    """
    names = [name for name, image in images.items() if float(np.ptp(image)) > 0]
    if len(names) < 2 or len(names) > MOST:
        return [], too_many(len(names))
    side = (SIDE[len(factors)],) * len(factors)
    grids = np.stack([_structure(_resized(images[name], side)) for name in names])
    framed = _frame(grids) > _FRAME
    found = {(match.one, match.two): match for match in _whole(names, grids, apart, framed=framed)}
    if framed:
        unsaid = "crops were not looked for: all images share a frame, such as the fan of an ultrasound"
        return sorted(found.values(), key=lambda match: (-match.score, match.one, match.two)), unsaid
    pairs = [(m.one, m.two) for m in found.values() if m.how == "" and not m.is_copy]  # perhaps cropped by a few voxels
    more, unsaid = _parts(names, images, apart)
    fine = {
        n: images[n] - ndimage.gaussian_filter(images[n], _BLUR) for n in {n for pair in [*pairs, *more] for n in pair}
    }
    for one, two in dict.fromkeys([*pairs, *more]):
        big, small = (one, two) if images[one].size >= images[two].size else (two, one)
        place = _best_place(fine[big], fine[small])
        if place is None and (one, two) not in pairs:
            continue
        score, how = _made_sure(full(big), full(small), place, factors)
        if score >= COPY:
            found.pop((big, small), None)
            found.pop((small, big), None)
            found[big, small] = Match(big, small, score, how)
    return sorted(found.values(), key=lambda match: (-match.score, match.one, match.two)), unsaid


def too_many(count: int) -> str:
    """Return what is said where images are too many to be compared in pairs; nothing where they are not."""
    return f"copies whose files differ were not looked for: {count} images, more than {MOST}" if count > MOST else ""


def _structure(image: Field) -> Field:
    """Return an image without its slow changes of brightness, of mean 0 and norm 1; all 0 where nothing is left."""
    fine = image - ndimage.gaussian_filter(image, _BLUR)
    fine -= fine.mean()
    norm = float(np.linalg.norm(fine))
    return (fine / norm if norm > 1e-6 * (1 + float(np.abs(image).max())) else np.zeros_like(fine)).astype(np.float32)


def _frame(grids: Field) -> float:
    """Return the correlation of the middle pair: of what all images share; copies are too few to show in it."""
    flat = grids.reshape(len(grids), -1)
    return float(np.median((flat @ flat.T)[np.triu_indices(len(flat), 1)])) if len(flat) > 2 else 0.0


def _whole(names: list[str], grids: Field, apart: Callable[[str, str], bool], *, framed: bool) -> Iterator[Match]:
    """Yield pairs whose whole images look alike, on a grid that is the same for all."""
    flat = grids.reshape(len(names), -1)
    best = np.full((len(names),) * 2, -1.0, np.float32)
    which = np.zeros(best.shape, np.int8)
    moved = list(_mirrors(grids.ndim - 1))
    for number, (_, move) in enumerate(moved):
        found = flat @ np.stack([move(grid) for grid in grids]).reshape(len(names), -1).T
        better = found > best
        best[better], which[better] = found[better], number
    total = grids.sum(axis=0)
    for i, j in zip(*np.nonzero(np.triu(best, 1) >= ALIKE), strict=True):
        if not apart(names[i], names[j]):
            continue
        how, move = moved[which[i, j]]
        score = float(best[i, j])
        if framed:
            score = _without_frame(grids[i], grids[j], total, len(names), move)
        if score >= ALIKE:
            yield Match(names[i], names[j], score, how)


def _without_frame(one: Field, two: Field, total: Field, count: int, move: Callable[[Field], Field]) -> float:
    """Return how alike two images are beside what all of them share: the fan of an ultrasound, the rim of a fundus.

    Of very few images nobody can tell what is shared; then they are alike, and no copies.
    """
    if count < _FEW:
        return min(COPY - 0.01, float((one * move(two)).sum()))
    frame: Field = ((total - one - two) / (count - 2)).astype(np.float32)
    frame = np.asarray(
        (frame + move(frame)) / 2, np.float32
    )  # the same for both, or the chance in it would count as a difference
    first, second = one - frame, move(two) - frame
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / norm if norm > 0 else 0.0


def _resized(image: Field, side: tuple[int, ...]) -> Field:
    scale = [n / own for n, own in zip(side, image.shape, strict=True)]
    return np.asarray(ndimage.zoom(image, scale, order=1, grid_mode=True, mode="nearest"), np.float32)


def _mirrors(axes: int) -> Iterator[tuple[str, Callable[[Field], Field]]]:
    """Yield the ways to mirror an image, and in 2-D to turn it by right angles, the image as it is first."""
    for flipped in product((False, True), repeat=axes):
        along = tuple(axis for axis, is_flipped in enumerate(flipped) if is_flipped)
        yield "mirrored" if along else "", lambda image, along=along: np.flip(image, along)  # type: ignore[misc]
    if axes == 2:
        for along in ((), (0,), (1,), (0, 1)):
            yield "turned", lambda image, along=along: np.flip(image.T, along)  # type: ignore[misc]


def _parts(
    names: list[str], images: Mapping[str, Field], apart: Callable[[str, str], bool]
) -> tuple[list[tuple[str, str]], str]:
    """Return pairs of which one image may be a part of the other by their sizes."""
    pairs, work = [], 0.0
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            big, small = (one, two) if images[one].size >= images[two].size else (two, one)
            room = [n - m for n, m in zip(images[big].shape, images[small].shape, strict=True)]
            if min(room) < 0 or not any(room) or images[small].size < SMALLEST_CROP * images[big].size:
                continue
            if apart(one, two):
                pairs.append((big, small))
                work += float(np.prod([n + 1.0 for n in room])) * images[small].size
    return (pairs, "") if work <= _WORK else ([], "crops were not looked for: too many images of different sizes")


def _best_place(big: Field, small: Field) -> tuple[int, ...] | None:
    """Return where the structure of a reduced image fits best into that of another, in blocks; None where nowhere."""
    if any(n < m for n, m in zip(big.shape, small.shape, strict=True)):
        return None
    margin = [2 if n > 8 else 0 for n in small.shape]  # there the blur knows nothing of what was cut off
    inner, reach = (
        image[tuple(slice(m, n - m) for m, n in zip(margin, image.shape, strict=True))] for image in (small, big)
    )
    score = _correlation(reach, inner)
    place = np.unravel_index(int(score.argmax()), score.shape)
    return tuple(int(p) for p in place) if score[place] >= _CANDIDATE else None


def _correlation(big: Field, small: Field) -> Field:
    """Return the correlation of an image with every part of another one that has its size."""
    parts = np.lib.stride_tricks.sliding_window_view(big, small.shape)
    axes = "abc"[: big.ndim]
    common = np.einsum(f"...{axes},{axes}->...", parts, small)
    energy = np.square(big, dtype=np.float64)
    for axis, length in enumerate(small.shape):  # sums over windows, one axis after the other
        sums = np.concatenate([np.zeros_like(energy.take([0], axis)), energy.cumsum(axis)], axis)
        count = sums.shape[axis]
        energy = sums.take(range(length, count), axis) - sums.take(range(count - length), axis)
    norm = np.sqrt(np.maximum(energy * np.square(small, dtype=np.float64).sum(), 0))
    return np.asarray(np.where(norm > 1e-12, common / np.maximum(norm, 1e-12), 0.0), np.float32)


def _made_sure(
    big: NDArray[np.generic], small: NDArray[np.generic], place: tuple[int, ...] | None, factors: Sequence[int]
) -> tuple[float, str]:
    """Return the correlation, voxel by voxel, of two images where they were seen to fit, and what the smaller one then is.

    Without a place only whether they are the same one in two sizes.
    """
    one, two = (np.asarray(image, np.float32).mean(axis=0) for image in (big, small))
    score = _about(one, two, place, factors) if place is not None else 0.0
    if one.shape == two.shape:
        return score, ""
    scale = [n / m for n, m in zip(one.shape, two.shape, strict=True)]
    blurred = np.asarray(ndimage.gaussian_filter(one, [max(0.0, (k - 1) / 2) for k in scale]), np.float32)
    resized = _about(_resized(blurred, two.shape), two, (0,) * two.ndim, factors)
    return (resized, "") if resized > score else (score, "a crop of")


def _about(one: Field, two: Field, place: tuple[int, ...], factors: Sequence[int]) -> float:
    """Return the correlation of the middle of an image with another one near a place, blocks from its start."""
    one, two = (
        np.asarray(
            ndimage.gaussian_filter(x, 0.7) - ndimage.gaussian_filter(x, [_BLUR * f for f in factors]), np.float32
        )
        for x in (one, two)
    )
    longest = _TEMPLATE[two.ndim]
    length = [min(n, longest, max(4, n - 2 * round(_BLUR * f))) for n, f in zip(two.shape, factors, strict=True)]
    start = [(n - m) // 2 for n, m in zip(two.shape, length, strict=True)]
    template = two[tuple(slice(s, s + n) for s, n in zip(start, length, strict=True))]
    near = []
    for n, m, s, p, f in zip(one.shape, length, start, place, factors, strict=True):
        if m > n:
            return 0.0
        first = min(max(0, p * f + s - 2 * f), n - m)
        near.append(slice(first, min(n, first + m + 4 * f)))
    return float(_correlation(one[tuple(near)], template).max())
