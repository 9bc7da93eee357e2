"""The manifest: one row per case. Every format becomes one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from labeleff.errors import DataError, SplitError, did_you_mean
from labeleff.files import write_json

Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """A file and, where it holds several arrays, the one that is meant."""

    path: Path
    key: str = ""


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

    def __post_init__(self) -> None:
        if not self.cases:
            raise DataError(f"{self.name}: the data set has no cases")
        if self.axes not in (2, 3) or not 0 <= self.slice_axis < self.axes:
            raise DataError(
                f"{self.name}: axes must be 2 or 3 and slice_axis one of them, not {self.axes}, {self.slice_axis}"
            )
        seen: set[str] = set()
        roles: dict[str, Case] = {}
        for case in self.cases:
            if case.id in seen:
                raise DataError(f"{self.name}: the case {case.id!r} occurs twice; give every case a name of its own")
            if not case.id or "/" in case.id or "\\" in case.id or case.id.startswith("."):
                raise DataError(f"{self.name}: {case.id!r} cannot name a case: it becomes part of file names")
            if case.spacing is not None and (len(case.spacing) != self.axes or min(case.spacing) <= 0):
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


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest as JSON, its paths relative to the file, atomically."""

    def source(value: Source | None) -> Any:
        if value is None:
            return None
        return {"path": os.path.relpath(value.path, path.parent), **({"key": value.key} if value.key else {})}

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
    write_json(path, head | {"cases": rows})


def read_manifest(path: Path) -> Manifest:
    """Return a manifest written by :func:`write_manifest`.

    Raises:
        DataError: The file is not one.
    """

    def source(value: dict[str, str] | None) -> Source | None:
        return None if value is None else Source(path.parent / value["path"], value.get("key", ""))

    def sources(values: Iterable[dict[str, str]]) -> tuple[Source, ...]:
        return tuple(s for s in map(source, values) if s is not None)

    try:
        content = json.loads(path.read_text())
        cases = tuple(
            Case(
                id=row["id"],
                patient=row["patient"],
                image=sources(row["image"]),
                label=source(row["label"]),
                domain=row["domain"],
                role=row["role"],
                spacing=tuple(row["spacing"]) if row["spacing"] else None,
                raters=sources(row.get("raters", ())),
            )
            for row in content["cases"]
        )
        return Manifest(
            content["name"],
            cases,
            tuple(content["classes"]),
            content["axes"],
            content["channels"],
            content["slice_axis"],
            tuple(content["official"]),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest ({type(error).__name__}: {error})") from error
