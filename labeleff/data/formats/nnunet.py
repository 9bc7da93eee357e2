"""nnU-Net's raw data sets: ``dataset.json``, ``imagesTr/NAME_0000.nii.gz`` and ``labelsTr/NAME.nii.gz``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from labeleff.batch import IGNORE
from labeleff.data.formats import picture_files
from labeleff.data.formats.base import data_folder
from labeleff.data.formats.files import (
    FileSet,
    patient_expression,
    patient_of,
    read_json,
    readable,
    visible,
    with_headers,
)
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError
from labeleff.registry import register


class Described(FileSet):
    """A folder that a ``dataset.json`` describes."""

    def __init__(
        self, *, path: str, patient_pattern: str = "(.*)", unlabelled_tests: bool = False, slice_axis: int = 2
    ) -> None:
        super().__init__()
        self.pattern = patient_expression(patient_pattern)
        self.path, self.unlabelled_tests, self.slice_axis = path, unlabelled_tests, slice_axis


@register("dataset", "nnunet")
class NnUNet(Described):
    """nnU-Net's raw layout, versions 1 and 2: ``dataset.json``, ``imagesTr/NAME_0000.nii.gz`` …, ``labelsTr/NAME.nii.gz``.

    Channels are files with a number of four digits, or one picture in colour; ``file_ending`` is NIfTI, PNG, TIFF or BMP. The
    label ``ignore`` becomes unknown; names that stand for several values are regions that overlap. Images of ``imagesTr``
    without a label are unlabelled. ``imagesTs`` is the test where ``labelsTs`` has its labels. An explicit list of cases under
    ``dataset`` is followed, in its order (``data.labelled: first:N``). The patient of a case is found in ``patients.csv``
    (columns case, patient) where there is one, else in the name.

    Args:
        path: The folder ``DatasetNNN_NAME``, absolute or relative to ``LABELEFF_DATA``.
        patient_pattern: Regular expression whose first group is the patient in a case's name; default: the whole name.
        unlabelled_tests: Learn from the images of ``imagesTs`` that have no label; else they are left out.
        slice_axis: Axis along which a 2-D network sees slices.
    """

    def rows(self) -> Manifest:
        """Return the cases of training and test.

        Raises:
            DataError: ``dataset.json`` or a file it promises is missing.
        """
        folder = data_folder(self.path)
        spec = read_json(folder / "dataset.json", "nnU-Net's description of the data set")
        ending = spec.get("file_ending", ".nii.gz")
        if not isinstance(ending, str) or not readable(Source(Path(f"x{ending}"))):
            raise DataError(
                f"{folder / 'dataset.json'}: file_ending is {ending!r}, which is not read; convert to .nii.gz"
            )
        axes = 2 if picture_files.is_picture(Path(f"x{ending}")) else 3
        classes, values, overlapping = classes_of(folder / "dataset.json", spec)
        names = spec.get("channel_names", spec.get("modality"))
        if not isinstance(names, dict) or not names:
            raise DataError(
                f'{folder / "dataset.json"}: channel_names is missing; it numbers the channels: {{"0": "T2"}}'
            )
        patient, cases = patient_of(folder, self.pattern), []
        for name, images, label, role in self._files(folder, spec, ending):
            if len(images) != len(names) and not (axes == 2 and len(images) == 1 and len(names) == 3):
                raise DataError(
                    f"{folder}: case {name!r} has {len(images)} channel files, dataset.json names {len(names)} channels"
                )
            source = Source(label, values=values) if label is not None else None
            cases.append(Case(name, patient(name), tuple(map(Source, images)), source, "", role))
        if not cases:
            raise DataError(f"{folder / 'imagesTr'}: no images NAME_0000{ending}")
        with_spacing, channels = with_headers(cases, axes=axes, where=str(folder))
        slice_axis = self.slice_axis if axes == 3 else 0
        return Manifest(
            _name(spec, folder),
            with_spacing,
            classes,
            axes,
            channels,
            slice_axis,
            _in_order(cases) if isinstance(spec.get("dataset"), dict) else (),
            overlapping=overlapping,
        )

    def _files(
        self, folder: Path, spec: Mapping[str, Any], ending: str
    ) -> Iterator[tuple[str, list[Path], Path | None, Role]]:
        """Yield name, channel files, label and role of every case."""
        listed = spec.get("dataset")
        if isinstance(listed, dict):
            for name, entry in listed.items():
                if not isinstance(entry, dict) or not isinstance(entry.get("images"), list):
                    raise DataError(
                        f"{folder / 'dataset.json'}: dataset.{name} needs images, a list of files, and label"
                    )
                label = entry.get("label")
                yield (
                    name,
                    [_listed(p, folder, name) for p in entry["images"]],
                    label and _listed(label, folder, name),
                    "train",
                )
        else:
            labels = _by_name(folder / "labelsTr", ending)
            images = _channel_files(folder / "imagesTr", ending)
            for name in labels.keys() - images.keys():
                raise DataError(
                    f"{labels[name]}: a label without an image {name}_0000{ending} in {folder / 'imagesTr'}"
                )
            for name, files in images.items():
                yield name, files, labels.get(name), "train"
            if without := len(images.keys() - labels.keys()):
                self.notes.append(f"{without} images of imagesTr have no label: they are unlabelled")
        yield from self._tests(folder, ending)

    def _tests(self, folder: Path, ending: str) -> Iterator[tuple[str, list[Path], Path | None, Role]]:
        images, labels = _channel_files(folder / "imagesTs", ending), _by_name(folder / "labelsTs", ending)
        bare = [name for name in images if name not in labels]
        for name, files in images.items():
            if name in labels:
                yield name, files, labels[name], "test"
            elif self.unlabelled_tests:
                yield name, files, None, "train"
        self.notes += without_labels("imagesTs", bare, learnt_from=self.unlabelled_tests)


def without_labels(where: str, names: list[str], *, learnt_from: bool) -> list[str]:
    """Return what is said of test images whose labels nobody has."""
    if not names:
        return []
    if learnt_from:
        return [f"{len(names)} images of {where} have no label: they are learnt from, unlabelled"]
    return [f"{len(names)} images of {where} have no label: left out (the option unlabelled_tests learns from them)"]


def classes_of(path: Path, spec: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...], bool]:
    """Return the classes of a ``dataset.json``, which class each stored value is, and whether they overlap.

    The second is empty where values are the classes' own numbers. Both ways of writing are read: names to numbers (version 2),
    numbers to names (version 1, Decathlon). Where a name stands for several values, every name is a region that may overlap
    others, and a value is the set of those that it belongs to, one bit each.

    Raises:
        DataError: There are no labels, or they are no whole numbers.
    """
    labels = spec.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise DataError(f'{path}: labels is missing; it says what the values are: {{"background": 0, "organ": 1}}')
    named: dict[str, list[int]] = {}
    for one, two in labels.items():
        name, value = (two, one) if str(one).isdigit() and isinstance(two, str) else (one, two)
        values = value if isinstance(value, list) else [value]
        if not values or not all(str(v).isdigit() for v in values):
            raise DataError(f"{path}: labels.{name} is {value!r}; it is a whole number, 0 or more, or a list of them")
        named[str(name)] = [int(v) for v in values]
    unknown = named.pop("ignore", [])
    background = next((name for name, values in named.items() if values == [0]), None)
    if background is None:
        raise DataError(f"{path}: labels has no value 0, which is the background")
    del named[background]
    if not named:
        raise DataError(f"{path}: labels names no class beside the background")
    ignored = tuple((value, IGNORE) for value in unknown)
    if any(len(values) > 1 for values in named.values()):
        stored = sorted({value for values in named.values() for value in values})
        bits = [sum(1 << r for r, values in enumerate(named.values()) if value in values) for value in stored]
        return (background, *named), ((0, 0), *zip(stored, bits, strict=True), *ignored), True
    order = sorted(named, key=lambda name: named[name])
    pairs = ((0, 0), *((named[name][0], index) for index, name in enumerate(order, start=1)), *ignored)
    return (background, *order), () if all(value == index for value, index in pairs) else pairs, False


def _in_order(cases: Sequence[Case]) -> tuple[str, ...]:
    """Return the labelled patients of a training list in its order: the first N of them are a budget."""
    return tuple(dict.fromkeys(case.patient for case in cases if case.role == "train" and case.has_label))


def _name(spec: Mapping[str, Any], folder: Path) -> str:
    name = spec.get("name")
    return name if isinstance(name, str) and name else folder.resolve().name


def _listed(value: Any, folder: Path, name: str) -> Path:
    path = folder / os.path.expandvars(str(value))
    if not path.is_file():
        raise DataError(f"case {name!r}: {path}: named in dataset.json, but there is no such file")
    return path


def _by_name(folder: Path, ending: str) -> dict[str, Path]:
    return {path.name.removesuffix(ending): path for path in visible(folder, f"*{ending}")}


def _channel_files(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Return the files of every case, in the order of their numbers."""
    found: dict[str, list[Path]] = {}
    for path in visible(folder, f"*_[0-9][0-9][0-9][0-9]{ending}"):
        found.setdefault(path.name.removesuffix(ending)[:-5], []).append(path)
    for name, files in found.items():
        numbers = [int(path.name.removesuffix(ending)[-4:]) for path in files]
        if numbers != list(range(len(files))):
            raise DataError(
                f"{folder}: case {name!r} has the channels {numbers}; they are numbered from 0 without gaps"
            )
    return found


@register("dataset", "decathlon")
class Decathlon(Described):
    """Medical Segmentation Decathlon: ``dataset.json`` with lists of cases, files with the channels as their fourth axis.

    ``training`` gives the labelled cases in order (``data.labelled: first:N``; an entry without ``label`` is unlabelled),
    ``test`` images whose labels are not public. The patient of a case is found in ``patients.csv`` (columns case, patient)
    where there is one, else in the name.

    Args:
        path: The folder ``TaskNN_NAME``, absolute or relative to ``LABELEFF_DATA``.
        patient_pattern: Regular expression whose first group is the patient in a case's name; default: the whole name.
        unlabelled_tests: Learn from the test images, unlabelled; else they are left out.
        slice_axis: Axis along which a 2-D network sees slices.
    """

    def rows(self) -> Manifest:
        """Return the cases of the two lists.

        Raises:
            DataError: ``dataset.json`` is missing or damaged, or names a file that is not there.
        """
        folder = data_folder(self.path)
        place = folder / "dataset.json"
        spec = read_json(place, "the Decathlon's description of the data set")
        classes, values, overlapping = classes_of(place, spec)
        patient = patient_of(folder, self.pattern)
        cases, bare = [], []
        for key in ("training", "test"):
            entries = spec.get(key, [])
            if not isinstance(entries, list):
                raise DataError(f"{place}: {key} is {type(entries).__name__}; it is a list of cases")
            for entry in entries:
                one = entry if isinstance(entry, dict) else {"image": entry}
                name = _bare(str(one.get("image", "")))
                image = _listed(one.get("image", ""), folder, name)
                label = one.get("label")
                source = Source(_listed(label, folder, name), values=values) if label else None
                case = Case(name, patient(name), (Source(image),), source, "", "train" if key == "training" else "test")
                if key == "test" and source is None:
                    bare.append(case)
                else:
                    cases.append(case)
        if self.unlabelled_tests:
            cases += [replace(case, role="train") for case in bare]
        self.notes += without_labels("test", [case.id for case in bare], learnt_from=self.unlabelled_tests)
        with_spacing, channels = with_headers(cases, axes=3, where=str(folder))
        named = spec.get("modality")
        if isinstance(named, dict) and len(named) != channels:
            self.notes.append(f"dataset.json names {len(named)} modalities, the images have {channels} channels")
        return Manifest(
            _name(spec, folder),
            with_spacing,
            classes,
            3,
            channels,
            self.slice_axis,
            _in_order(cases),
            overlapping=overlapping,
        )


def _bare(path: str) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")
