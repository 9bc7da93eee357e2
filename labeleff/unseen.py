"""Images that no run has seen: which files they are made of, read and prepared as those of a run were, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from labeleff.data.formats import dicom_files, nifti_files
from labeleff.data.formats.base import check_memory
from labeleff.data.formats.dicom import named_series
from labeleff.data.formats.nifti_files import NEAR
from labeleff.data.manifest import read_manifest
from labeleff.data.store import CHUNK, as_stored, clipped, resampled
from labeleff.errors import DataError
from labeleff.files import write_aside
from labeleff.predictor import Processing

VOLUMES = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
LOSSLESS = (".png", ".tif", ".tiff")
UNUSUAL = 1.5
"""Voxels so many times larger or smaller than any in training are worth a word."""


def ending_of(path: Path, known: Sequence[str]) -> str:
    """Return with which of some endings a file's name ends; with none: an empty text."""
    return next((suffix for suffix in known if path.name.lower().endswith(suffix)), "")


def images_of(
    source: Path, target: Path, processing: Processing, endings: Sequence[str]
) -> list[tuple[tuple[Path, ...], Path]]:
    """Return the files of every image and where its label map goes; a slice of a DICOM series stands for the series.

    Raises:
        DataError: There is nothing to predict, or label maps would be one file.
    """
    series = _series(source) if processing.axes == 3 else {}
    if series:
        return [((first,), target / f"{name}.nii.gz") for name, first in series.items()]
    return list(pairs_of(source, target, processing, endings))


def pairs_of(
    source: Path, target: Path, processing: Processing, endings: Sequence[str]
) -> Iterator[tuple[tuple[Path, ...], Path]]:
    """Yield the files of an image and where its label map goes."""
    known = VOLUMES if processing.axes == 3 else PICTURES
    ending = ".nii.gz" if processing.axes == 3 else ".png"
    if source.suffix == ".json":
        yield from _listed(source, target, processing, known, ending)
        return
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.is_file() and ending_of(path, known))
        if not files:
            raise DataError(f"{source}: no files of the kinds {', '.join(known)} in it")
        if target.resolve() == source.resolve():
            raise DataError(f"{target}: is the folder of the images; give another one")
    elif not source.is_file() or not ending_of(source, known):
        raise DataError(f"{source}: not a file of the kinds {', '.join(known)}, nor a folder of them, nor a manifest")
    elif ending_of(target, VOLUMES if processing.axes == 3 else LOSSLESS):
        if target.resolve() == source.resolve():
            raise DataError(f"{target}: is the image itself; give another name")
        yield (source,), target
        return
    else:
        files = [source]
    seen: dict[str, Path] = {}
    for name, parts in _grouped(files, known, processing.channels if source.is_dir() else 1, endings):
        if name in seen:
            raise DataError(f"{parts[0]}: has the same name as {seen[name].name}; their label maps would be one file")
        seen[name] = parts[0]
        yield parts, target / f"{name}{ending}"


def _series(source: Path) -> dict[str, Path]:
    """Return a slice of every DICOM series of a folder, which stands for it, by the names of their cases."""
    if not source.is_dir() or any(ending_of(path, VOLUMES) for path in source.iterdir()):
        return {}
    if not dicom_files.holds_dicom(source):
        return {}
    return {name: min(one.path for one in slices) for name, slices in named_series(source, []).items()}


def _listed(
    source: Path, target: Path, processing: Processing, known: Sequence[str], ending: str
) -> Iterator[tuple[tuple[Path, ...], Path]]:
    """Yield the cases of a manifest."""
    if ending_of(target, (*VOLUMES, *PICTURES)):
        raise DataError(f"{target}: is a file; the cases of a manifest need a folder")
    manifest = read_manifest(source)
    if (manifest.axes, manifest.channels) != (processing.axes, processing.channels):
        raise DataError(
            f"{source}: {manifest.axes}-D with {manifest.channels} channel(s); this run was trained on {processing.axes}-D with "
            f"{processing.channels}"
        )
    for case in manifest.cases:
        files = tuple(source.path for source in case.image)
        if wrong := [path for path in files if not ending_of(path, known) and not dicom_files.is_dicom(path)]:
            raise DataError(f"{source}: case {case.id!r}: {wrong[0].name} is none of the kinds {', '.join(known)}")
        yield files, target / f"{case.id}{ending}"


def _grouped(
    files: Sequence[Path], known: Sequence[str], channels: int, endings: Sequence[str]
) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """Yield name and files of every image: its channels where these are files of their own, else one file each.

    Raises:
        DataError: An image lacks a channel, or a file is none of any.
    """
    named = {path.name[: -len(ending_of(path, known))]: path for path in files}
    numbered = tuple(f"_{number:04d}" for number in range(channels))
    for marks in (tuple(endings), numbered):
        names = [name.removesuffix(marks[0]) for name in named if name.endswith(marks[0])] if marks else []
        if channels == 1 or len(marks) != channels or not names:
            continue
        left = set(named)
        for name in names:
            if missing := [mark for mark in marks if f"{name}{mark}" not in named]:
                raise DataError(
                    f"{named[name + marks[0]]}: the channel {name}{missing[0]} of this image is not in the folder"
                )
            left -= {f"{name}{mark}" for mark in marks}
        if left:
            raise DataError(f"{named[min(left)]}: ends in none of {', '.join(marks)}, as the channels of the others do")
        yield from ((name, tuple(named[f"{name}{mark}"] for mark in marks)) for name in names)
        return
    yield from ((path.name[: -len(ending_of(path, known))], (path,)) for path in files)


@dataclass(frozen=True)
class Unseen:
    """An image as the network sees its axes, and the way back.

    Args:
        image: [C, *S], normalised, on the grid that the network sees.
        shape: *S of the image as it came, in the order of axes of ``image``.
        write: Writes an array [*shape] or [K, *shape] to a file.
        notes: What is worth knowing.
    """

    image: NDArray[np.float32]
    shape: tuple[int, ...]
    write: Callable[[Path, NDArray[Any]], None]
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, ...]:
        """*S of the grid that the network sees."""
        return tuple(self.image.shape[1:])


def read_unseen(files: Sequence[Path], processing: Processing) -> Unseen:
    """Return a case that is prepared as those of the run were.

    Raises:
        DataError: It cannot be read, or is no such image.
    """
    path = files[0]
    image, spacing, write = (_read_volume if processing.axes == 3 else _read_picture)(files, processing)
    for start in range(0, image.shape[1], CHUNK):
        if not np.isfinite(image[:, start : start + CHUNK]).all():
            raise DataError(f"{path}: the image holds NaN or infinite values; repair or remove it")
    shape, notes = tuple(image.shape[1:]), []
    if processing.window is not None:
        first, last = processing.window
        said = f"nothing is left of values from {image.min():g} to {image.max():g} in the run's window [{first:g}, {last:g}]"
        image = clipped(image, processing.window)
        if image.min() == image.max():
            notes.append(f"{said}: is the image in other units?")
    if processing.spacing is not None:
        if spacing is None:
            raise DataError(f"{path}: tells no size of voxels, and the run resamples to {list(processing.spacing)} mm")
        image = resampled(image, spacing, processing.spacing)
    elif spacing is not None and processing.seen is not None:
        low, high = processing.seen
        if any(s > UNUSUAL * h or s * UNUSUAL < n for s, n, h in zip(spacing, low, high, strict=True)):
            notes.append(
                f"voxels of {' × '.join(f'{s:g}' for s in spacing)} mm are unlike those of training "
                f"({' × '.join(f'{n:g}-{h:g}' for n, h in zip(low, high, strict=True))}), and this run does not resample"
            )
    return Unseen(as_stored(image, processing.normalise), shape, write, tuple(notes))  # type: ignore[arg-type]  # one of three


def _read_volume(
    files: Sequence[Path], processing: Processing
) -> tuple[NDArray[np.float32], tuple[float, ...], Callable[[Path, NDArray[Any]], None]]:
    """Return [C, x, y, z] in the run's orientation, the size of its voxels in mm, and what writes back.

    A slice of a DICOM series stands for the series; what is written back is NIfTI, in its geometry.
    """
    own = processing.channels if len(files) == 1 else 1
    first, file, turn = _voxels(files[0], own, processing)
    image = np.empty((own * len(files), *first.shape[:3]), np.float32)
    place = file.affine @ inv_ornt_aff(turn, file.shape[:3])
    for number, path in enumerate(files):
        turned, part = first, file
        if number:
            turned, part, way = _voxels(path, own, processing)
            elsewhere = turned.shape != first.shape or not np.allclose(
                part.affine @ inv_ornt_aff(way, part.shape[:3]), place, atol=NEAR
            )
            if elsewhere:
                raise DataError(f"{path}: lies elsewhere than {files[0].name}; channels of an image lie on one grid")
        for start in range(0, turned.shape[0], CHUNK):  # scaled numbers are float64: never of the whole image
            scaled = apply_read_scaling(turned[start : start + CHUNK], part.dataobj.slope, part.dataobj.inter)
            image[number * own : (number + 1) * own, start : start + CHUNK] = np.moveaxis(scaled, 3, 0)
    zooms = np.empty(3)
    zooms[turn[:, 0].astype(int)] = file.header.get_zooms()[:3]
    back = ornt_transform(np.array([[0, 1], [1, 1], [2, 1]], float), turn)

    def write(target: Path, array: NDArray[Any]) -> None:
        last = np.moveaxis(array, 0, 3) if array.ndim == 4 else array
        header = file.header.copy()
        header.set_data_dtype(array.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"], header["cal_max"], header["descrip"] = 0, 0, b"labeleff"
        kind = nib.Nifti2Image if isinstance(file, nib.Nifti2Image) else nib.Nifti1Image
        write_aside(target, lambda temporary: nib.save(kind(_undo(last, back), file.affine, header), temporary))

    return image, tuple(round(float(z), 6) for z in zooms), write


def _voxels(path: Path, channels: int, processing: Processing) -> tuple[NDArray[Any], Any, NDArray[Any]]:
    """Return unscaled voxels [x, y, z, C] in the run's orientation, the file, and how its axes were turned."""
    try:
        file: Any = nifti_files.opened(path) if ending_of(path, VOLUMES) else dicom_files.as_nifti(path)
        check_memory(math.prod(file.shape) * file.get_data_dtype().itemsize, str(path))
        raw = np.asanyarray(file.dataobj.get_unscaled())
    except (OSError, EOFError, ValueError, AttributeError, OverflowError, MemoryError, ImageFileError) as error:
        raise DataError(f"{path}: not a readable NIfTI file ({error})") from error
    if raw.dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {raw.dtype}; whole or real numbers are read")
    while raw.ndim > 3 and raw.shape[-1] == 1 and raw.shape[-1] != channels:
        raw = raw[..., 0]
    raw = raw[..., None] if raw.ndim == 3 else raw
    if raw.ndim != 4 or raw.shape[3] != channels or 0 in raw.shape:
        raise DataError(
            f"{path}: has the shape {file.shape}; three axes and {channels} channel(s) are needed, channels last"
        )
    turn = np.array([[0, 1], [1, 1], [2, 1]], float)
    if processing.orientation is not None:
        turn = ornt_transform(io_orientation(file.affine), axcodes2ornt(tuple(processing.orientation)))
    return apply_orientation(raw, turn), file, turn


def _undo(array: NDArray[Any], back: NDArray[Any]) -> NDArray[Any]:
    """Return an array [x, y, z, …] with the axes of the file."""
    turned: NDArray[Any] = apply_orientation(array, back)
    return turned


def _read_picture(
    files: Sequence[Path], processing: Processing
) -> tuple[NDArray[Any], None, Callable[[Path, NDArray[Any]], None]]:
    """Return [C, y, x] of a picture, or of several that are its channels, and what writes back."""
    own = processing.channels if len(files) == 1 else 1
    parts = [_pixels(path, own) for path in files]
    for path, part in zip(files, parts, strict=True):
        if part.shape[1:] != parts[0].shape[1:]:
            raise DataError(f"{path}: has another size than {files[0].name}; channels of an image lie on one grid")
    image = np.concatenate(parts) if len(parts) > 1 else parts[0]

    def write(target: Path, values: NDArray[Any]) -> None:
        if target.suffix == ".npz":
            write_aside(target, lambda temporary: np.savez_compressed(temporary, values=values))
        else:
            write_aside(target, lambda temporary: Image.fromarray(values).save(temporary))

    return image if image.dtype == np.uint8 else image.astype(np.float32), None, write


def _pixels(path: Path, channels: int) -> NDArray[Any]:
    """Return [C, y, x] of a picture."""
    modes = {1: ("L", "I", "F", "I;16"), 3: ("RGB",), 4: ("RGBA",)}.get(channels, ())
    try:
        with Image.open(path) as file:
            picture = file if file.mode in modes or not modes else file.convert(modes[0])
            array = np.asarray(picture)
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable picture ({error})") from error
    image = array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)
    if len(image) != channels:
        raise DataError(f"{path}: has {len(image)} channel(s); this run was trained on {channels}")
    return image
