"""Reading DICOM series as volumes, through SimpleITK. Of the tags only those are read that say where voxels lie.

A series is named by its first slice: all files of that folder with the same SeriesInstanceUID belong to it. What identifies a
patient (name, number, dates, the UIDs themselves) goes nowhere.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

from labeleff.errors import DataError

SUFFIXES = (".dcm", ".ima")
NEAR, NEAR_SHARE = 0.06, 0.01
"""How far a slice may lie from its place in an even stack: mm (positions are often rounded to 0.1), or share of a step."""
STRAIGHT = 0.02
"""Shear of a stack (a tilted gantry), as a share of a step, from which a volume without shear would be wrong."""
NO_IMAGE = (
    "1.2.840.10008.5.1.4.1.1.481",
    "1.2.840.10008.5.1.4.1.1.88",
    "1.2.840.10008.5.1.4.1.1.11",
    "1.2.840.10008.1.3",
)
"""Kinds of file without voxels: contours and plans, reports, presentation states, directories."""
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
_KIND = re.compile(rb"\x02\x00\x02\x00UI(..)([0-9.]+)", re.DOTALL)
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Slice:
    """A file of a series.

    Args:
        path: The file.
        series: Its SeriesInstanceUID; in memory only.
        number: SeriesNumber.
        size: Columns and rows.
        along: Directions of columns and rows, [6], in the patient (left, posterior, superior).
        spacing: Between columns and between rows, mm.
        position: Of the first voxel, mm.
        pixel: SimpleITK's number of the type of its voxels.
    """

    path: Path
    series: str
    number: int
    size: tuple[int, int]
    along: tuple[float, ...]
    spacing: tuple[float, float]
    position: tuple[float, ...]
    pixel: int


def is_dicom(path: Path) -> bool:
    """Return whether a file says that it is DICOM; many have no suffix."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"
    except OSError:
        return path.name.lower().endswith(SUFFIXES)


def holds_dicom(folder: Path) -> bool:
    """Return whether there are DICOM files among the first ones in a folder, or below its ``images/``."""
    root = folder / "images" if (folder / "images").is_dir() else folder
    return any(is_dicom(path) for path in islice((path for path in root.rglob("*") if path.is_file()), 200))


def series_in(folder: Path) -> tuple[dict[tuple[Path, str], list[Slice]], list[str]]:
    """Return the slices of every series in a folder and below it, and what was left out, in words.

    Keys are the folder and SeriesInstanceUID, in the order of folders and SeriesNumber.

    Raises:
        DataError: SimpleITK is missing, or a file is damaged, or of a kind that is not read.
    """
    found: dict[tuple[Path, str], list[Slice]] = defaultdict(list)
    bare = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        if is_dicom(path):
            if _kind_of(path).startswith(NO_IMAGE):
                bare.append(path.name)
            else:
                one = _slice_of(path)
                found[path.parent, one.series].append(one)
    notes = [f"{len(bare)} DICOM files without an image, such as {bare[0]}, are left out"] if bare else []
    order = sorted(found, key=lambda key: (key[0], found[key][0].number, key[1]))
    return {key: found[key] for key in order}, notes


def volume(path: Path) -> Any:
    """Return the volume that a file is a slice of, as nibabel's image in the closest canonical orientation; voxels wait.

    Raises:
        DataError: The series is no stack of even slices, or cannot be read; the message names the file.
    """
    own = _slice_of(path)
    others = [other for other in sorted(path.parent.iterdir()) if other != path and other.is_file() and is_dicom(other)]
    slices = [own, *(one for other in others if (one := _same_series(other, own.series)) is not None)]
    return stack(slices)


def as_nifti(path: Path) -> Any:
    """Return the volume that a file is a slice of as a NIfTI file would be, in memory; see :func:`volume`."""
    return nib.Nifti1Image.from_bytes(volume(path).to_bytes())


def stack(slices: list[Slice]) -> Any:
    """Return the volume of the slices of a series, see :func:`volume`."""
    ordered, affine = _geometry(slices)
    shape = (*ordered[0].size, len(ordered))
    turn = io_orientation(affine)
    turned: list[int] = [0, 0, 0]
    for axis, (to, _) in enumerate(turn):
        turned[int(to)] = shape[axis]
    voxels = _Voxels(tuple(one.path for one in ordered), turn, tuple(turned), _dtype_of(ordered[0]))
    return nib.Nifti1Image(voxels, affine @ inv_ornt_aff(turn, shape))


@dataclass(frozen=True)
class _Voxels:
    """The array [x, y, z] of a series, read where it is asked for."""

    files: tuple[Path, ...]
    turn: NDArray[np.float64]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        planes = [_pixels(path) for path in self.files]
        array: NDArray[Any] = apply_orientation(np.stack(planes, axis=-1), self.turn)
        return array if dtype is None else array.astype(dtype)


def tells_who(name: str, path: Path) -> bool:
    """Return whether a name holds the name or the number of the patient that a file has in its tags."""
    reader, bare = _opened(path), _letters(name)
    tags = [str(reader.GetMetaData(key)) for key in ("0010|0010", "0010|0020") if reader.HasMetaDataKey(key)]
    parts = {_letters(part) for tag in tags for part in [tag, *tag.replace("^", " ").split()]}
    return any(part in bare for part in parts if len(part) > 2)


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).lower()


def _itk() -> Any:
    try:
        import SimpleITK
    except ImportError:
        raise DataError("DICOM is read by SimpleITK, which is not installed: pip install 'labeleff[dicom]'") from None
    return SimpleITK


def _opened(path: Path) -> Any:
    itk = _itk()
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: not a readable DICOM image; repair or remove it") from error
    return reader


def _kind_of(path: Path) -> str:
    """Return the SOP class that the head of a file names."""
    with path.open("rb") as file:
        found = _KIND.search(file.read(1024)[132:])
    return found[2].decode() if found else ""


def _same_series(path: Path, series: str) -> Slice | None:
    if _kind_of(path).startswith(NO_IMAGE):
        return None
    found = _slice_of(path)
    return found if found.series == series else None


def _slice_of(path: Path) -> Slice:
    """Return where a file lies.

    Raises:
        DataError: It cannot be read, or holds anything but one grey slice with a place in the patient.
    """
    if _kind_of(path).startswith(SEGMENTATION):
        raise DataError(f"{path}: DICOM-SEG is not read; convert labels to NIfTI on the grid of the image")
    reader = _opened(path)

    def tag(key: str) -> str:
        return str(reader.GetMetaData(key)).strip() if reader.HasMetaDataKey(key) else ""

    frames = int(tag("0028|0008") or 1)
    if frames > 1 or (reader.GetDimension() == 3 and reader.GetSize()[2] > 1):
        raise DataError(
            f"{path}: holds {frames} frames in one file (multi-frame DICOM), which is not read; convert to NIfTI"
        )
    if reader.GetNumberOfComponents() != 1:
        raise DataError(f"{path}: holds colours (RGB DICOM), which are not read; remove it, or convert to grey")
    try:
        position, along, (rows, columns) = (
            [float(part) for part in tag(key).split("\\")] for key in ("0020|0032", "0020|0037", "0028|0030")
        )
    except ValueError:
        raise DataError(
            f"{path}: says not where it lies (ImagePositionPatient, ImageOrientationPatient, PixelSpacing); convert to NIfTI"
        ) from None
    number = tag("0020|0011")
    return Slice(
        path=path,
        series=tag("0020|000e"),
        number=int(number) if number.lstrip("-").isdigit() else 0,
        size=tuple(reader.GetSize()[:2]),
        along=tuple(along),
        spacing=(columns, rows),
        position=tuple(position),
        pixel=reader.GetPixelID(),
    )


def _geometry(slices: list[Slice]) -> tuple[list[Slice], NDArray[np.float64]]:
    """Return the slices in their order, and the map [4, 4] from voxels to patient coordinates (RAS, mm).

    Raises:
        DataError: They are no stack of even slices.
    """
    first = min(slices, key=lambda one: one.path)
    for one in slices:
        if one.size != first.size or not np.allclose(
            (*one.along, *one.spacing), (*first.along, *first.spacing), atol=1e-4
        ):
            raise DataError(
                f"{one.path}: differs from {first.path.name} of the same series in size, direction or spacing; a series is a "
                "stack of like slices"
            )
    if len(slices) < 2:
        raise DataError(f"{first.path}: the only slice of its series; a volume needs two or more")
    x, y = np.array(first.along[:3]), np.array(first.along[3:])
    normal = np.cross(x, y)
    ordered = sorted(slices, key=lambda one: float(np.dot(one.position, normal)))
    places = np.array([one.position for one in ordered])
    heights = places @ normal
    steps = np.diff(heights)
    usual = float(np.median(steps))
    for one, other, step in zip(ordered, ordered[1:], steps, strict=False):
        if step < NEAR_SHARE * max(usual, NEAR):
            raise DataError(
                f"{other.path}: lies where {one.path.name} does; a series with several times or echoes has to be taken apart"
            )
        if step > 1.5 * usual:
            raise DataError(
                f"{one.path}: a slice is missing between it and {other.path.name}: {step:g} mm lie between them, and "
                f"{usual:g} mm between others"
            )
    step = (places[-1] - places[0]) / (len(places) - 1)
    even = heights[0] + np.arange(len(places)) * float(step @ normal)
    off = np.abs(heights - even)
    if off.max() > max(NEAR, NEAR_SHARE * usual):
        raise DataError(
            f"{ordered[int(off.argmax())].path}: lies {off.max():.3g} mm from its place in an even stack; slices of one series "
            f"are {steps.min():g} to {steps.max():g} mm apart; resample to even slices"
        )
    if np.linalg.norm(step - normal * (step @ normal)) > STRAIGHT * usual:
        raise DataError(f"{ordered[0].path}: the stack is sheared (a tilted gantry); resample it to straight slices")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = x * first.spacing[0], y * first.spacing[1], step
    affine[:3, 3] = places[0]
    return ordered, _LPS_TO_RAS @ affine


def _dtype_of(one: Slice) -> np.dtype[Any]:
    itk = _itk()
    return itk.GetArrayViewFromImage(itk.Image([1, 1], one.pixel)).dtype  # type: ignore[no-any-return]


def _pixels(path: Path) -> NDArray[Any]:
    """Return [x, y] of a slice, in the units that the file says (Hounsfield, for one)."""
    try:
        image = _opened(path).Execute()
    except RuntimeError as error:
        raise DataError(f"{path}: its voxels cannot be read; repair or remove it") from error
    array: NDArray[Any] = _itk().GetArrayFromImage(image)
    return array.reshape(array.shape[-2:]).T
