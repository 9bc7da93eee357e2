"""``labeleff export-labels``: the labels that a run has come to, as a data set that others train on. Test labels never leave."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from labeleff import registry
from labeleff.asking import current_label
from labeleff.batch import IGNORE
from labeleff.bundle.geometry import affine_of, write_nifti
from labeleff.corruption import written
from labeleff.data.annotations import AnnotationStore
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case, Manifest, write_manifest
from labeleff.data.rounds import Rounds
from labeleff.errors import DataError, RunError
from labeleff.files import write_aside, write_csv, write_json
from labeleff.labels import nearest
from labeleff.rundir import recipe_of


@dataclass(frozen=True)
class _Run:
    """A run's cases, and what is known of them now."""

    name: str
    dataset: DataSet
    manifest: Manifest
    split: Mapping[str, Any]
    annotations: AnnotationStore
    rounds: Rounds

    def cases(self, *parts: str) -> Iterator[Case]:
        """Yield the cases of some parts of the split."""
        for part in parts:
            yield from map(self.manifest.case, self.split[part])

    def label(self, case: Case, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
        """Return the label [*shape] of a training case on the grid it came in; None where nobody has said anything."""
        label = current_label(self.annotations, self.rounds, case.id)
        return nearest(label, shape) if (label != IGNORE).any() else None


def export_labels(run: Path, kind: Literal["nnunet", "manifest"], folder: Path) -> list[str]:
    """Write the current labels of a run (given, corrected, pseudo, answered) as a data set, and return what to say of it.

    Args:
        run: The run directory; it need not be finished.
        kind: ``nnunet``: version 2 of its raw layout, images copied. Voxels without a label are its ``ignore`` label, the
            highest number; regions that overlap become its regions, one value for every set of them. Images of the test go
            to ``imagesTs``; cases that nobody has labelled are left out, since nnU-Net trains on none. ``manifest``: a
            manifest and its labels; images stay where they are, unlabelled cases stay unlabelled, and test cases keep
            pointing at their own labels where the format has files to point at.
        folder: A folder that is new or empty.

    Raises:
        RunError: There is no such run, no label in it, or the folder holds something already.
        DataError: The data have changed, or cannot be written in this form.
    """
    found = _open(run)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: not empty; labels are exported to a folder of their own")
    return (_as_nnunet if kind == "nnunet" else _as_manifest)(found, folder)


def _open(run: Path) -> _Run:
    recipe = recipe_of(run)
    try:
        split = json.loads((run / "split.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{run / 'split.json'}: cannot be read ({error}); of a run with folds, give one of them"
        ) from error
    dataset: DataSet = registry.made("dataset", recipe.data.dataset)
    annotations = AnnotationStore.open(run / "annotations")
    return _Run(recipe.name, dataset, dataset.manifest(), split, annotations, Rounds(run))


# -- nnU-Net ------------------------------------------------------------------------------------------------------------


def _as_nnunet(run: _Run, folder: Path) -> list[str]:
    """Write ``imagesTr``, ``labelsTr``, ``imagesTs``, ``patients.csv`` and, last, ``dataset.json``."""
    values = _Values.of(run)
    ending = ".nii.gz" if run.manifest.axes == 3 else ".tif"
    kept: list[Case] = []
    for case in run.cases("labelled", "unlabelled"):
        image = run.dataset.read_image(case)
        label = run.label(case, image.shape[1:])
        if label is not None:
            _write_images(folder / "imagesTr", run, case, image, ending)
            _write(folder / "labelsTr" / f"{case.id}{ending}", values.stored(label), run, case)
            kept.append(case)
    if not kept:
        raise RunError(f"{run.name}: nobody has labelled anything in this run; there is nothing to export")
    tests = list(run.cases("test"))
    for case in tests:
        _write_images(folder / "imagesTs", run, case, run.dataset.read_image(case), ending)
    people = [{"case": case.id, "patient": case.patient} for case in (*kept, *tests)]
    write_csv(folder / "patients.csv", ("case", "patient"), people)
    description = {
        "name": run.manifest.name,
        "description": f"labels of the labeleff run {run.name}, revision {run.annotations.revision}",
        "channel_names": {str(number): f"channel_{number}" for number in range(run.manifest.channels)},
        **values.described(),
        "numTraining": len(kept),
        "file_ending": ending,
    }
    write_json(folder / "dataset.json", description)
    return _said(run, folder, kept, tests, values)


def _said(run: _Run, folder: Path, kept: Sequence[Case], tests: Sequence[Case], values: _Values) -> list[str]:
    without = len(run.split["labelled"]) + len(run.split["unlabelled"]) - len(kept)
    lines = [f"{folder}: {len(kept)} labelled cases, {len(tests)} images of the test without labels"]
    if values.partial:
        lines.append(f"voxels that nobody has labelled are the label ignore ({values.ignore})")
    if without:
        lines.append(f"{without} training cases have no label at all and are left out: nnU-Net trains on none")
    if run.split["validation"]:
        lines.append(f"{len(run.split['validation'])} validation cases are left out: nnU-Net makes parts of its own")
    lines.append('intensities: where they are Hounsfield units, write "CT" for the channel in dataset.json')
    if not re.fullmatch(r"Dataset\d{3}_.+", folder.resolve().name):
        lines.append("nnU-Net looks for folders named DatasetNNN_NAME below nnUNet_raw: rename it")
    return lines


def _write_images(folder: Path, run: _Run, case: Case, image: NDArray[Any], ending: str) -> None:
    for number, channel in enumerate(image):
        _write(folder / f"{case.id}_{number:04d}{ending}", channel, run, case)


def _write(path: Path, array: NDArray[Any], run: _Run, case: Case) -> None:
    """Write voxels in the geometry of a case; 2-D images as TIFF, which holds real numbers too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 3:
        if array.dtype != np.uint8 and np.abs(array).max() < 2**15 and not (array % 1).any():
            array = array.astype(np.int16)  # what came as whole numbers takes half the room
        write_nifti(path, array, affine_of(run.dataset, case, 3))
    else:
        write_aside(path, lambda temporary: Image.fromarray(array).save(temporary, format="TIFF"))


@dataclass(frozen=True)
class _Values:
    """Which number stands for what in the files.

    Args:
        classes: Names, background first.
        sets: Of regions that overlap: the sets of regions that occur, as bits, value 1 first; None: classes exclude one another.
        partial: Somewhere nobody has said anything.
    """

    classes: tuple[str, ...]
    sets: tuple[int, ...] | None
    partial: bool

    @classmethod
    def of(cls, run: _Run) -> _Values:
        """Look at all labels of a run.

        Raises:
            DataError: A class bears a name that has a meaning of its own.
        """
        classes = ("background", *run.manifest.classes[1:])
        if taken := {"background", "ignore"} & set(classes[1:]):
            raise DataError(
                f"{run.manifest.name}: nnU-Net means something else by a class named {min(taken)}; rename it"
            )
        seen = np.zeros(IGNORE + 1, bool)
        for case in run.cases("labelled", "unlabelled"):
            label = current_label(run.annotations, run.rounds, case.id)
            if (label != IGNORE).any():
                seen[np.unique(label)] = True
        if not run.manifest.overlapping:
            return cls(classes, None, bool(seen[IGNORE]))
        return cls(classes, _sets(np.flatnonzero(seen[1:IGNORE]) + 1, len(classes) - 1), bool(seen[IGNORE]))

    @property
    def ignore(self) -> int:
        """The number of what nobody has labelled: the highest."""
        return len(self.classes) if self.sets is None else len(self.sets) + 1

    def stored(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a label with the numbers of the files."""
        table = np.arange(IGNORE + 1, dtype=np.uint8)
        for value, bits in enumerate(self.sets or (), start=1):
            table[bits] = value
        table[IGNORE] = self.ignore
        found: NDArray[np.uint8] = table[label]
        return found

    def described(self) -> dict[str, Any]:
        """Return the entries of ``dataset.json``.

        nnU-Net writes its prediction of regions into one map in the order of ``regions_class_order``, later ones over earlier
        ones: a region comes after those that contain it, and its value is that of the smallest set it is in.
        """
        ignored = {"ignore": self.ignore} if self.partial else {}
        if self.sets is None:
            return {"labels": {name: value for value, name in enumerate(self.classes)} | ignored}
        bits = {name: 1 << number for number, name in enumerate(self.classes[1:])}
        within = {name: [v for v, one in enumerate(self.sets, start=1) if one & bit] for name, bit in bits.items()}
        order = sorted(within, key=lambda name: -len(within[name]))  # what contains another is in more sets
        size = {value: one.bit_count() for value, one in enumerate(self.sets, start=1)}
        return {
            # a list of one number is taken for background by nnU-Net
            "labels": {
                "background": 0,
                **{name: within[name] if len(within[name]) > 1 else within[name][0] for name in order},
                **ignored,
            },
            "regions_class_order": [min(within[name], key=lambda v: (size[v], v)) for name in order],
        }


def _sets(present: Sequence[int] | NDArray[np.int64], regions: int) -> tuple[int, ...]:
    """Return the sets of regions that get a value: those that occur, and each region alone where it never does.

    A file in which no region has two values would say that they exclude one another: then all regions at once get one too.
    """
    found, alone = {int(bits) for bits in present}, [1 << r for r in range(regions)]
    found |= {one for one in alone if not any(bits & one for bits in found)}
    if regions > 1 and all(sum(bool(bits & one) for bits in found) < 2 for one in alone):
        found |= {*alone, (1 << regions) - 1}
    return tuple(sorted(found))


# -- manifest -----------------------------------------------------------------------------------------------------------


def _as_manifest(run: _Run, folder: Path) -> list[str]:
    """Write ``labels/``, images where no file can be named, and, last, ``manifest.json``."""
    cases, kept = [], 0
    for case in run.cases("labelled", "unlabelled"):
        label = run.label(case, run.dataset.read_image(case).shape[1:])
        kept += label is not None
        cases.append(written(replace(case, label=None, raters=()), run.dataset, folder, label))
    named = "label" in run.dataset.verbatim  # where a manifest can point at label files, these are not read
    for case in run.cases("validation"):
        cases.append(replace(written(case, run.dataset, folder, None), role="validation"))
    for case in run.cases("test") if run.split["evaluate_on"] == "test" else ():
        bare = written(replace(case, label=None, raters=()), run.dataset, folder, None)
        cases.append(replace(case, image=bare.image) if named else bare)
    path = folder / "manifest.json"
    write_manifest(replace(run.manifest, name=f"{run.manifest.name}-{run.name}", cases=tuple(cases)), path)
    return [
        f"{path}: {kept} of {len(cases)} cases have labels of this run; use it with data.dataset: {{name: manifest, path: …}}"
    ]
