"""Prediction of files that no run has seen, in the geometry they came in.

Scores are made in slabs (:func:`labeleff.evaluation.inference.predict_slabs`): what is held is the image, its label map and
one window's length of scores. Where scores of the whole case are needed, they lie in a file that is mapped, not in memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from labeleff.backbones.views import Ensemble
from labeleff.data.store import CHUNK
from labeleff.errors import DataError, RecipeError, RunError
from labeleff.evaluation.averaging import Averaged
from labeleff.evaluation.inference import count_windows, evaluating, predict_slabs, segment
from labeleff.functional.regions import bits_of, largest_components
from labeleff.functional.resizing import resized
from labeleff.predictor import Processing, open_predictor
from labeleff.unseen import VOLUMES, Unseen, ending_of, images_of, read_unseen


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
    """Predict a file or every image of a folder, and return the label maps written, each whole or not there.

    Args:
        runs: Directories of finished runs (or their ``predictor.safetensors``); of several the mean probability is taken.
        source: NIfTI, or for networks of 2-D images PNG, TIFF or JPEG; a folder of such, or of DICOM series; or a manifest
            (.json), all cases of it. In a folder, channels of an image may be files of their own: ``NAME_0000.nii.gz``,
            ``NAME_0001.nii.gz`` …, or with the endings that the recipe's data set names (``data.dataset.channels``).
        target: A file for a file, otherwise a folder.
        wish: What is written.
        device: ``auto``, ``cpu``, ``cuda``, …
        say: Called with one line for each case, and with what is worth knowing.

    Raises:
        RunError: A run has no predictor, or runs differ in how they prepare images.
        DataError: A file cannot be used, or would be overwritten.
    """
    wanted = wish or Wish()
    network, processing, endings = _joined(runs, wanted.flips)
    device = _moved(network, device)
    if processing.largest_component and not wanted.largest_component:
        say("evaluation of this run kept only the largest component of each class; here: --largest-component")
    pairs = images_of(source, target, processing, endings)
    for _, path in pairs:  # found before anything is computed
        if path.parent.exists() and not path.parent.is_dir():
            raise DataError(f"{path.parent}: is a file, and label maps go into a folder; give another place")
        for out in (path, *_extras(path, wanted).values()):
            if out.exists() and not wanted.overwrite:
                raise DataError(f"{out}: is there already; give another place, or --overwrite")
    for files, path in pairs:
        began = time.perf_counter()
        case = read_unseen(files, processing)
        for note in case.notes:
            say(f"{files[0].name}: {note}")
        _predict_case(network, processing, case, path, wanted, device)
        seconds = time.perf_counter() - began
        windows = count_windows(case.grid, processing.patch, processing.overlap, processing.slice_axis)
        say(f"{path}: {seconds:.1f} s, {windows} windows of {seconds / windows:.3f} s")
    return [path for _, path in pairs]


def _moved(network: nn.Module, device: str) -> str:
    """Move a network to a device, and return which.

    Raises:
        RecipeError: There is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was made without CUDA
        reason = str(error).split(",")[0].splitlines()[0]
        raise RecipeError(
            f"--device {device}: cannot be used here ({reason}); give auto, cpu, cuda or cuda:N"
        ) from error
    return device


def _joined(runs: Sequence[Path], flips: Sequence[int]) -> tuple[nn.Module, Processing, tuple[str, ...]]:
    """Return one network for some runs, what they have in common, and the endings of channel files in the first one's data."""
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
    named = found[0].recipe.data.dataset.options.get("channels")
    endings = tuple(map(str, named)) if isinstance(named, list | tuple) else ()
    return (Averaged(network, first.task, flips=flips) if flips else network).eval(), first, endings


def _extras(path: Path, wish: Wish) -> dict[str, Path]:
    """Return the further files of a case by what they hold."""
    volume = ending_of(path, VOLUMES)
    name = path.name[: -len(volume or path.suffix)]
    wanted = {"probabilities": wish.probabilities, "uncertainty": wish.uncertainty}
    return {what: path.with_name(f"{name}_{what}{volume or '.npz'}") for what, asked in wanted.items() if asked}


# -- one case -----------------------------------------------------------------------------------------------------------


def _predict_case(
    network: nn.Module, processing: Processing, case: Unseen, path: Path, wish: Wish, device: str
) -> None:
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
    for index, one in enumerate(scores):
        given = torch.from_numpy(np.ascontiguousarray(one))[None, None]
        result[index] = resized(given, shape, align_corners=False)[0, 0].numpy()
    return result
