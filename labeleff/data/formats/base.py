"""The contract of a data set, and the reading that formats share."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE
from labeleff.data.manifest import Case, Manifest, Source
from labeleff.errors import DataError
from labeleff.machine import free_memory, in_bytes


class DataSet(ABC):
    """A layout on disk. Options are the keyword-only arguments of ``__init__``; nothing is read before :meth:`manifest`."""

    verbatim: frozenset[str] = frozenset()
    """``image``, ``label``: what a manifest that names the files of a case is read as this data set reads it."""

    @abstractmethod
    def manifest(self) -> Manifest:
        """Return the rows. Looks at lists and headers, never at labels."""

    @abstractmethod
    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [C, *S], uint8 or float32."""

    @abstractmethod
    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [*S] of 0 … K-1 and IGNORE."""

    def read_votes(self, case: Case) -> NDArray[np.uint8]:
        """Return what every rater of a case says, [R, *S]; of a case with one label, that as [1, *S].

        Raises:
            DataError: A label cannot be read, or the raters' labels differ in shape.
        """
        own = [replace(case, label=source, raters=()) for source in case.raters] or [case]
        labels = [self.read_label(one) for one in own]
        for one, label in zip(own, labels, strict=True):
            if label.shape != labels[0].shape:
                raise DataError(
                    f"case {case.id!r}: {required_label(one)}: the label has shape {label.shape}, that of the first rater "
                    f"{labels[0].shape}; all raters' labels must be on the image's grid"
                )
        return np.stack(labels)

    def affine(self, case: Case) -> NDArray[np.float64] | None:  # noqa: ARG002
        """Return the map [4, 4] from voxels, as :meth:`read_image` has them, to patient coordinates, mm; None: not told."""
        return None

    def fingerprint(self, case: Case) -> str:
        """Return what changes when the case's files change, without decoding them."""
        parts = []
        for source in case.image:
            try:
                found = source.path.stat()
            except OSError as error:
                raise DataError(f"case {case.id!r}: {source.path}: cannot be read ({error.strerror})") from error
            parts.append(f"{source.path.resolve()}:{source.key}:{found.st_size}:{found.st_mtime_ns}")
        return f"{type(self).__name__}|" + "|".join(parts)


def data_folder(path: str) -> Path:
    """Return a folder given absolutely, relative to here, or relative to ``LABELEFF_DATA``.

    Raises:
        DataError: There is no such folder.
    """
    root = os.environ.get("LABELEFF_DATA")
    candidates = [Path(path).expanduser()]
    if root and not Path(path).is_absolute():
        candidates.append(Path(root) / path)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise DataError(
        f"{path}: no such folder; give data.dataset.path, or set LABELEFF_DATA to the folder that holds it"
        + (f" (it is {root})" if root else " (it is not set)")
    )


def lines_of(path: Path) -> list[str]:
    """Return the non-empty lines of a list file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: this list of cases cannot be read ({error})") from error


def read_npz(path: Path, key: str, case: str) -> NDArray[Any]:
    """Return one array of an ``.npz`` file; nothing else of the file is decoded, and no pickles.

    Raises:
        DataError: The file or the array cannot be read.
    """
    try:
        check_memory(_claimed(path, key), f"case {case!r}: {path}")
        with np.load(path, allow_pickle=False) as content:
            array: NDArray[Any] = content[key]
            return array
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"case {case!r}: {path}: no readable array {key!r} ({error})") from error


def _claimed(path: Path, key: str) -> int:
    """Return the bytes that an array of an ``.npz`` file says it has."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
        old = np.lib.format.read_magic(member) == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(member)
        return math.prod(shape) * int(dtype.itemsize)


def check_memory(size: int, where: str) -> None:
    """Refuse what would not fit into memory, before it is read: a header may claim anything, and a small file unpack to it.

    Raises:
        DataError: There are fewer bytes.
    """
    free = free_memory()
    if free is not None and size > free:
        raise DataError(
            f"{where}: says that it takes {in_bytes(size)} in memory, and {in_bytes(free)} are free; is it damaged, or the "
            "machine full?"
        )


def checked_label(
    label: NDArray[Any], case: Case, classes: int, shape: tuple[int, ...] | None = None
) -> NDArray[np.uint8]:
    """Return a label as uint8.

    Raises:
        DataError: A value is no class, or the shape is not the image's.
    """
    where = case.label.path if case.label is not None else "?"
    if shape is not None and label.shape != shape:
        raise DataError(f"case {case.id!r}: {where}: the label has shape {label.shape}, the image {shape}")
    rounded = np.asarray(label)
    if rounded.dtype.kind not in "buif":
        raise DataError(f"case {case.id!r}: {where}: a label of type {rounded.dtype}; labels are whole numbers")
    if not np.issubdtype(rounded.dtype, np.integer):
        rounded = np.rint(rounded)
        if not np.array_equal(rounded, label):
            raise DataError(f"case {case.id!r}: {where}: labels must be whole numbers")
    wrong = np.setdiff1d(np.unique(rounded), [*range(classes), IGNORE])
    if wrong.size:
        raise DataError(
            f"case {case.id!r}: {where}: label value {wrong[0]} is no class; values are 0 … {classes - 1} and {IGNORE}"
        )
    return rounded.astype(np.uint8)


def as_classes(stored: NDArray[Any], case: Case, source: Source) -> NDArray[Any]:
    """Return a stored label with the numbers of classes in place of the values that stand for them in its file.

    Raises:
        DataError: The file holds a value that its source does not name.
    """
    if source.mask_of is not None:
        return np.where(stored != 0, source.mask_of, 0).astype(np.uint8)
    if not source.values:
        return stored
    label = np.full(stored.shape, -1, np.int16)
    for value, index in source.values:
        label[stored == value] = index
    if (label < 0).any():
        wrong, known = stored[label < 0].flat[0], ", ".join(str(value) for value, _ in source.values)
        raise DataError(f"case {case.id!r}: {source.path}: label value {wrong:g} is unknown; values here are {known}")
    return label


def required_label(case: Case) -> Path:
    """Return the label file of a case.

    Raises:
        DataError: It has none.
    """
    if case.label is None:
        raise DataError(f"case {case.id!r} has no label")
    return case.label.path
