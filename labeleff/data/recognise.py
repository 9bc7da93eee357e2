"""From a folder to a manifest: the layout is recognised, and what was understood and what was not is said in words."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from labeleff import registry
from labeleff.batch import IGNORE, derive_seed
from labeleff.data.formats import nifti_files, picture_files
from labeleff.data.formats.dicom_files import holds_dicom
from labeleff.data.formats.files import FileSet, described, patient_expression, patient_of
from labeleff.data.manifest import ROLES, Case, Manifest, Source, read_manifest, write_manifest
from labeleff.data.pairing import Paired, Pairing, pair
from labeleff.errors import DataError, SplitError

MANY = 64
"""A label file with more values than this is taken for an image."""
_PARTS_OF_A_PATIENT = re.compile(
    r"(sub-[A-Za-z0-9]+)|(.+?)[_-]?(?:slice|frame|tile|patch|crop|visit|scan|timepoint|time|session|ses|phase)[_-]?\d",
    re.IGNORECASE,
)
_SHOWN = 8
_FOUR = "[0-9][0-9][0-9][0-9]"
_BY_FILES: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("acdc", "ACDC as its publishers distribute it", ("**/patient[0-9][0-9][0-9]/Info.cfg",), ()),
    ("acdc_h5", "ACDC as SSL4MIS's authors converted it", ("train.list", "data/patient*_frame*.h5"), ()),
    ("left_atrium_h5", "the left-atrium release of UA-MT's authors", ("train.list", "*/mri_norm2.h5"), ()),
    ("segthor", "SegTHOR as its publishers distribute it", ("**/Patient_[0-9][0-9]/GT.nii*",), ("unlabelled_tests",)),
    ("btcv", "BTCV", (f"**/img{_FOUR}.nii*", f"**/label{_FOUR}.nii*"), ("unlabelled_tests",)),
    ("nih_pancreas", "NIH Pancreas-CT", (f"**/PANCREAS_{_FOUR}*.nii*", f"**/label{_FOUR}.nii*"), ()),
    ("mmwhs", "whole hearts of MM-WHS", (f"**/[cm][tr]_train_{_FOUR}_image.nii*",), ("test",)),
    ("ivdm3seg", "intervertebral discs of IVDM3Seg", ("**/[0-9]*_wat.nii*", "**/[0-9]*_[Ll]abels.nii*"), ("test",)),
    ("prostate", "prostates of several sites", ("RUNMC/Case[0-9][0-9].nii*", "BMC/Case[0-9][0-9].nii*"), ("test",)),
)
"""Layouts that are known by the names of their files: the format, what to call it, its files, and the options it gets from here."""


@dataclass(frozen=True)
class Choices:
    """What a folder does not tell.

    Args:
        name: Name of the data set; default: the folder's, or what it says itself.
        classes: Names, background first, in the order of the stored values.
        ignore: Stored value of voxels that nobody has labelled.
        patient_pattern: Regular expression whose first group is the patient in a case's name.
        test: Patients that are held out as a test where the folder has none, drawn by their names.
        domain: Site, scanner or stain of all cases.
        prefix: Put in front of the names of cases and patients, where two folders use the same ones for different people.
        unlabelled_tests: Learn from test images that have no label; else they are left out.
        overlapping: Structures with a mask each do not exclude one another.
        values: What stored values stand for, of a data set that cases are added to.
    """

    name: str = ""
    classes: tuple[str, ...] = ()
    ignore: int | None = None
    patient_pattern: str = ""
    test: int = 0
    domain: str = ""
    prefix: str = ""
    unlabelled_tests: bool = False
    overlapping: bool = False
    values: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Understood:
    """A manifest and what must be said of it."""

    manifest: Manifest
    layout: str
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def index_folder(folder: Path, choices: Choices | None = None) -> Understood:
    """Return the manifest of a folder in any layout that is known, or of a table (.csv) of files.

    Values of training labels are looked at, those of others not.

    Raises:
        DataError: The layout is not recognised, or contradicts itself.
    """
    chosen = choices or Choices()
    if folder.suffix == ".csv" and folder.is_file():
        found = _of_table(folder, chosen)
    elif not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    else:
        named = _named_layout(folder, chosen) or _series(folder, chosen)
        if named and "test" in named[2]:
            chosen = replace(chosen, test=0)  # the format holds them out
        found = _of_format(folder, chosen, *named) if named else _of_pairs(folder, chosen)
    manifest = found.manifest
    if chosen.name:
        manifest = replace(manifest, name=chosen.name)
    if chosen.domain or chosen.prefix:
        manifest = replace(
            manifest,
            cases=tuple(
                replace(
                    case,
                    id=chosen.prefix + case.id,
                    patient=chosen.prefix + case.patient,
                    domain=chosen.domain or case.domain,
                )
                for case in manifest.cases
            ),
            official=tuple(chosen.prefix + patient for patient in manifest.official),
        )
    return _held_out(replace(found, manifest=manifest), chosen.test)


def write_index(folder: Path, path: Path, choices: Choices | None = None) -> list[str]:
    """Write the manifest of a folder, and return what was understood, line by line.

    Raises:
        DataError: The layout is not recognised, or the file exists.
    """
    if path.exists():
        raise DataError(f"{path}: exists already; labeleff add appends cases to it, or give --out another name")
    found = index_folder(folder, choices)
    write(found.manifest, path)
    return [*in_words(found), f"written: {path}; look for trouble in it with: labeleff audit {path}"]


def add_folder(path: Path, folder: Path, choices: Choices | None = None) -> list[str]:
    """Append the cases of a folder to a manifest file, and return what was done, line by line.

    What is there stays as it is, order and roles included. A new case of a known patient gets the patient's role: a case of a
    test patient is for the test. A case that is there already, file by file, gains a label where it had none.

    Raises:
        DataError: The folder's classes, axes or channels are others, or a name is taken by another file.
        SplitError: A test case of the folder is of a patient that is learnt from.
    """
    old = read_manifest(path)
    chosen = choices or Choices()
    chosen = replace(chosen, overlapping=old.overlapping, classes=chosen.classes or old.classes)
    if not chosen.values:
        sources = [source for case in old.cases if (source := case.label) is not None and source.mask_of is None]
        chosen = replace(chosen, values=sources[0].values if sources else ())
    found = index_folder(folder, chosen)
    merged, said = _merged(old, found.manifest, str(folder))
    write(merged, path)
    return [f"{folder}: {found.layout}", *found.notes, *_shortened(found.left_out, "left out: "), *said]


def write(manifest: Manifest, path: Path) -> None:
    """Write a manifest file.

    Raises:
        DataError: It cannot be written.
    """
    try:
        write_manifest(manifest, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another place with --out") from error


def in_words(found: Understood) -> list[str]:
    """Return what was understood of a folder, for people, a line each."""
    manifest = found.manifest
    cases, labelled = manifest.cases, [case for case in manifest.cases if case.has_label]
    overlap = " (regions that may overlap)" if manifest.overlapping else ""
    lines = [
        f"{manifest.name}: {found.layout}",
        f"{len(cases)} cases of {len({case.patient for case in cases})} patients, {manifest.axes}-D, "
        f"{manifest.channels} channel{'s' if manifest.channels > 1 else ''}: {len(labelled)} labelled, "
        f"{len(cases) - len(labelled)} without a label",
        f"classes: {', '.join(manifest.classes)}{overlap}",
    ]
    roles = Counter(case.role for case in cases)
    lines.append("roles: " + ", ".join(f"{count} {role}" for role, count in roles.items()))
    if domains := Counter(case.domain for case in cases if case.domain):
        lines.append("domains: " + ", ".join(f"{name} ({count})" for name, count in domains.items()))
    known = [case.spacing for case in cases if case.spacing is not None]
    if known:
        middle = " × ".join(f"{median(axis):g}" for axis in zip(*known, strict=True))
        lines.append(f"spacing: {middle} mm (median per axis)")
    else:
        lines.append("spacing: not known; distances will be in voxels")
    if not roles["test"]:
        lines.append(
            "no test: hold patients out with --test N, or in a recipe with evaluation.folds, or data.evaluate_on: development"
        )
    return [*lines, *found.notes, *_shortened(found.left_out, "left out: ")]


def _shortened(lines: Sequence[str], start: str) -> list[str]:
    more = [f"{start}{len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [*(f"{start}{line}" for line in lines[:_SHOWN]), *more]


# -- layouts with a name ------------------------------------------------------------------------------------------------


def _named_layout(folder: Path, chosen: Choices) -> tuple[str, str, dict[str, object]] | None:
    """Return the registered format of a folder, what to call it, and its options."""
    more: dict[str, object] = {"unlabelled_tests": chosen.unlabelled_tests}
    if chosen.patient_pattern:
        more["patient_pattern"] = chosen.patient_pattern
    if (folder / "dataset.json").is_file():
        try:
            spec = json.loads((folder / "dataset.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{folder / 'dataset.json'}: cannot be read ({error})") from error
        listed = isinstance(spec, dict) and isinstance(spec.get("training"), list)
        numbered = next((folder / "imagesTr").glob("[!.]*_0000.*"), None)
        if listed and numbered is None:
            return "decathlon", "a Medical Segmentation Decathlon task", more
        return "nnunet", "an nnU-Net raw data set", more
    for name, layout, patterns, options in _BY_FILES:
        if all(next(folder.glob(pattern), None) for pattern in patterns):
            given = {"unlabelled_tests": chosen.unlabelled_tests, **({"test": chosen.test} if chosen.test else {})}
            return name, layout, {key: value for key, value in given.items() if key in options}
    if ((folder / "index.csv").is_file() or (folder / "train.list").is_file()) and next(folder.glob("*.npz"), None):
        return "compact", "a compact set of .npz files", {}
    if (folder / "leftImg8bit").is_dir():
        raise DataError(
            f"{folder}: Cityscapes; name it in a recipe: data.dataset: {{name: cityscapes, path: {folder}}}"
        )
    return None


def _series(folder: Path, chosen: Choices) -> tuple[str, str, dict[str, object]] | None:
    """Return the format of a folder of DICOM files."""
    if not holds_dicom(folder):
        return None
    asked: dict[str, object] = {"patient_pattern": chosen.patient_pattern, "classes": chosen.classes}
    return "dicom", "DICOM series", {key: value for key, value in asked.items() if value}


def _of_format(folder: Path, chosen: Choices, name: str, layout: str, options: Mapping[str, object]) -> Understood:
    dataset = registry.build("dataset", name, path=str(folder.resolve()), **options)
    manifest: Manifest = dataset.manifest()
    if chosen.classes and chosen.classes != manifest.classes:
        raise DataError(
            f"{folder}: {layout}, whose classes are {', '.join(manifest.classes)}; not {', '.join(chosen.classes)}"
        )
    if chosen.ignore is not None:
        raise DataError(f"{folder}: {layout} says itself what its values mean; leave --ignore out")
    return Understood(manifest, layout, tuple(dataset.notes) if isinstance(dataset, FileSet) else ())


# -- folders without one --------------------------------------------------------------------------------------------------


def _of_pairs(folder: Path, chosen: Choices) -> Understood:
    found = pair(folder)
    if not found.cases:
        raise DataError(f"{folder}: no case is whole: {'; '.join(found.left_out[:3])}")
    patients, told = _patients(folder, found.cases, chosen)
    rows = [
        Case(one.id, patients[one.id], tuple(map(Source, one.images)), _source(one, found), "", one.role)
        for one in found.cases
    ]
    kind = "NIfTI files" if nifti_files.is_nifti(rows[0].image[0].path) else "pictures"
    parts = [f"{len(found.channels)} channel files per case ({', '.join(found.channels)})"] if found.channels else []
    if found.masks:
        how = "which may overlap" if chosen.overlapping else "where they overlap, the later one holds"
        parts.append(f"a mask per structure ({', '.join(found.masks)}; {how})")
    layout = f"a folder of {kind}, paired by their names" + "".join(f"; {part}" for part in parts)
    return _finished(Understood(_draft(folder, rows), layout, (told,), tuple(found.left_out)), found, chosen)


def _of_table(table: Path, chosen: Choices) -> Understood:
    """Return what a table names: ``image`` (several by ``;`` are channels), and perhaps label, id, patient, domain and role."""
    try:
        with table.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error})") from error
    if not lines or "image" not in lines[0]:
        raise DataError(f"{table}: needs a column image, and may have label, id, patient, domain and role")
    rows = [_of_line(line, f"{table}: line {number}", table.parent) for number, line in enumerate(lines, start=2)]
    unread = sorted(str(name) for name in lines[0].keys() - {"image", "label", "id", "patient", "domain", "role"})
    left_out = (f"columns {', '.join(unread)}",) if unread else ()
    how = "column patient" if "patient" in lines[0] else "none: every case is taken for a patient of its own"
    draft = Understood(_draft(table, rows), "a table of files", (f"patients: {how}",), left_out)
    return _finished(draft, Pairing(), chosen)


def _of_line(line: Mapping[str, str | None], where: str, folder: Path) -> Case:
    images = tuple(Source(folder / part.strip()) for part in (line["image"] or "").split(";") if part.strip())
    label = Source(folder / text) if (text := (line.get("label") or "").strip()) else None
    for source in (*images, *((label,) if label else ())):
        if not source.path.is_file() or not (
            nifti_files.is_nifti(source.path) or picture_files.is_picture(source.path)
        ):
            raise DataError(f"{where}: {source.path}: no such file, or neither NIfTI nor a picture")
    if not images:
        raise DataError(f"{where}: names no image")
    role = (line.get("role") or "train").strip()
    if role not in ROLES:
        raise DataError(f"{where}: role is {role!r}; it is one of {', '.join(ROLES)}")
    name = (line.get("id") or "").strip() or nifti_files.stem(images[0].path).rsplit(".", 1)[0]
    return Case(
        name, (line.get("patient") or "").strip() or name, images, label, (line.get("domain") or "").strip(), role
    )


def _draft(place: Path, rows: Sequence[Case]) -> Manifest:
    """Return a manifest of cases whose labels nobody has looked at yet."""
    axes = 3 if nifti_files.is_nifti(rows[0].image[0].path) else 2
    name = place.resolve().name.removesuffix(".csv")
    return Manifest(name, tuple(rows), ("background", "foreground"), axes, slice_axis=2 if axes == 3 else 0)


def _finished(draft: Understood, found: Pairing, chosen: Choices) -> Understood:
    """Return a manifest with channels, spacing and classes, without the cases that cannot be used."""
    left_out, axes = list(draft.left_out), draft.manifest.axes
    if chosen.overlapping and not found.masks and any(case.has_label for case in draft.manifest.cases):
        raise DataError(
            f"{draft.manifest.name}: overlapping structures need a mask each, such as NAME_lung and NAME_heart beside NAME"
        )
    rows = list(_with_labels_for_the_test(draft.manifest.cases, chosen, left_out))
    rows, channels = _consistent(rows, axes, left_out)
    classes, values, said = _classes(rows, found, chosen, left_out)
    gone = {line.split(":")[0].removeprefix("case ") for line in left_out if line.startswith("case ")}
    rows = [_valued(case, found, classes, values) for case in rows if case.id not in gone]
    manifest = replace(
        draft.manifest, cases=tuple(rows), classes=classes, channels=channels, overlapping=chosen.overlapping
    )
    return replace(draft, manifest=manifest, notes=(*draft.notes, *said), left_out=tuple(left_out))


def _source(one: Paired, found: Pairing) -> Source | None:
    if not one.labels:
        return None
    first, *others = map(Source, one.labels)
    return replace(first, others=tuple(others)) if found.masks else first


def _with_labels_for_the_test(rows: Sequence[Case], chosen: Choices, left_out: list[str]) -> Iterator[Case]:
    """Yield cases; those of test and validation that have no label are left out, or learnt from where that is asked for."""
    bare = 0
    for case in rows:
        if case.role == "train" or case.label is not None:
            yield case
        elif chosen.unlabelled_tests:
            yield replace(case, role="train")
        else:
            bare += 1
    if bare:
        left_out.append(f"{bare} test or validation images without a label (--unlabelled-tests learns from them)")


def _consistent(rows: list[Case], axes: int, left_out: list[str]) -> tuple[list[Case], int]:
    """Return the cases that can be read and have the usual number of channels, with their spacing."""
    read: list[tuple[Case, int]] = []
    for case in rows:
        try:
            channels, spacing = described(case, axes=axes)
        except DataError as error:
            left_out.append(str(error).replace(f"case {case.id!r}", f"case {case.id}", 1))
        else:
            read.append((replace(case, spacing=spacing), channels))
    if not read:
        raise DataError(f"no case can be read: {'; '.join(left_out[:3])}")
    count = Counter(channels for _, channels in read)
    if axes == 2 and set(count) == {1, 3}:
        return [case for case, _ in read], 3
    usual = count.most_common(1)[0][0]
    left_out += [f"case {case.id}: has {own} channels, most cases have {usual}" for case, own in read if own != usual]
    return [case for case, own in read if own == usual], usual


def _patients(folder: Path, cases: Sequence[Paired], chosen: Choices) -> tuple[dict[str, str], str]:
    """Return the patient of every case, and how that was told."""
    names = [case.id for case in cases]
    if (folder / "patients.csv").exists() or chosen.patient_pattern:
        try:
            pattern = patient_expression(chosen.patient_pattern or "(.*)")
        except ValueError as error:
            raise DataError(f"--patient-pattern: {error}") from error
        patient = patient_of(folder, pattern)
        how = "patients.csv" if (folder / "patients.csv").exists() else f"the pattern {chosen.patient_pattern}"
        found = {name: patient(name) for name in names}
        return found, f"patients: {len(set(found.values()))} by {how}"
    grouped = {case.id: case.group for case in cases if case.group}
    if len(grouped) == len(cases) and len(set(grouped.values())) > 1:
        return grouped, f"patients: {len(set(grouped.values()))}, one per folder (else give --patient-pattern)"
    found = {name: (m[1] or m[2]).rstrip("_-") if (m := _PARTS_OF_A_PATIENT.match(name)) else name for name in names}
    if found != dict(zip(names, names, strict=True)) and (len(set(found.values())) > 1 or len(names) == 1):
        one = next(name for name in names if found[name] != name)
        return found, (
            f"patients: {len(set(found.values()))} by name, such as {found[one]} of {one} (else give --patient-pattern)"
        )
    plain = {name: name for name in names}
    return (
        plain,
        "patients: every case is taken for a patient of its own (else write patients.csv, or give --patient-pattern)",
    )


def _classes(
    rows: list[Case], found: Pairing, chosen: Choices, left_out: list[str]
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...], list[str]]:
    """Return the classes, what the stored values stand for (empty: themselves), and what is to be said of them."""
    if found.masks:
        classes = chosen.classes or ("background", *found.masks)
        if unknown := [name for name in found.masks if name not in classes]:
            raise DataError(f"the mask {unknown[0]!r} is named after none of the classes {', '.join(classes)}")
        return classes, (), []
    values = _values_in(rows, left_out)
    if chosen.values:
        if strange := sorted(values - dict(chosen.values).keys()):
            raise DataError(
                f"labels hold the value {strange[0]}, which has no meaning in the data set that they are added to"
            )
        return chosen.classes, chosen.values, []
    ignored, notes = _unlabelled_values(values, chosen)
    order = sorted({0} | (values - ignored))
    if len(order) == 1:
        order = [0, 1]
        if not chosen.classes:
            notes.append(
                "no training label: one class beside the background is taken for granted (else give --classes)"
            )
    classes = chosen.classes or _default_names(order)
    if len(classes) > len(order) and max(order) < len(classes):
        order = list(range(len(classes)))  # some classes occur in no label
    if len(classes) != len(order):
        raise DataError(
            f"labels hold the values {', '.join(map(str, order))}, but --classes names {len(classes)}: name one class per value"
        )
    pairs = [*((value, index) for index, value in enumerate(order)), *((value, IGNORE) for value in sorted(ignored))]
    if all(value == index for value, index in pairs):
        return classes, (), notes
    meaning = ", ".join(f"{v} is {'unlabelled' if i == IGNORE else classes[i]}" for v, i in pairs)
    return classes, tuple(pairs), [*notes, f"label values: {meaning}"]


def _unlabelled_values(values: set[int], chosen: Choices) -> tuple[set[int], list[str]]:
    """Return the stored values of voxels that nobody has labelled: the one given, or 255 after classes without gaps."""
    if chosen.ignore is not None:
        return {chosen.ignore}, []
    others = sorted(values - {IGNORE})
    if IGNORE in values and len(others) > 1 and others == list(range(others[0], others[-1] + 1)):
        return {IGNORE}, [f"the value {IGNORE} is taken for unlabelled voxels"]
    return set(), []


def _default_names(order: Sequence[int]) -> tuple[str, ...]:
    return (
        ("background", "foreground") if len(order) == 2 else ("background", *(f"class {value}" for value in order[1:]))
    )


def _values_in(rows: list[Case], left_out: list[str]) -> set[int]:
    """Return the values that training labels hold; cases whose label cannot be read, or holds other numbers, are left out."""
    found: set[int] = set()
    for case in rows:
        if case.role != "train" or case.label is None:
            continue
        path = case.label.path
        try:
            read = nifti_files.voxels if nifti_files.is_nifti(path) else picture_files.read_label_picture
            values = np.unique(read(path, case.id))
        except DataError as error:
            left_out.append(str(error).replace(f"case {case.id!r}", f"case {case.id}", 1))
            continue
        if len(values) > MANY or not np.array_equal(values, np.rint(values)) or values.min() < 0:
            left_out.append(
                f"case {case.id}: {path.name} holds {len(values)} values such as {values[-1]:g}; is it a label?"
            )
            continue
        found |= {int(value) for value in values}
    if not found and any(case.role == "train" and case.label is not None for case in rows):
        raise DataError(f"no training label can be used: {'; '.join(left_out[-3:])}")
    return found


def _valued(case: Case, found: Pairing, classes: Sequence[str], values: tuple[tuple[int, int], ...]) -> Case:
    """Return a case whose label says what its values stand for."""
    if case.label is None:
        return case
    if not found.masks:
        return replace(case, label=replace(case.label, values=values))
    one = next(paired for paired in found.cases if paired.id == case.id)
    numbered = [Source(path, mask_of=classes.index(name)) for name, path in zip(one.masks, one.labels, strict=True)]
    first, *others = sorted(numbered, key=lambda source: source.mask_of or 0)
    return replace(case, label=replace(first, others=tuple(others)))


# -- roles ------------------------------------------------------------------------------------------------------------------


def _held_out(found: Understood, count: int) -> Understood:
    """Return a manifest whose test is some patients, drawn by their names, all of whose cases are labelled."""
    if not count:
        return found
    manifest = found.manifest
    if manifest.of_role("test"):
        raise DataError(
            f"{manifest.name}: has a test of {len(manifest.of_role('test'))} cases already; leave --test out"
        )
    bare = {case.patient for case in manifest.cases if not case.has_label}
    able = [patient for patient in manifest.patients("train") if patient not in bare]
    if count >= len(able):
        raise SplitError(f"--test {count}: {manifest.name} has {len(able)} labelled patients; give less than that")
    drawn = set(sorted(able, key=lambda patient: (derive_seed("held-out", patient), patient))[:count])
    cases = tuple(replace(case, role="test") if case.patient in drawn else case for case in manifest.cases)
    note = f"held out as the test, drawn by name: {', '.join(sorted(drawn))}"
    return replace(found, manifest=replace(manifest, cases=cases), notes=(*found.notes, note))


def _merged(old: Manifest, new: Manifest, where: str) -> tuple[Manifest, list[str]]:
    """Return a manifest with the cases of another one at its end, and what was done."""
    for what in ("classes", "axes", "overlapping"):
        if getattr(old, what) != getattr(new, what):
            raise DataError(f"{where}: its {what} are {getattr(new, what)}, those of {old.name} {getattr(old, what)}")
    if new.channels != old.channels and not (old.axes == 2 and {new.channels, old.channels} == {1, 3}):
        raise DataError(f"{where}: has {new.channels} channels, {old.name} {old.channels}")
    known = {case.id: case for case in old.cases}
    roles = {case.patient: case for case in old.cases}
    rows, done = list(old.cases), Counter[str]()
    for case in new.cases:
        if (there := known.get(case.id)) is not None:
            rows[rows.index(there)] = _labelled_since(there, case, where, done)
        elif (fitting := _in_its_role(case, roles.get(case.patient), where, done)) is not None:
            rows.append(fitting)
    return replace(old, cases=tuple(rows)), [f"{count} cases {what}" for what, count in done.items()] or [
        "nothing to add"
    ]


def _labelled_since(there: Case, case: Case, where: str, done: Counter[str]) -> Case:
    """Return a case that is there already, with the label that it has got since."""
    if [source.path.resolve() for source in there.image] != [source.path.resolve() for source in case.image]:
        raise DataError(
            f"{where}: the case {case.id!r} is there already, from {there.image[0].path}; tell them apart with --prefix"
        )
    gained = not there.has_label and case.has_label
    done["gained a label" if gained else "were there already"] += 1
    return replace(there, label=case.label) if gained else there


def _in_its_role(case: Case, known: Case | None, where: str, done: Counter[str]) -> Case | None:
    """Return a new case in the role of its patient; None where it would be tested on without a label."""
    if known is not None and known.role == "train" and case.role != "train":
        raise SplitError(
            f"{where}: case {case.id!r} is for {case.role}, but its patient {case.patient!r} is learnt from (case "
            f"{known.id!r}); give the patient one role, or tell different people apart with --prefix"
        )
    role = known.role if known is not None else case.role
    if role != "train" and not case.has_label:
        done[f"are of a {role} patient and have no label: left out"] += 1
        return None
    if role != case.role:
        done[f"are of a {role} patient: {role}"] += 1
    done[f"added to {role}"] += 1
    return replace(case, role=role)
