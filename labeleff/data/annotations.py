"""The annotation store: the only place where labels live while training. Append-only, versioned, audited.

    annotations/
      labels/<case>.<revision>.b2nd    immutable label maps
      labels/<case>.raters.b2nd        what several raters said, where that is learnt from; part of revision 0
      revisions/<revision>.json        case -> file and SHA-256, what was changed, SHA-256 of the revision before
      current                          number of the newest whole revision; renamed into place

A reader names the revision it wants and opens exactly that, so a worker or another process never sees half an edit.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE
from labeleff.data.store import ONE_THREAD
from labeleff.edits import Edit
from labeleff.errors import DataError, StoreError
from labeleff.files import write_atomically

OPEN_HANDLES = 64
CHUNK = 32
KEPT_VOXELS = 1024
KEPT_PLACES = 512


class AnnotationStore:
    """Labels of the training cases, by case and revision. Picklable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._revisions: dict[int, dict[str, Any]] = {}
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._places: OrderedDict[tuple[str, str], tuple[NDArray[np.int64], ...]] = OrderedDict()
        self._within: frozenset[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"_revisions": {}, "_open": OrderedDict(), "_places": OrderedDict()}
        return {"folder": self.folder, "_within": self._within, **fresh}

    def only(self, cases: Iterable[str]) -> AnnotationStore:
        """Return a reader of the store for which all but some cases are out of reach."""
        part = AnnotationStore(self.folder)
        part._within = frozenset(cases)
        return part

    @classmethod
    def create(
        cls,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        labels: Iterable[tuple[str, NDArray[np.uint8]]],
        votes: Iterable[tuple[str, NDArray[np.uint8]]] = (),
    ) -> AnnotationStore:
        """Make revision 0 from the given labels; every other case of ``shapes`` is unlabelled.

        Args:
            folder: Where to.
            shapes: Shape of every training case.
            labels: Case and label [*S].
            votes: Case and the labels of its raters [R, *S], to be kept beside the one label.

        Raises:
            DataError: A label is of a case that has no shape, or does not have that shape.
        """
        store = cls(folder)
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        files = {}
        for case, label in labels:
            files[case] = store._write_label(case, 0, store._fitting(case, label, shapes))
        record = {"shapes": {k: list(v) for k, v in shapes.items()}, "files": files, "changes": [], "previous": ""}
        if raters := {case: store._write_votes(case, own, shapes) for case, own in votes}:
            record["raters"] = raters
        store._publish(0, record)
        return store

    @classmethod
    def open(cls, folder: Path) -> AnnotationStore:
        """Open a store.

        Raises:
            StoreError: There is none.
        """
        store = cls(folder)
        if not (folder / "current").exists():
            raise StoreError(f"{folder}: there is no annotation store here; start the run over with --fresh")
        return store

    @property
    def revision(self) -> int:
        """The newest whole revision; 0 is what was given."""
        try:
            return int((self.folder / "current").read_text())
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.folder / 'current'}: damaged ({error}); start the run over with --fresh"
            ) from error

    def _record(self, revision: int) -> dict[str, Any]:
        if revision not in self._revisions:
            path = self._revision_path(revision)
            try:
                self._revisions[revision] = json.loads(path.read_text())
            except (OSError, json.JSONDecodeError) as error:
                raise StoreError(
                    f"{path}: revision {revision} of the labels is missing or damaged ({error})"
                ) from error
        return self._revisions[revision]

    def _revision_path(self, revision: int) -> Path:
        return self.folder / "revisions" / f"{revision:06d}.json"

    # -- reading --------------------------------------------------------------------------------------------------------

    def shape(self, case: str) -> tuple[int, ...]:
        """Return the shape of a case's label map.

        Raises:
            StoreError: The case is not in the store: the training side has no way to its label.
        """
        if self._within is not None and case not in self._within:
            raise StoreError(f"case {case!r} is bound to no stream of this stage; its label is out of reach")
        try:
            return tuple(self._record(0)["shapes"][case])
        except KeyError:
            raise StoreError(f"case {case!r} is not a training case of this run; its label is out of reach") from None

    def known(self, case: str, revision: int) -> bool:
        """Return whether anything has been said about a case by a revision."""
        self.shape(case)
        return case in self._record(revision)["files"]

    def edited(self, case: str, revision: int) -> bool:
        """Return whether the label of a case differs from the one first given."""
        self.shape(case)
        return bool(self._record(revision)["files"].get(case) != self._record(0)["files"].get(case))

    def read(self, case: str, box: tuple[slice, ...] | None = None, *, revision: int) -> NDArray[np.uint8]:
        """Return the label [*box]; IGNORE where nobody has said.

        Raises:
            StoreError: The case is none of this run's, or its file is damaged.
        """
        window = box if box is not None else (slice(None),) * len(self.shape(case))
        if not self.known(case, revision):
            lengths = [len(range(*w.indices(n))) for w, n in zip(window, self.shape(case), strict=True)]
            return np.full(lengths, IGNORE, np.uint8)
        return self._window(self._record(revision)["files"][case]["file"], window, case)

    def _window(self, name: str, window: tuple[slice, ...], case: str) -> NDArray[np.uint8]:
        try:
            array: NDArray[np.uint8] = self._array(name)[window]
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError(
                f"{self.folder / 'labels' / name}: the label of case {case!r} is damaged ({error})"
            ) from error
        return array

    def read_given(self, case: str, box: tuple[slice, ...] | None = None) -> NDArray[np.uint8]:
        """Return the label as it was first given."""
        return self.read(case, box, revision=0)

    def has_votes(self, case: str) -> bool:
        """Return whether the labels of several raters were given for a case."""
        return case in self._record(0).get("raters", {})

    def read_votes(self, case: str, box: tuple[slice, ...] | None = None, *, revision: int) -> NDArray[np.uint8] | None:
        """Return what the raters said [R, *box]; None where they were not kept, or the case was edited since.

        Raises:
            StoreError: The case is none of this run's, or its file is damaged.
        """
        window = box if box is not None else (slice(None),) * len(self.shape(case))
        if not self.has_votes(case) or self.edited(case, revision):
            return None
        return self._window(self._record(0)["raters"][case]["file"], (slice(None), *window), case)

    def foreground(self, case: str, revision: int) -> tuple[NDArray[np.int64], ...]:
        """Return some coordinates [n, A] of every foreground class that is present, a fixed selection of each."""
        return self._selected("foreground", case, revision)

    def labelled_voxels(self, case: str, revision: int) -> tuple[NDArray[np.int64], ...]:
        """Return some coordinates [n, A] of voxels whose class is known, as one array, a fixed selection; () without any."""
        return self._selected("known", case, revision)

    def _selected(
        self, what: Literal["foreground", "known"], case: str, revision: int
    ) -> tuple[NDArray[np.int64], ...]:
        if not self.known(case, revision):
            return ()
        name = self._record(revision)["files"][case]["file"]
        if (what, name) not in self._places:
            label = self.read(case, revision=revision)
            if what == "known":
                masks = [label != IGNORE]
            else:
                masks = [label == value for value in np.unique(label) if value not in (0, IGNORE)]
            self._places[what, name] = tuple(_some(mask) for mask in masks if mask.any())
            if len(self._places) > KEPT_PLACES:
                self._places.popitem(last=False)
        return self._places[what, name]

    def _array(self, name: str) -> Any:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        self._open[name] = blosc2.open(str(self.folder / "labels" / name), mode="r", dparams=ONE_THREAD["dparams"])
        if len(self._open) > OPEN_HANDLES:
            self._open.popitem(last=False)
        return self._open[name]

    # -- changing -------------------------------------------------------------------------------------------------------

    def apply(self, edits: Iterable[Edit], *, step: int, stage: int, author: str) -> int:
        """Make one new revision of all edits, or none: a crash at any point leaves the old one current.

        Args:
            edits: Changes; several of one case are applied in order.
            step: Where the stage stands.
            stage: Number of the stage.
            author: Name of the annotator.

        Returns:
            The new revision.

        Raises:
            DataError: An edit does not fit its case.
        """
        before = self.revision
        record = self._record(before)
        revision = before + 1
        changed: dict[str, NDArray[np.uint8]] = {}
        changes = []
        for edit in edits:
            label = changed.get(edit.case)
            label = self.read(edit.case, revision=before).copy() if label is None else label
            changes.append(_edit(label, edit) | {"stage": stage, "step": step, "by": author})
            changed[edit.case] = label
        files = dict(record["files"])
        for case, label in changed.items():
            files[case] = self._write_label(case, revision, label)
        previous = hashlib.sha256(self._revision_path(before).read_bytes()).hexdigest()
        self._publish(revision, {"files": files, "changes": changes, "previous": previous})
        return revision

    def discard_after(self, revision: int) -> None:
        """Make an earlier revision current; later ones are removed (they will be made again)."""
        newest = self.revision
        if revision >= newest:
            return
        write_atomically(self.folder / "current", str(revision))
        for later in range(revision + 1, newest + 1):
            self._revision_path(later).unlink(missing_ok=True)
            self._revisions.pop(later, None)
        self._open.clear()
        self._places.clear()

    def history(self) -> list[dict[str, Any]]:
        """Return every change, oldest first: case, author, voxels by old and new class, stage and step."""
        return [
            {"revision": number, **change}
            for number in range(1, self.revision + 1)
            for change in self._record(number)["changes"]
        ]

    def digest(self) -> str:
        """Return the SHA-256 of the hashes of all label files of the newest revision."""
        files = self._record(self.revision)["files"]
        return hashlib.sha256(json.dumps({case: files[case]["sha256"] for case in sorted(files)}).encode()).hexdigest()

    def verify(self) -> None:
        """Check the hash of every file and the chain of revisions.

        Raises:
            StoreError: Something was changed after it was written.
        """
        for number in range(self.revision + 1):
            record = json.loads(self._revision_path(number).read_text())
            if number:
                expected = hashlib.sha256(self._revision_path(number - 1).read_bytes()).hexdigest()
                if record["previous"] != expected:
                    raise StoreError(
                        f"{self._revision_path(number)}: revision {number - 1} was changed after it was written"
                    )
            for case, file in [*record["files"].items(), *record.get("raters", {}).items()]:
                content = (self.folder / "labels" / file["file"]).read_bytes()
                if hashlib.sha256(content).hexdigest() != file["sha256"]:
                    raise StoreError(f"{file['file']}: the label of case {case!r} was changed after it was written")

    # -- writing --------------------------------------------------------------------------------------------------------

    def _fitting(self, case: str, label: NDArray[np.uint8], shapes: Mapping[str, tuple[int, ...]]) -> NDArray[np.uint8]:
        if case not in shapes:
            raise DataError(f"case {case!r} has a label but is no training case")
        if tuple(label.shape) != tuple(shapes[case]):
            raise DataError(f"case {case!r}: the label has shape {label.shape}, the image {tuple(shapes[case])}")
        return label.astype(np.uint8)

    def _write_votes(
        self, case: str, votes: NDArray[np.uint8], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, str]:
        return self._write(f"{case}.raters.b2nd", np.stack([self._fitting(case, own, shapes) for own in votes]))

    def _write_label(self, case: str, revision: int, label: NDArray[np.uint8]) -> dict[str, str]:
        return self._write(f"{case}.{revision:06d}.b2nd", label)

    def _write(self, name: str, label: NDArray[np.uint8]) -> dict[str, str]:
        chunks = tuple(min(n, CHUNK) for n in label.shape)
        # written in one piece: blosc2 itself opens and cuts a file dozens of times, which waits for the disk of other runs
        array = blosc2.asarray(np.ascontiguousarray(label), chunks=chunks, contiguous=True, **ONE_THREAD)
        content = array.to_cframe()
        write_atomically(self.folder / "labels" / name, content)
        digest = hashlib.sha256(content).hexdigest()
        return {"file": name, "sha256": digest}

    def _publish(self, revision: int, record: dict[str, Any]) -> None:
        write_atomically(self._revision_path(revision), json.dumps(record))
        write_atomically(self.folder / "current", str(revision))
        self._revisions.pop(revision, None)


def _some(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return coordinates [n, A] of where a mask holds, evenly thinned out to some thousand."""
    flat = np.flatnonzero(mask)
    step = max(1, len(flat) // KEPT_VOXELS)
    return np.stack(np.unravel_index(flat[::step], mask.shape), 1).astype(np.int64)


def _edit(label: NDArray[np.uint8], edit: Edit) -> dict[str, Any]:
    """Write an edit into a label map and return what changed."""
    origin = edit.origin if edit.origin is not None else (0,) * label.ndim
    stop = tuple(o + n for o, n in zip(origin, edit.label.shape, strict=True)) if edit.label.ndim == label.ndim else ()
    inside = bool(stop) and min(origin) >= 0 and all(s <= n for s, n in zip(stop, label.shape, strict=True))
    if not inside or edit.label.dtype != np.uint8 or (edit.mask is not None and edit.mask.shape != edit.label.shape):
        raise DataError(
            f"case {edit.case!r}: an edit of shape {edit.label.shape} ({edit.label.dtype}) at {origin} does not fit the "
            f"label of shape {label.shape}; uint8 inside the case is needed"
        )
    view = label[tuple(slice(o, s) for o, s in zip(origin, stop, strict=True))]
    mask = edit.mask if edit.mask is not None else np.ones(view.shape, bool)
    differs = mask & (view != edit.label)
    pairs, counts = np.unique(np.stack([view[differs], edit.label[differs]]), axis=1, return_counts=True)
    view[differs] = edit.label[differs]
    return {
        "case": edit.case,
        "author": edit.author,
        "voxels": {f"{old}->{new}": int(n) for (old, new), n in zip(pairs.T, counts, strict=True)},
        "confidence": None if np.isnan(edit.confidence) else edit.confidence,
        "note": edit.note,
    }
