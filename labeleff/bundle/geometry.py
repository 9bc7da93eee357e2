"""Where voxels of a stored case lie, and label files brought back onto them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case
from labeleff.errors import DataError
from labeleff.files import write_atomically
from labeleff.prepared import Prepared

TOLERANCE = 1e-3
"""Largest difference of an element of an affine, mm."""


def grid_of(data: Prepared, case: str) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Return shape (of three axes) and affine [4, 4] of a stored case: those of its image, on the grid it was resampled to.

    Axes of formats that tell no orientation are taken as they are stored; unknown spacing is 1. 2-D images have one slice.
    """
    store = data.store
    shape, original = store.shape(case), store.original_shape(case)
    affine = affine_of(data.dataset, data.manifest.case(case), len(original))
    factors = np.ones(3)
    factors[: len(shape)] = np.array(original) / np.array(shape)
    resampled = np.diag([*factors, 1.0])
    resampled[:3, 3] = (factors - 1) / 2  # voxel i of n covers as much as its share of the old ones
    three = (*shape, *[1] * (3 - len(shape)))
    return (three[0], three[1], three[2]), affine @ resampled


def affine_of(dataset: DataSet, case: Case, axes: int) -> NDArray[np.float64]:
    """Return the affine [4, 4] of a case as it is read; of formats that tell none, the spacing alone (unknown: 1)."""
    affine = dataset.affine(case)
    if affine is None:
        affine = np.diag([*(case.spacing or (1.0,) * axes), *[1.0] * (4 - axes)])
    return np.asarray(affine, np.float64)


def as_volume(array: NDArray[Any]) -> NDArray[Any]:
    """Return a 2-D map as a volume of one slice; a volume as it is."""
    return array[..., None] if array.ndim == 2 else array


def write_nifti(path: Path, array: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write voxels [x, y, z] with one affine in both forms, in their own type and unscaled; the same bytes every time."""
    image = nib.Nifti1Image(np.ascontiguousarray(array), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1, strip_shears=False) if _is_rigid(affine) else image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    write_atomically(path, gzip.compress(image.to_bytes(), mtime=0))


def _is_rigid(affine: NDArray[np.float64]) -> bool:
    """Return whether axes are at right angles, which is all that a qform can say."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.allclose(axes.T @ axes, np.eye(3), atol=1e-6))


def read_labels(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return voxels and affine of a label file, whole numbers whatever its type.

    Raises:
        DataError: It cannot be read, has more than three axes, or holds something else than whole numbers.
    """
    try:
        image = nib.load(path)
        array = np.asarray(image.dataobj)
    except (OSError, EOFError, ValueError, ImageFileError) as error:
        raise DataError(f"{path}: not a readable NIfTI file ({error})") from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    array = as_volume(array)
    if array.ndim != 3:
        raise DataError(f"{path}: has {array.ndim} axes; one label map of the case is needed")
    if not np.issubdtype(array.dtype, np.integer):
        whole = np.rint(array)
        if not np.isfinite(array).all() or not np.array_equal(whole, array):
            raise DataError(f"{path}: holds values that are no whole numbers; save it as a label map, not resampled")
        array = whole.astype(np.int64)
    return array, np.asarray(image.affine, float)


def onto(
    array: NDArray[Any], affine: NDArray[np.float64], shape: tuple[int, ...], wanted: NDArray[np.float64], where: str
) -> tuple[NDArray[Any], bool]:
    """Return a label map with its axes flipped and permuted to be on a grid, and whether that was needed.

    Raises:
        DataError: It lies on another grid; it is never resampled.
    """
    turn = ornt_transform(io_orientation(affine), io_orientation(wanted))
    turned = bool((turn != [[0, 1], [1, 1], [2, 1]]).any())
    if turned:
        affine = affine @ inv_ornt_aff(turn, array.shape)
        array = apply_orientation(array, turn)
    if array.shape != shape:
        raise DataError(
            f"{where}: has the shape {array.shape}, the image {shape}: it was resampled or cut; save labels in the geometry "
            "of the image"
        )
    if not np.allclose(affine, wanted, atol=TOLERANCE):
        raise DataError(
            f"{where}: its geometry is not the image's (the affines differ by up to {np.abs(affine - wanted).max():.3g} mm); "
            "save labels in the geometry of the image"
        )
    return array, turned
