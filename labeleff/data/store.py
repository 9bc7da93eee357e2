"""The prepared store: every image decoded once into a chunked, memory-mapped array, so that a patch costs what it touches.

Holds images and nothing else; there is no path from here to a label.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import json
import math
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import blosc2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from labeleff.data.lookalikes import reduced
from labeleff.data.manifest import Case
from labeleff.data.preparing import prepare_missing
from labeleff.errors import DataError, StoreError
from labeleff.files import write_atomically

FORMAT = 1
CHUNK = 32
OPEN_HANDLES = 64
BYTES_PER_VOXEL = 40
"""The most that the preparation of an image holds: it as it came, twice in float32, three times in float64."""
ABANDONED = 24 * 3600.0
"""Seconds after which a folder under a temporary name belongs to nobody."""
Normalise = Literal["zscore", "minmax", "none"]
Window = tuple[float, float]
"""Smallest and largest intensity that are kept, in the units of the image."""
ONE_THREAD: Mapping[str, Any] = {"cparams": {"nthreads": 1}, "dparams": {"nthreads": 1}}
"""Options of blosc2: threads would be made anew for every chunk, which takes longer than to pack or unpack it."""
os.environ.setdefault("BLOSC_NTHREADS", "1")  # blosc2 4.14 packs arrays with four threads whatever its options say


class Images(Protocol):
    """What the store needs of a data set."""

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [C, *S]."""

    def fingerprint(self, case: Case) -> str:
        """Return what changes when the case's files change."""


@dataclass(frozen=True)
class Entry:
    """One prepared case: where it lies and what is needed to read it."""

    folder: str
    content: str
    shape: tuple[int, ...]
    original_shape: tuple[int, ...]
    spacing: tuple[float, ...]
    channels: int
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class Wish(NamedTuple):
    """How images are wanted beyond their normalisation, see :meth:`ImageStore.prepare`."""

    spacing: tuple[float, ...] | None
    window: Window | None


class ImageStore:
    """Prepared images by case. Picklable; files are opened where they are read, a bounded number at a time."""

    def __init__(self, cache: Path, entries: dict[str, Entry], normalise: Normalise) -> None:
        self.cache, self.normalise = cache, normalise
        self._entries = entries
        self.ids: tuple[str, ...] = tuple(entries)
        self._index = {name: i for i, name in enumerate(self.ids)}
        self._within: frozenset[str] | None = None
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    @classmethod
    def prepare(
        cls,
        dataset: Images,
        cases: Sequence[Case],
        *,
        axes: int,
        cache: Path,
        normalise: Normalise = "zscore",
        window: Window | None = None,
        spacing: tuple[float, ...] | None = None,
        processes: int | None = None,
        say: Callable[[str], None] = lambda _: None,
        on_progress: Callable[[int, int], None] = lambda *_: None,
    ) -> ImageStore:
        """Decode what the cache does not hold yet, and return the store.

        Whoever is killed on the way finds what was done, whole, and goes on with the rest. What lies in the cache is the same
        to the byte however many processes have made it.

        Args:
            dataset: Reads images.
            cases: What to prepare.
            axes: Axes of a case.
            cache: Folder of prepared cases, shared by all runs; content-addressed, safe under several processes.
            normalise: Applied on reading, per case and channel, from the image alone: ``zscore``, ``minmax`` to [0, 1].
            window: Intensities beyond it are set to its ends, before all else.
            spacing: Resample linearly to this voxel size, mm.
            processes: How many decode at a time; None: as many as there are cores and memory for, where that is worth while.
            say: Called with what is about to be done, where it is more than a few cases.
            on_progress: Called with (done, of).

        Raises:
            DataError: An image cannot be used, all are constant within the window, or the disk has no room.
            StoreError: The cache holds damaged files, or cannot be written to.
        """
        wish = Wish(spacing, window)
        entries = {case.id: _known(dataset, case, cache, wish) for case in cases}
        missing = [case for case in cases if entries[case.id] is None]

        def make(case: Case) -> Entry:
            with leave_it_out(case):
                return _prepared(dataset, case, axes, cache, wish)

        _sweep(cache)
        prepare_missing(make, missing, _cost, cache, processes=processes, say=say, on_progress=on_progress)
        whole = {case.id: entries[case.id] or make(case) for case in cases}
        store = cls(cache, whole, normalise)
        if window is not None and cases and store.constant() == store.ids:
            raise DataError(_beyond(window, dataset.read_image(cases[0]), cases[0]))
        return store

    @property
    def key(self) -> str:
        """A hash of everything in the store."""
        rows = [[name, entry.folder] for name, entry in self._entries.items()]
        return hashlib.sha256(json.dumps([self.normalise, rows]).encode()).hexdigest()[:16]

    def only(self, cases: Iterable[str]) -> ImageStore:
        """Return the store with all but some cases out of reach; their numbers stay what they are."""
        part = copy.copy(self)
        part._open, part._within = OrderedDict(), frozenset(cases)
        return part

    def _entry(self, name: str) -> Entry:
        if self._within is not None and name not in self._within:
            raise StoreError(f"case {name!r} is bound to no stream of this stage; its image is out of reach")
        try:
            return self._entries[name]
        except KeyError:
            raise StoreError(f"case {name!r} was not prepared for this run") from None

    def index(self, name: str) -> int:
        """Return the position of a case in :attr:`ids`."""
        self._entry(name)
        return self._index[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return *S of the stored grid."""
        return self._entry(name).shape

    def original_shape(self, name: str) -> tuple[int, ...]:
        """Return *S as the case came."""
        return self._entry(name).original_shape

    def spacing(self, name: str) -> tuple[float, ...]:
        """Return the voxel size of the stored grid, mm; NaN where unknown."""
        return self._entry(name).spacing

    def content(self, name: str) -> str:
        """Return the SHA-256 of the decoded image as it came."""
        return self._entry(name).content

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> NDArray[np.float32]:
        """Return [C, *box] float32, normalised. Only the chunks that the box touches are read.

        Raises:
            StoreError: The file is damaged or gone.
        """
        entry = self._entry(name)
        window = (slice(None), *(box if box is not None else (slice(None),) * len(entry.shape)))
        try:
            raw = self._array(name, entry)[window]
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(name, entry, error) from error
        per_channel = (-1,) + (1,) * len(entry.shape)
        scale, offset = np.array(entry.scale, np.float32), np.array(entry.offset, np.float32)
        if self.normalise == "zscore":
            shift, unit = np.array(entry.mean, np.float32), np.array(entry.sd, np.float32)
        elif self.normalise == "minmax":
            shift, unit = (
                np.array(entry.low, np.float32),
                np.array(entry.high, np.float32) - np.array(entry.low, np.float32),
            )
        else:
            shift, unit = np.zeros_like(scale), np.ones_like(scale)
        unit = np.where(unit > 0, unit, 1).astype(np.float32)
        values: NDArray[np.float32] = raw.astype(np.float32)
        values *= (scale / unit).reshape(per_channel)
        values += ((offset - shift) / unit).reshape(per_channel)
        return values

    def constant(self) -> tuple[str, ...]:
        """Return the cases in which every channel has one value throughout."""
        return tuple(name for name, entry in self._entries.items() if entry.low == entry.high)

    def reduced(self, name: str, factors: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the means of blocks of *factors voxels of an image, channels averaged; kept beside it once computed."""
        entry = self._entry(name)
        kept = self.cache / entry.folder / f"reduced-{self.normalise}-{'x'.join(map(str, factors))}.npy"
        with suppress(OSError, ValueError, EOFError):
            found: NDArray[np.float32] = np.load(kept, allow_pickle=False)
            return found
        made = reduced(self.read(name), factors)
        buffer = io.BytesIO()
        np.save(buffer, made, allow_pickle=False)
        with suppress(OSError):  # a cache that others have filled may be read-only
            write_atomically(kept, buffer.getvalue())
        return made

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return plain values that an earlier run has kept under a name beside the same images, else make and keep them."""
        images = hashlib.sha256("".join(sorted(entry.folder for entry in self._entries.values())).encode()).hexdigest()
        path = self.cache / "kept" / f"{name}-{images[:16]}.json"
        with suppress(OSError, ValueError):
            return json.loads(path.read_text())
        made = make()
        with suppress(OSError):
            write_atomically(path, json.dumps(made))
        return made

    def _array(self, name: str, entry: Entry) -> Any:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        array = blosc2.open(str(self.cache / entry.folder / "image.b2nd"), mode="r", dparams=ONE_THREAD["dparams"])
        if tuple(array.shape) != (entry.channels, *entry.shape):
            raise ValueError(f"holds an array of shape {tuple(array.shape)}")
        self._open[name] = array
        if len(self._open) > OPEN_HANDLES:
            self._open.popitem(last=False)
        return array

    def _damaged(self, name: str, entry: Entry, error: Exception) -> StoreError:
        folder = self.cache / entry.folder
        return StoreError(f"case {name!r}: the prepared image is damaged ({error}); delete {folder} and run again")


def as_stored(image: NDArray[Any], normalise: Normalise) -> NDArray[np.float32]:
    """Return what the store gives back for an image [C, *S] that it has prepared: rounded and normalised as there.

    Images that no run has seen go this way. Beyond the result no memory is needed but for a slab.

    Args:
        image: Finite values, uint8 or others.
        normalise: As in :meth:`ImageStore.prepare`.
    """
    result = np.empty(image.shape, np.float32)
    exact = image.dtype == np.uint8
    for channel, values in zip(image, result, strict=True):
        slabs = range(0, len(channel), CHUNK)
        mean = sum(float(_slab(channel, s).sum()) for s in slabs) / channel.size
        sd = math.sqrt(sum(float(((_slab(channel, s) - mean) ** 2).sum()) for s in slabs) / channel.size)
        low, high = float(channel.min()), float(channel.max())
        offset, scale = (0.0, 1.0) if exact else (mean, max(max(high - mean, mean - low) / 1024, 1e-30))
        shift = np.float32({"zscore": mean, "minmax": low, "none": 0.0}[normalise])
        unit = {"zscore": np.float32(sd), "minmax": np.float32(high) - np.float32(low), "none": np.float32(1)}[
            normalise
        ]
        unit = unit if unit > 0 else np.float32(1)
        for s in slabs:
            raw = _slab(channel, s) if exact else ((_slab(channel, s) - offset) / scale).astype(np.float16)
            values[s : s + CHUNK] = raw.astype(np.float32) * (np.float32(scale) / unit)
            values[s : s + CHUNK] += (np.float32(offset) - shift) / unit
    return result


def _slab(channel: NDArray[Any], start: int) -> NDArray[np.float64]:
    return channel[start : start + CHUNK].astype(np.float64)


def clipped(image: NDArray[Any], window: Window | None) -> NDArray[Any]:
    """Return an image in float32 with what lies beyond a window set to its ends; without one, the image as it is.

    float32 images are changed in place.
    """
    if window is None:
        return image
    values: NDArray[np.float32] = image.astype(np.float32, copy=False)
    return np.clip(values, *window, out=values)


def _beyond(window: Window, image: NDArray[Any], case: Case) -> str:
    return (
        f"data.window: [{window[0]:g}, {window[1]:g}] leaves every image constant; that of case {case.id!r} has values from "
        f"{image.min():g} to {image.max():g}: give the window in their units, or leave it out"
    )


def resampled(image: NDArray[Any], spacing: Sequence[float], wanted: Sequence[float]) -> NDArray[np.float32]:
    """Return an image [C, *S] float32 on another size of voxels, mm, linearly."""
    factors = [1.0, *(own / to for own, to in zip(spacing, wanted, strict=True))]
    zoomed: NDArray[np.float32] = ndimage.zoom(
        image.astype(np.float32), factors, order=1, grid_mode=True, mode="nearest"
    )
    return zoomed


@contextmanager
def leave_it_out(case: Case) -> Iterator[None]:
    """Add to what is said of a case that cannot be used how to do without it."""
    try:
        yield
    except StoreError:
        raise
    except DataError as error:
        raise DataError(f"{error}; or do without the case: data.leave_out=[{case.id}]") from error


def _hash(window: Window | None, *values: Any) -> str:
    """Return what names a prepared image: without a window, the name it had before there were any."""
    plain = [FORMAT, *values, *([] if window is None else [window])]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:32]


def _pointer(dataset: Images, case: Case, cache: Path, wish: Wish) -> Path:
    return cache / "index" / f"{_hash(wish.window, dataset.fingerprint(case), case.spacing, wish.spacing)}.json"


def _known(dataset: Images, case: Case, cache: Path, wish: Wish) -> Entry | None:
    """Return the entry of a case that an earlier run has prepared."""
    with leave_it_out(case):
        pointer = _pointer(dataset, case, cache, wish)
    if pointer.exists():
        try:
            return _entry_in(cache, json.loads(pointer.read_text())["folder"])
        except (OSError, KeyError, TypeError, json.JSONDecodeError):
            pointer.unlink(missing_ok=True)  # points at nothing whole: decode again
    return None


def _prepared(dataset: Images, case: Case, axes: int, cache: Path, wish: Wish) -> Entry:
    """Return the entry of a case, decoding it where no other process has."""
    if (entry := _known(dataset, case, cache, wish)) is not None:
        return entry
    entry, stored = _decode(dataset.read_image(case), case, axes, wish)
    try:
        _publish(stored, entry, cache)
        write_atomically(_pointer(dataset, case, cache, wish), json.dumps({"folder": entry.folder}))
    except OSError as error:
        raise StoreError(
            f"{cache}: case {case.id!r} cannot be written there ({error.strerror}); make room, or give --cache a folder elsewhere"
        ) from error
    return entry


def _cost(entry: Entry, cache: Path) -> tuple[int, int]:
    """Return the bytes that a case takes on the disk, and those that its preparation takes in memory."""
    disk = sum(path.stat().st_size for path in (cache / entry.folder).iterdir())
    voxels = max(math.prod(entry.shape), math.prod(entry.original_shape))
    return disk, BYTES_PER_VOXEL * entry.channels * voxels


def _sweep(cache: Path) -> None:
    """Remove what processes that were killed have left half-written, once it is surely nobody's."""
    for path in cache.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path)


def _entry_in(cache: Path, folder: str) -> Entry:
    record = json.loads((cache / folder / "entry.json").read_text())
    if not (cache / folder / "image.b2nd").exists():
        raise OSError(f"{folder}: image.b2nd is missing")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Entry(**fields)


def _decode(image: NDArray[Any], case: Case, axes: int, wish: Wish) -> tuple[Entry, NDArray[Any]]:
    """Return the entry of an image, and the image as it is kept."""
    spacing, window = wish
    where = f"case {case.id!r}: {case.image[0].path}"
    if image.ndim != axes + 1 or 0 in image.shape:
        raise DataError(
            f"{where}: the image has shape {image.shape}; a channel axis and {axes} spatial axes are needed"
        )
    if image.dtype.kind not in "buif":
        raise DataError(f"{where}: the image holds values of type {image.dtype}; whole or real numbers are read")
    if image.dtype != np.uint8:
        image = image.astype(np.float32)
        if not np.isfinite(image).all():
            raise DataError(f"{where}: the image holds NaN or infinite values; repair or remove it")
    image = np.ascontiguousarray(image)
    content = hashlib.sha256(f"{image.dtype}{image.shape}".encode() + image.tobytes()).hexdigest()
    image = clipped(image, window)
    original = image.shape[1:]
    known = case.spacing if case.spacing is not None else (float("nan"),) * axes
    if spacing is not None:
        if case.spacing is None or len(spacing) != axes:
            raise DataError(f"{where}: data.spacing needs {axes} lengths and a case whose own spacing is known")
        image = resampled(image, case.spacing, spacing)
        known = spacing
    folder = _hash(window, content, spacing, known)
    flat = image.reshape(image.shape[0], -1).astype(np.float64)
    mean, sd = flat.mean(1), flat.std(1)
    stored, offset, scale = image, np.zeros(len(image)), np.ones(len(image))
    if image.dtype != np.uint8:  # float16 of standardised values: an error of 0.05 % of the distance to the mean
        offset, scale = mean, np.maximum(np.abs(flat - mean[:, None]).max(1) / 1024, 1e-30)
        shape = (-1,) + (1,) * axes
        stored = ((image - offset.reshape(shape)) / scale.reshape(shape)).astype(np.float16)
    entry = Entry(
        folder=folder,
        content=content,
        shape=tuple(image.shape[1:]),
        original_shape=tuple(original),
        spacing=tuple(float(s) for s in known),
        channels=image.shape[0],
        offset=tuple(offset),
        scale=tuple(scale),
        mean=tuple(mean),
        sd=tuple(sd),
        low=tuple(flat.min(1)),
        high=tuple(flat.max(1)),
    )
    return entry, stored


def _publish(stored: NDArray[Any], entry: Entry, cache: Path) -> None:
    """Write a case under a name of this process, then rename: another process that was first is left alone."""
    target = cache / entry.folder
    if (target / "entry.json").exists():
        return
    temporary = cache / f".{entry.folder}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    chunks = tuple(min(n, CHUNK) for n in stored.shape)
    try:
        _write_array(stored, temporary / "image.b2nd", chunks)
        write_atomically(temporary / "entry.json", json.dumps(entry.__dict__))
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        temporary.rename(target)
    except OSError:
        if not (target / "entry.json").exists():
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        else:
            shutil.rmtree(temporary)


def _write_array(stored: NDArray[Any], path: Path, chunks: tuple[int, ...]) -> None:
    try:
        blosc2.asarray(stored, urlpath=str(path), chunks=chunks, **ONE_THREAD)
    except RuntimeError as error:  # all that blosc2 says where a disk is full
        raise OSError(errno.EIO, str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
