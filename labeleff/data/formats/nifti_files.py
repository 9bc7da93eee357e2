"""Reading NIfTI files: axes in the closest canonical orientation, the affine beside them."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from labeleff.data.formats import dicom_files
from labeleff.data.formats.base import check_memory
from labeleff.errors import DataError

SUFFIXES = (".nii", ".nii.gz")
_BROKEN = (OSError, EOFError, ValueError, OverflowError, MemoryError, HeaderDataError, zlib.error)
NEAR = 1e-3
"""How far affines of one image's files may differ, mm: headers hold them in several roundings."""


def is_nifti(path: Path) -> bool:
    """Return whether a file is read here, told by its name."""
    return path.name.lower().endswith(SUFFIXES)


def is_volume(path: Path) -> bool:
    """Return whether a file is read here: NIfTI, or a slice of a DICOM series, which stands for the series."""
    return is_nifti(path) or dicom_files.is_dicom(path)


def stem(path: Path) -> str:
    """Return the name of a NIfTI file without its suffix."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def opened(path: Path) -> Any:
    """Return nibabel's image. What it would log of a bad header comes as an error too."""
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        return nib.load(path)
    finally:
        logger.setLevel(level)


def load(path: Path, name: str, *, channels: bool = False, as_stored: bool = False) -> Any:
    """Return an opened NIfTI file in the closest canonical orientation; voxels are not read.

    Args:
        path: The file.
        name: The case it belongs to.
        channels: Take files with a fourth axis too.
        as_stored: Leave the axes as the file has them.

    Raises:
        DataError: It cannot be read, or has other axes.
    """
    if not is_nifti(path):
        try:
            return dicom_files.volume(path)
        except DataError as error:
            raise DataError(f"case {name!r}: {error}") from error
    try:
        image: Any = opened(path)
        sizes = [n for n in image.shape[3:] if n > 1]
        if len(image.shape) < 3 or len(sizes) > channels:
            axes = "volumes of 3 axes, or of 4 with the channels last," if channels else "volumes of 3 axes"
            raise DataError(f"case {name!r}: {path}: has {len(image.shape)} axes {image.shape}; {axes} are read")
        if 0 in image.shape:
            raise DataError(f"case {name!r}: {path}: has an axis of length 0 {image.shape}; repair or remove it")
        check_memory(math.prod(image.shape) * image.get_data_dtype().itemsize, f"case {name!r}: {path}")
        if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine)) < 1e-12:
            raise DataError(f"case {name!r}: {path}: the header's affine is no map to millimetres; repair it")
        return image if as_stored else nib.as_closest_canonical(image)
    except (*_BROKEN, ImageFileError) as error:
        raise DataError(f"case {name!r}: {path}: not a readable NIfTI file ({error})") from error


def voxels(path: Path, name: str) -> NDArray[Any]:
    """Return the voxels [x, y, z] of a NIfTI file in the closest canonical orientation.

    Raises:
        DataError: They cannot be read.
    """
    volume: NDArray[Any] = channel_voxels(path, name, channels=False)[0]
    return volume


def channel_voxels(path: Path, name: str, *, channels: bool = True, as_stored: bool = False) -> NDArray[Any]:
    """Return [C, x, y, z] of a NIfTI file whose fourth axis, where it has one, is the channels.

    Raises:
        DataError: They cannot be read.
    """
    image = load(path, name, channels=channels, as_stored=as_stored)
    try:
        found = np.asarray(image.dataobj)
    except DataError as error:  # of a slice
        raise DataError(f"case {name!r}: {error}") from error
    except _BROKEN as error:
        raise DataError(f"case {name!r}: {path}: the voxels cannot be read ({error})") from error
    if found.dtype.kind not in "iuf":
        raise DataError(f"case {name!r}: {path}: voxels of type {found.dtype}; whole or real numbers are read")
    return np.ascontiguousarray(np.moveaxis(found.reshape(*found.shape[:3], -1), -1, 0))


def header_of(path: Path, name: str) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
    """Return channels, (x, y, z) and spacing, mm, of a NIfTI file, from the header alone.

    Raises:
        DataError: It cannot be read.
    """
    image = load(path, name, channels=True)
    return int(np.prod(image.shape[3:], dtype=int)), tuple(image.shape[:3]), voxel_size(image)


def spacing_of(path: Path, name: str) -> tuple[float, ...]:
    """Return the voxel size in the closest canonical orientation, mm, from the header alone.

    Raises:
        DataError: It cannot be read.
    """
    return voxel_size(load(path, name, channels=True))


def voxel_size(image: Any) -> tuple[float, ...]:
    """Return the size of the voxels of nibabel's image, mm."""
    return tuple(round(float(z), 6) for z in image.header.get_zooms()[:3])


def affine_of(path: Path, name: str) -> NDArray[np.float64]:
    """Return the affine of a NIfTI file in the closest canonical orientation, from the header alone."""
    return np.asarray(load(path, name, channels=True).affine, np.float64)


def orientation_of(path: Path, name: str) -> tuple[str, float]:
    """Return how a NIfTI file is stored: codes of its axes such as LPS, ``none`` without a geometry, and its tilt, degrees.

    The tilt is the largest angle between an axis of the volume and the patient's axis next to it.

    Raises:
        DataError: It cannot be read.
    """
    load(path, name, channels=True)
    image: Any = nib.load(path)
    told = int(image.header.get("sform_code", 1)) or int(image.header.get("qform_code", 1))
    axes = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    tilt = float(np.degrees(np.arccos(np.clip(np.abs(axes).max(axis=0), 0, 1))).max())
    return "".join(nib.aff2axcodes(image.affine)) if told else "none", tilt


def check_sum(path: Path, name: str) -> None:
    """Read a compressed file to its end, where its checksum is; reading voxels stops before it.

    Raises:
        DataError: What is in the file is not what was written to it.
    """
    if not path.name.lower().endswith(".gz"):
        return
    try:
        with gzip.open(path) as file:
            while file.read(1 << 22):
                pass
    except _BROKEN as error:
        raise DataError(f"case {name!r}: {path}: damaged since it was written ({error})") from error


def label_on(path: Path, image: Path, name: str) -> NDArray[Any]:
    """Return the voxels [x, y, z] of a label that lies where an image does.

    Raises:
        DataError: It cannot be read, or lies elsewhere.
    """
    if not np.allclose(load(path, name).affine, load(image, name, channels=True).affine, atol=NEAR):
        raise DataError(
            f"case {name!r}: {path}: the label's geometry (affine) is not the image's; resample it to the image"
        )
    return voxels(path, name)
