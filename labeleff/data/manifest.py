"""The manifest: one row per case. Every format becomes one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from labeleff.batch import IGNORE
from labeleff.errors import DataError, SplitError, did_you_mean
from labeleff.files import write_json
from labeleff.functional.regions import MOST_REGIONS

Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """A file and, where it holds several arrays, the one that is meant.

    Args:
        path: The file.
        key: The array, of ``.npz`` and ``.h5`` files.
        values: Of a label, where its file does not hold the classes' own numbers: (stored value, class) for every value that it
            may hold; 255 as the class is unknown.
        mask_of: Of a label, where its file is the mask of one structure: the class of all that is not 0 in it.
        others: Of a label, further masks of the same image. Where masks overlap, the later one holds.
    """

    path: Path
    key: str = ""
    values: tuple[tuple[int, int], ...] = ()
    mask_of: int | None = None
    others: tuple[Source, ...] = ()

    @property
    def parts(self) -> tuple[Source, ...]:
        """The files that it is made of, in order."""
        return (replace(self, others=()), *self.others)


@dataclass(frozen=True)
class Case:
    """One image, perhaps with a label.

    Args:
        id: Unique name.
        patient: Cases of one patient never play different roles.
        image: One source per channel group.
        label: None where nobody has labelled the case; never a dummy file. Beside ``raters``: their publishers' consensus,
            which evaluation measures against; training learns from the raters.
        domain: Site, scanner, stain.
        role: What the publishers of the data set meant it for.
        spacing: Voxel size per axis, mm; None where unknown.
        raters: Label files of the same image by several people, one each.
    """

    id: str
    patient: str
    image: tuple[Source, ...]
    label: Source | None = None
    domain: str = ""
    role: Role = "train"
    spacing: tuple[float, ...] | None = None
    raters: tuple[Source, ...] = ()

    @property
    def has_label(self) -> bool:
        """Somebody has labelled the case."""
        return self.label is not None or bool(self.raters)


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Args:
        name: Name of the data set.
        cases: The rows.
        classes: Names, background first.
        axes: Axes of a case: 2 or 3.
        channels: Input channels.
        slice_axis: Axis along which a 2-D network sees volumes slice by slice.
        official: Patients of the training list in the publishers' order; its first N are the papers' labelled sets.
        overlapping: Classes are regions that may overlap (at most seven): bit r of a label is set where ``classes[r + 1]`` is.

    Raises:
        DataError: Rows contradict one another.
        SplitError: A patient plays two roles.
    """

    name: str
    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    axes: int
    channels: int = 1
    slice_axis: int = 0
    official: tuple[str, ...] = ()
    overlapping: bool = False

    def __post_init__(self) -> None:
        if not self.cases:
            raise DataError(f"{self.name}: the data set has no cases")
        if self.axes not in (2, 3) or not 0 <= self.slice_axis < self.axes:
            raise DataError(
                f"{self.name}: axes must be 2 or 3 and slice_axis one of them, not {self.axes}, {self.slice_axis}"
            )
        if self.overlapping and not 1 < len(self.classes) <= MOST_REGIONS + 1:
            raise DataError(
                f"{self.name}: {len(self.classes) - 1} regions that may overlap; there are 1 … {MOST_REGIONS}"
            )
        if self.overlapping and any(case.raters for case in self.cases):
            raise DataError(f"{self.name}: regions that overlap have one label; several raters are for other classes")
        seen: set[str] = set()
        roles: dict[str, Case] = {}
        for case in self.cases:
            if case.id in seen:
                raise DataError(f"{self.name}: the case {case.id!r} occurs twice; give every case a name of its own")
            if not case.id or "/" in case.id or "\\" in case.id or case.id.startswith("."):
                raise DataError(f"{self.name}: {case.id!r} cannot name a case: it becomes part of file names")
            if case.spacing is not None and (
                len(case.spacing) != self.axes or not all(0 < length < math.inf for length in case.spacing)
            ):
                raise DataError(
                    f"{self.name}: case {case.id!r} has spacing {case.spacing}; {self.axes} lengths in mm are needed"
                )
            seen.add(case.id)
            other = roles.setdefault(case.patient, case)
            if other.role != case.role:
                raise SplitError(
                    f"{self.name}: patient {case.patient!r} is in {other.role} (case {other.id!r}) and in {case.role} "
                    f"(case {case.id!r}); a patient may play one role only"
                )

    @cached_property
    def _by_id(self) -> dict[str, Case]:
        return {case.id: case for case in self.cases}

    def case(self, name: str) -> Case:
        """Return a case by its id.

        Raises:
            DataError: There is none.
        """
        try:
            return self._by_id[name]
        except KeyError:
            raise DataError(f"{self.name}: there is no case {name!r}.{did_you_mean(name, self._by_id)}") from None

    def of_role(self, role: Role) -> tuple[Case, ...]:
        """Return the cases the publishers meant for a role, in order."""
        return tuple(case for case in self.cases if case.role == role)

    def patients(self, role: Role) -> tuple[str, ...]:
        """Return the patients of a role, each once, in order."""
        return tuple(dict.fromkeys(case.patient for case in self.of_role(role)))


def without(manifest: Manifest, names: Sequence[str]) -> tuple[Manifest, dict[Role, tuple[str, ...]]]:
    """Return a manifest without some cases, and their names by role.

    Raises:
        DataError: There is no such case, or none is left.
    """
    gone = [manifest.case(name) for name in dict.fromkeys(names)]
    if not gone:
        return manifest, {}
    by_role = {role: tuple(case.id for case in gone if case.role == role) for role in ROLES}
    kept = tuple(case for case in manifest.cases if case not in gone)
    return replace(manifest, cases=kept), {role: found for role, found in by_role.items() if found}


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest as JSON, its paths relative to the file, atomically."""

    def source(value: Source | None) -> Any:
        if value is None:
            return None
        if value.others:
            return [source(part) for part in value.parts]
        return {
            "path": os.path.relpath(value.path, path.parent),
            **({"key": value.key} if value.key else {}),
            **({"values": {str(stored): index for stored, index in value.values}} if value.values else {}),
            **({"mask_of": value.mask_of} if value.mask_of is not None else {}),
        }

    rows = [
        {
            "id": case.id,
            "patient": case.patient,
            "image": [source(s) for s in case.image],
            "label": source(case.label),
            "domain": case.domain,
            "role": case.role,
            "spacing": list(case.spacing) if case.spacing else None,
            **({"raters": [source(s) for s in case.raters]} if case.raters else {}),
        }
        for case in manifest.cases
    ]
    head = {k: getattr(manifest, k) for k in ("name", "classes", "axes", "channels", "slice_axis", "official")}
    overlapping = {"overlapping": True} if manifest.overlapping else {}
    write_json(path, head | overlapping | {"cases": rows})


def read_manifest(path: Path) -> Manifest:
    """Return a manifest written by :func:`write_manifest`.

    Raises:
        DataError: The file is not one.
    """
    try:
        content = json.loads(path.read_text())
        head = {name: content[name] for name in ("name", "classes", "axes", "channels", "slice_axis", "official")}
        rows = content["cases"]
        head["overlapping"] = content.get("overlapping", False)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a manifest ({type(error).__name__}: {error})") from error
    if not isinstance(rows, list) or not all(isinstance(head[name], list) for name in ("classes", "official")):
        raise DataError(f"{path}: cases, classes and official are lists")
    if not isinstance(head["overlapping"], bool):
        raise DataError(f"{path}: overlapping is {head['overlapping']!r}; it is true or false")
    for key, kind in (("name", str), ("axes", int), ("channels", int), ("slice_axis", int)):
        if type(head[key]) is not kind:
            raise DataError(f"{path}: {key} is {head[key]!r}; it is a {'text' if kind is str else 'whole number'}")
    cases = tuple(_case(row, path, number) for number, row in enumerate(rows))
    classes, official = (tuple(map(str, head.pop(name))) for name in ("classes", "official"))
    try:
        return Manifest(cases=cases, classes=classes, official=official, **head)
    except TypeError as error:
        raise DataError(f"{path}: not a manifest ({error})") from error


def _case(row: Any, path: Path, number: int) -> Case:
    """Return a row of a manifest file.

    Raises:
        DataError: It lacks something, or something is of another kind; the message names the row and the key.
    """
    where = f"{path}: cases.{number}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: {row!r} is no object of id, patient, image, label, domain, role and spacing")
    where += f" ({row.get('id')})"

    try:
        spacing = row["spacing"]
        if not all(isinstance(row[key], str) for key in ("id", "patient", "domain")):
            raise DataError(f"{where}: id, patient and domain are texts")
        if row["role"] not in ROLES:
            raise DataError(f"{where}: role is {row['role']!r}; it is one of {', '.join(ROLES)}")
        return Case(
            id=row["id"],
            patient=row["patient"],
            image=_sources(row, "image", path, where),
            label=_label(row["label"], path, where),
            domain=row["domain"],
            role=row["role"],
            spacing=tuple(float(n) for n in spacing) if spacing else None,
            raters=_sources(row, "raters", path, where),
        )
    except KeyError as error:
        raise DataError(f"{where}: {error.args[0]} is missing") from None
    except (TypeError, ValueError):
        raise DataError(f"{where}: spacing is {row['spacing']!r}; it is a list of lengths in mm, or null") from None


def _label(value: Any, path: Path, where: str) -> Source | None:
    """Return the label of a row: none, one file, or a list of masks of one structure each."""
    if value is None or not isinstance(value, list):
        return None if value is None else _source("label", value, path, where)
    parts = [_source("label", one, path, where) for one in value]
    if not parts or any(part.mask_of is None for part in parts):
        raise DataError(
            f'{where}: label is a list, of which every file is the mask of one class: {{"path": "…", "mask_of": 1}}; '
            "where there is no label, write null"
        )
    return replace(parts[0], others=tuple(parts[1:]))


def _source(key: str, value: Any, path: Path, where: str) -> Source:
    if not (isinstance(value, dict) and isinstance(value.get("path"), str) and isinstance(value.get("key", ""), str)):
        raise DataError(
            f'{where}: {key} holds {value!r}; a file is written as {{"path": "…"}}, or with a "key" beside it'
        )
    mask_of = value.get("mask_of")
    if mask_of is not None and (type(mask_of) is not int or not 0 < mask_of < IGNORE):
        raise DataError(f"{where}: {key}.mask_of is {mask_of!r}; it is the number of a class")
    return Source(path.parent / value["path"], value.get("key", ""), _values(key, value, where), mask_of)


def _values(key: str, value: dict[str, Any], where: str) -> tuple[tuple[int, int], ...]:
    found = value.get("values", {})
    try:
        if not all(type(index) is int and 0 <= index <= IGNORE for index in found.values()):
            raise ValueError
        return tuple((int(stored), index) for stored, index in found.items())
    except (AttributeError, ValueError):
        raise DataError(
            f'{where}: {key}.values is {found!r}; it says which class every value is: {{"0": 0, "255": 1}}'
        ) from None


def _sources(row: dict[str, Any], key: str, path: Path, where: str) -> tuple[Source, ...]:
    found = row.get(key, [])
    if not isinstance(found, list):
        raise DataError(f'{where}: {key} is {found!r}; it is a list of files, each {{"path": "…"}}')
    if not found and key == "image":
        raise DataError(f"{where}: image is empty; name at least one file")
    return tuple(_source(key, value, path, where) for value in found)
