"""Prediction of files that no run has seen, in the geometry they came in.

Scores are made in slabs (:func:`labeleff.evaluation.inference.predict_slabs`): what is held is the image, its label map and
one window's length of scores. Where scores of the whole case are needed, they lie in a file that is mapped, not in memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import nn

from labeleff.backbones.views import Ensemble
from labeleff.data.store import CHUNK, as_stored, resampled
from labeleff.errors import DataError, RecipeError, RunError
from labeleff.evaluation.averaging import Averaged
from labeleff.evaluation.inference import count_windows, evaluating, predict_slabs, segment
from labeleff.files import write_aside
from labeleff.functional.regions import bits_of, largest_components
from labeleff.predictor import Processing, open_predictor

VOLUMES = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
LOSSLESS = (".png", ".tif", ".tiff")
UNUSUAL = 1.5
"""Voxels so many times larger or smaller than any in training are worth a word."""


@dataclass(frozen=True)
class Wish:
    """What is written for each case.

    Args:
        probabilities: Of every class, float32.
        uncertainty: Entropy of the probabilities, nats, float32.
        largest_component: Keep only the largest component of each class.
        flips: Axes of the network, each mirrored and not in all combinations; probabilities are averaged.
        overwrite: Replace files that are there.
    """

    probabilities: bool = False
    uncertainty: bool = False
    largest_component: bool = False
    flips: tuple[int, ...] = ()
    overwrite: bool = False


def predict(
    runs: Sequence[Path],
    source: Path,
    target: Path,
    wish: Wish | None = None,
    *,
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Predict a file or every file of a folder, and return the label maps written, each whole or not there.

    Args:
        runs: Directories of finished runs (or their ``predictor.safetensors``); of several the mean probability is taken.
        source: NIfTI, or for networks of 2-D images PNG, TIFF or JPEG; or a folder of such.
        target: A file for a file, otherwise a folder.
        wish: What is written.
        device: ``auto``, ``cpu``, ``cuda``, …
        say: Called with one line for each case, and with what is worth knowing.

    Raises:
        RunError: A run has no predictor, or runs differ in how they prepare images.
        DataError: A file cannot be used, or would be overwritten.
    """
    wanted = wish or Wish()
    network, processing = _joined(runs, wanted.flips)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    if processing.largest_component and not wanted.largest_component:
        say("evaluation of this run kept only the largest component of each class; here: --largest-component")
    pairs = list(_pairs(source, target, processing))
    for _, path in pairs:  # found before anything is computed
        for out in (path, *_extras(path, wanted).values()):
            if out.exists() and not wanted.overwrite:
                raise DataError(f"{out}: is there already; give another place, or --overwrite")
    for file, path in pairs:
        began = time.perf_counter()
        case = _read(file, processing)
        for note in case.notes:
            say(f"{file.name}: {note}")
        _predict_case(network, processing, case, path, wanted, device)
        seconds = time.perf_counter() - began
        windows = count_windows(case.grid, processing.patch, processing.overlap, processing.slice_axis)
        say(f"{path}: {seconds:.1f} s, {windows} windows of {seconds / windows:.3f} s")
    return [path for _, path in pairs]


def _joined(runs: Sequence[Path], flips: Sequence[int]) -> tuple[nn.Module, Processing]:
    """Return one network for some runs, and what they have in common."""
    found = [open_predictor(run) for run in runs]
    first = found[0].processing

    def essence(processing: Processing) -> dict[str, Any]:
        return asdict(replace(processing, seen=None, window_batch=1, largest_component=False))

    for run, other in zip(runs[1:], found[1:], strict=True):
        one, two = essence(first), essence(other.processing)
        if differing := [key for key in one if one[key] != two[key]]:
            key = differing[0]
            raise RunError(
                f"{run}: {key} is {two[key]}, and {one[key]} in {runs[0]}; runs of an ensemble must prepare images alike"
            )
    if beyond := [axis for axis in flips if not 0 <= axis < first.dimensions]:
        raise RecipeError(f"--flips {beyond[0]}: this network has the axes 0 to {first.dimensions - 1}")
    networks = [one.network for one in found]
    network = networks[0] if len(networks) == 1 else Ensemble(networks, regions=not first.exclusive)
    return (Averaged(network, first.task, flips=flips) if flips else network).eval(), first


# -- files --------------------------------------------------------------------------------------------------------------


def _suffix(path: Path, known: Sequence[str]) -> str:
    return next((suffix for suffix in known if path.name.lower().endswith(suffix)), "")


def _pairs(source: Path, target: Path, processing: Processing) -> Iterator[tuple[Path, Path]]:
    """Yield files and where their label maps go."""
    known = VOLUMES if processing.axes == 3 else PICTURES
    ending = ".nii.gz" if processing.axes == 3 else ".png"
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.is_file() and _suffix(path, known))
        if not files:
            raise DataError(f"{source}: no files of the kinds {', '.join(known)} in it")
        if target.resolve() == source.resolve():
            raise DataError(f"{target}: is the folder of the images; give another one")
    elif not source.is_file() or not _suffix(source, known):
        raise DataError(f"{source}: not a file of the kinds {', '.join(known)}, nor a folder of them")
    elif _suffix(target, VOLUMES if processing.axes == 3 else LOSSLESS):
        if target.resolve() == source.resolve():
            raise DataError(f"{target}: is the image itself; give another name")
        yield source, target
        return
    else:
        files = [source]
    seen: dict[str, Path] = {}
    for path in files:
        name = path.name[: -len(_suffix(path, known))]
        if name in seen:
            raise DataError(f"{path}: has the same name as {seen[name].name}; their label maps would be one file")
        seen[name] = path
        yield path, target / f"{name}{ending}"


def _extras(path: Path, wish: Wish) -> dict[str, Path]:
    """Return the further files of a case by what they hold."""
    volume = _suffix(path, VOLUMES)
    name = path.name[: -len(volume or path.suffix)]
    wanted = {"probabilities": wish.probabilities, "uncertainty": wish.uncertainty}
    return {what: path.with_name(f"{name}_{what}{volume or '.npz'}") for what, asked in wanted.items() if asked}


@dataclass(frozen=True)
class _Case:
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


def _read(path: Path, processing: Processing) -> _Case:
    """Return a case that is prepared as those of the run were.

    Raises:
        DataError: It cannot be read, or is no such image.
    """
    image, spacing, write = (_read_volume if processing.axes == 3 else _read_picture)(path, processing)
    for start in range(0, image.shape[1], CHUNK):
        if not np.isfinite(image[:, start : start + CHUNK]).all():
            raise DataError(f"{path}: the image holds NaN or infinite values; repair or remove it")
    shape, notes = tuple(image.shape[1:]), []
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
    return _Case(as_stored(image, processing.normalise), shape, write, tuple(notes))  # type: ignore[arg-type]  # one of three


def _read_volume(
    path: Path, processing: Processing
) -> tuple[NDArray[np.float32], tuple[float, ...], Callable[[Path, NDArray[Any]], None]]:
    """Return [C, x, y, z] in the run's orientation, the size of its voxels in mm, and what writes back."""
    try:
        file: Any = nib.load(path)
        raw = np.asanyarray(file.dataobj.get_unscaled())
    except (OSError, EOFError, ValueError, AttributeError, ImageFileError) as error:
        raise DataError(f"{path}: not a readable NIfTI file ({error})") from error
    while raw.ndim > 3 and raw.shape[-1] == 1 and raw.shape[-1] != processing.channels:
        raw = raw[..., 0]
    raw = raw[..., None] if raw.ndim == 3 else raw
    if raw.ndim != 4 or raw.shape[3] != processing.channels or 0 in raw.shape:
        raise DataError(
            f"{path}: has the shape {file.shape}; three axes and {processing.channels} channel(s) are needed, channels last"
        )
    turn = np.array([[0, 1], [1, 1], [2, 1]], float)
    own = io_orientation(file.affine)
    if processing.orientation is not None:
        turn = ornt_transform(own, axcodes2ornt(tuple(processing.orientation)))
    turned = apply_orientation(raw, turn)
    image = np.empty((raw.shape[3], *turned.shape[:3]), np.float32)
    for start in range(0, turned.shape[0], CHUNK):  # scaled numbers are float64: never of the whole image
        part = apply_read_scaling(turned[start : start + CHUNK], file.dataobj.slope, file.dataobj.inter)
        image[:, start : start + CHUNK] = np.moveaxis(part, 3, 0)
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


def _undo(array: NDArray[Any], back: NDArray[Any]) -> NDArray[Any]:
    """Return an array [x, y, z, …] with the axes of the file."""
    turned: NDArray[Any] = apply_orientation(array, back)
    return turned


def _read_picture(
    path: Path, processing: Processing
) -> tuple[NDArray[Any], None, Callable[[Path, NDArray[Any]], None]]:
    """Return [C, y, x] of a picture, and what writes back."""
    modes = {1: ("L", "I", "F", "I;16"), 3: ("RGB",), 4: ("RGBA",)}.get(processing.channels, ())
    try:
        with Image.open(path) as file:
            picture = file if file.mode in modes or not modes else file.convert(modes[0])
            array = np.asarray(picture)
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable picture ({error})") from error
    image = array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)
    if len(image) != processing.channels:
        raise DataError(f"{path}: has {len(image)} channel(s); this run was trained on {processing.channels}")

    def write(target: Path, values: NDArray[Any]) -> None:
        if target.suffix == ".npz":
            write_aside(target, lambda temporary: np.savez_compressed(temporary, values=values))
        else:
            write_aside(target, lambda temporary: Image.fromarray(values).save(temporary))

    return image if image.dtype == np.uint8 else image.astype(np.float32), None, write


# -- one case -----------------------------------------------------------------------------------------------------------


def _predict_case(network: nn.Module, processing: Processing, case: _Case, path: Path, wish: Wish, device: str) -> None:
    """Predict a case and write what is wanted of it."""
    whole = wish.probabilities or case.grid != case.shape
    label = np.empty(case.shape, np.uint8)
    entropy = np.empty(case.shape, np.float32) if wish.uncertainty else None
    axis = processing.slice_axis if processing.slice_axis is not None and processing.dimensions < processing.axes else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".labeleff-", dir=path.parent) as scratch, evaluating(network):
        classes, exclusive = processing.task.num_classes, processing.exclusive
        scores = _mapped(Path(scratch) / "grid", (classes, *case.grid)) if whole else None
        for place, slab in predict_slabs(
            network,
            torch.from_numpy(case.image),
            ndim=processing.dimensions,
            patch=processing.patch,
            overlap=processing.overlap,
            window_batch=processing.window_batch,
            slice_axis=processing.slice_axis,
            exclusive=processing.exclusive,
            device=device,
        ):
            where = (*[slice(None)] * axis, place)
            if scores is not None:
                scores[(slice(None), *where)] = slab.numpy()
            else:
                _take(slab, where, label, entropy, exclusive=exclusive)
        if scores is not None:
            if case.grid != case.shape:
                scores = _on_grid(scores, case.shape, Path(scratch) / "original")
            for start in range(0, case.shape[0], CHUNK):
                where = (slice(start, start + CHUNK),)
                part = torch.from_numpy(np.ascontiguousarray(scores[:, where[0]]))
                _take(part, where, label, entropy, exclusive=exclusive)
        if wish.largest_component:
            label = _cleaned(label, classes, exclusive=exclusive)
        extras = _extras(path, wish)
        if scores is not None and wish.probabilities:
            case.write(extras["probabilities"], scores)
        if entropy is not None:
            case.write(extras["uncertainty"], entropy)
        case.write(path, label)  # last: whoever finds it finds the others


def _take(
    probs: torch.Tensor,
    where: tuple[slice, ...],
    label: NDArray[np.uint8],
    entropy: NDArray[np.float32] | None,
    *,
    exclusive: bool,
) -> None:
    """Put the labels (and entropies) of a part [K, *S] where they belong. Entropies of regions are summed over them."""
    label[where] = segment(probs, exclusive=exclusive)
    if entropy is not None:
        values = -torch.xlogy(probs, probs).sum(0)
        if not exclusive:
            values = values - torch.xlogy(1 - probs, 1 - probs).sum(0)
        entropy[where] = values.numpy()


def _cleaned(label: NDArray[np.uint8], classes: int, *, exclusive: bool) -> NDArray[np.uint8]:
    """Return a label map with only the largest component of each class, or of each region."""
    given = torch.from_numpy(label)
    if exclusive:
        cleaned: NDArray[np.uint8] = largest_components(given[None], classes)[0].numpy()
        return cleaned
    regions = torch.stack([(given >> r) & 1 for r in range(classes)])  # each is a map of its own
    return bits_of((largest_components(regions, 2) > 0)[None])[0].numpy()


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    mapped: NDArray[np.float32] = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    return mapped


def _on_grid(scores: NDArray[np.float32], shape: tuple[int, ...], path: Path) -> NDArray[np.float32]:
    """Return probabilities [K, *S] on another grid, class by class, in a mapped file."""
    result = _mapped(path, (len(scores), *shape))
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    for index, one in enumerate(scores):
        given = torch.from_numpy(np.ascontiguousarray(one))[None, None]
        result[index] = F.interpolate(given, size=shape, mode=mode, align_corners=False)[0, 0].numpy()
    return result
