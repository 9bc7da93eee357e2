"""Several data sets as one, each of them a domain: what adaptation from one to another is declared with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff import registry
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case, Manifest
from labeleff.errors import DataError
from labeleff.registry import Component, register


@register("dataset", "union")
class DataUnion(DataSet):
    """Data sets with the same classes and channels side by side; the name of each is the domain of its cases.

    Cases and patients get that name in front of theirs, so that two data sets may use the same ones. Their roles stay.
    ``{name: union, parts: {source: {name: gtav, path: gtav}, target: {name: cityscapes, path: cityscapes}}}``

    Args:
        parts: Registered data sets with their options, by the name of the domain that each becomes.
    """

    def __init__(self, *, parts: Mapping[str, Component]) -> None:
        if not parts:
            raise ValueError("parts names no data set; write parts: {source: {name: …}, target: {name: …}}")
        wrong = next((name for name in parts if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name)), None)
        if wrong is not None:
            raise ValueError(f"parts: {wrong!r} becomes part of file names; use letters, digits, '_' and '-'")
        self.parts: dict[str, DataSet] = {name: registry.made("dataset", part) for name, part in parts.items()}
        self.verbatim = frozenset.intersection(*(part.verbatim for part in self.parts.values()))
        self._own: dict[str, Case] = {}

    def manifest(self) -> Manifest:
        """Return the rows of all parts.

        Raises:
            DataError: The parts have different classes, axes or channels.
        """
        found = {name: part.manifest() for name, part in self.parts.items()}
        first, *_ = found
        cases, official = [], []
        for name, part in found.items():
            for what in ("classes", "axes", "channels", "slice_axis"):
                mine, theirs = getattr(part, what), getattr(found[first], what)
                if mine != theirs:
                    raise DataError(
                        f"union: the {what} of {name} ({part.name}) are {mine}, those of {first} ({found[first].name}) "
                        f"{theirs}; choose options with which they agree"
                    )
            official += [f"{name}_{patient}" for patient in part.official]
            for case in part.cases:
                shown = replace(case, id=f"{name}_{case.id}", patient=f"{name}_{case.patient}", domain=name)
                self._own[shown.id] = case
                cases.append(shown)
        head = found[first]
        return Manifest(
            "_to_".join(dict.fromkeys(part.name for part in found.values())),
            tuple(cases),
            head.classes,
            head.axes,
            head.channels,
            head.slice_axis,
            tuple(official),
        )

    def _asked(self, case: Case) -> tuple[DataSet, Case]:
        """Return the part that a case comes from, and the case as it is called there."""
        own = self._own[case.id]
        return self.parts[case.domain], replace(own, label=case.label, raters=case.raters)

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [C, *S] as the part reads it."""
        part, own = self._asked(case)
        return part.read_image(own)

    def affine(self, case: Case) -> NDArray[np.float64] | None:
        """Return that of the part."""
        part, own = self._asked(case)
        return part.affine(own)

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [*S] as the part reads it."""
        part, own = self._asked(case)
        return part.read_label(own)

    def fingerprint(self, case: Case) -> str:
        """Return what changes when the case changes in its part; prepared images are those of the part."""
        part, own = self._asked(case)
        return part.fingerprint(own)
