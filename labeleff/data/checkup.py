"""``labeleff audit``: everything in a data set that a run would trip over, or be wrong by, found before one is made."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from labeleff.data.audit import SHOWN, classes_in, confounded, in_words, label_warnings
from labeleff.data.formats import nifti_files
from labeleff.data.formats.base import DataSet
from labeleff.data.lookalikes import Field, factors_for, matches, reduced
from labeleff.data.manifest import ROLES, Case, Manifest, Source
from labeleff.errors import DataError

Kind = Literal["leak", "broken", "warning"]
FEW = 4
"""Cases below which nothing is called an outlier."""
LARGE_FACTOR = 1.5
STEEP = 15.0
"""Tilt of a volume, degrees, that is worth a word where most lie straight."""
MAD = 1.4826


@dataclass(frozen=True)
class Finding:
    """Something to look at. A ``leak`` would stop a run, what is ``broken`` cannot be used, a ``warning`` is to be judged.

    Findings of one ``group``, such as ``pairs that look alike``, may be many: a terminal shows the first.
    """

    kind: Kind
    text: str
    group: str = ""


@dataclass
class Checkup:
    """What an audit found, and what it looked at."""

    findings: list[Finding] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)

    def add(self, kind: Kind, *texts: str, group: str = "") -> None:
        """Note findings of a kind."""
        self.findings += [Finding(kind, text, group) for text in texts]

    def lines(self, shown: int = SHOWN) -> Iterator[str]:
        """Yield a line for each finding, but of a group only the first ``shown``, and how many more there are."""
        said: Counter[str] = Counter()
        of = Counter(finding.group for finding in self.findings)
        for finding in self.findings:
            said[finding.group] += 1
            if not finding.group or said[finding.group] <= shown:
                yield f"{finding.kind}: {finding.text}"
            elif said[finding.group] == of[finding.group]:
                yield f"{finding.kind}: {of[finding.group] - shown} more {finding.group} (--json names all)"

    @property
    def verdict(self) -> str:
        """The audit in a line."""
        count = Counter(finding.kind for finding in self.findings)
        return f"{count['leak']} leaks, {count['broken']} broken, {count['warning']} warnings; " + "; ".join(
            self.looked_at
        )

    @property
    def is_sound(self) -> bool:
        """Nothing has to be repaired."""
        return all(finding.kind == "warning" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"verdict": self.verdict, "findings": [{"kind": f.kind, "text": f.text} for f in self.findings]}


def check_up(
    dataset: DataSet, *, test_labels: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> Checkup:
    """Read every image and label of a data set once and return what is wrong with them, alone and together.

    Args:
        dataset: The data set.
        test_labels: Look at labels of test cases too; else they stay closed.
        on_progress: Called with (done, of).

    Raises:
        DataError: It has no manifest.
        SplitError: A patient plays two roles.
    """
    manifest = dataset.manifest()
    found = Checkup()
    seen: dict[str, Field] = {}
    contents: dict[str, str] = {}
    present: dict[str, frozenset[int]] = {}
    factors = _usual_factors(dataset, manifest)
    for number, case in enumerate(manifest.cases, start=1):
        shape = None
        try:
            for source in (*case.image, *(_label_files(case) if test_labels or case.role != "test" else ())):
                nifti_files.check_sum(source.path, case.id)
            image = dataset.read_image(case)
            _check_image(image, case, manifest, found)
            shape = image.shape[1:]
            contents[case.id] = hashlib.sha256(f"{image.dtype}{image.shape}".encode() + image.tobytes()).hexdigest()
            if len(shape) == manifest.axes:
                seen[case.id] = reduced(np.nan_to_num(image), factors)
        except DataError as error:
            found.add("broken", str(error))
        if case.has_label and (test_labels or case.role != "test"):
            try:
                present[case.id] = _classes_in(dataset, case, manifest, shape)
            except DataError as error:
                found.add("broken", str(error))
        if on_progress is not None:
            on_progress(number, len(manifest.cases))
    found.looked_at.append(f"{len(contents)} of {len(manifest.cases)} images and {len(present)} labels were read")
    if not test_labels and any(case.has_label for case in manifest.of_role("test")):
        found.looked_at.append("test labels were not opened (--test-labels)")
    _duplicates(dataset, manifest, contents, seen, factors, found)
    found.add("warning", *_sites(manifest), *label_warnings(manifest, present))
    found.add("warning", *spacing_outliers(manifest.cases), group="words on spacing")
    found.add("warning", *_orientations(manifest.cases), group="words on orientation")
    return found


def _usual_factors(dataset: DataSet, manifest: Manifest) -> tuple[int, ...]:
    """Return by how much images are reduced, from the first few that can be read."""
    shapes = []
    for case in manifest.cases:
        try:
            shape = dataset.read_image(case).shape[1:]
        except DataError:
            continue  # named when its turn comes
        if len(shape) == manifest.axes:
            shapes.append(shape)
        if len(shapes) == 5:
            break
    return factors_for(shapes) if shapes else (1,) * manifest.axes


def _check_image(image: NDArray[Any], case: Case, manifest: Manifest, found: Checkup) -> None:
    where = f"case {case.id!r}: {case.image[0].path}"
    if image.ndim != manifest.axes + 1 or 0 in image.shape:
        found.add("broken", f"{where}: the image has shape {image.shape}; channels and {manifest.axes} axes are needed")
    elif len(image) != manifest.channels:
        found.add("broken", f"{where}: the image has {len(image)} channels, the data set {manifest.channels}")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        found.add("broken", f"{where}: the image holds NaN or infinite values; repair or remove it")
    elif image.size and image.min() == image.max():
        found.add("warning", f"{where}: the image is {image.flat[0]:g} everywhere")


def _label_files(case: Case) -> list[Source]:
    """Return all label files of a case."""
    return [*(case.label.parts if case.label is not None else ()), *case.raters]


def _classes_in(dataset: DataSet, case: Case, manifest: Manifest, shape: tuple[int, ...] | None) -> frozenset[int]:
    """Return the classes in all labels of a case.

    Raises:
        DataError: A label cannot be used.
    """
    labels = [dataset.read_label(case)] if case.label is not None else []
    labels += list(dataset.read_votes(case)) if case.raters else []
    for label in labels:
        if shape is not None and label.shape != shape:
            raise DataError(f"case {case.id!r}: the label has shape {label.shape}, the image {shape}")
    return frozenset[int]().union(*(classes_in(label, manifest) for label in labels))


def _duplicates(
    dataset: DataSet,
    manifest: Manifest,
    contents: Mapping[str, str],
    seen: Mapping[str, Field],
    factors: tuple[int, ...],
    found: Checkup,
) -> None:
    """Find images that occur twice, as they are or nearly; across roles they leak."""
    role_of = {case.id: case.role for case in manifest.cases}
    first: dict[str, str] = {}
    for name, content in contents.items():
        if (other := first.setdefault(content, name)) != name:
            text = f"cases {other!r} ({role_of[other]}) and {name!r} ({role_of[name]}) are the same image"
            found.add("leak" if role_of[other] != role_of[name] else "warning", text)

    def apart(one: str, two: str) -> bool:
        return manifest.case(one).patient != manifest.case(two).patient and contents[one] != contents[two]

    pairs, unsaid = matches(
        seen, factors=factors, full=lambda name: dataset.read_image(manifest.case(name)), apart=apart
    )
    for pair in (pair for pair in pairs if pair.is_copy):
        found.add("leak" if role_of[pair.one] != role_of[pair.two] else "warning", in_words(pair, role_of))
    alike = sorted(
        (pair for pair in pairs if not pair.is_copy), key=lambda pair: role_of[pair.one] == role_of[pair.two]
    )
    found.add("warning", *(in_words(pair, role_of) for pair in alike), group="pairs that look alike")
    found.add("warning", *([unsaid] if unsaid else []))


def _sites(manifest: Manifest) -> list[str]:
    """Return what sites have to do with roles, and with who has a label."""
    roles: dict[str, list[str]] = {role: [case.id for case in manifest.of_role(role)] for role in ROLES}
    found = confounded(manifest, roles)
    train = manifest.of_role("train")
    labelled = {case.domain for case in train if case.has_label}
    bare = sorted({case.domain for case in train} - labelled)
    if labelled and bare:
        found.append(f"no training case of {', '.join(domain or 'unnamed' for domain in bare)} has a label")
    return found


def spacing_outliers(cases: Sequence[Case]) -> list[str]:
    """Return the cases whose voxel size is far from the usual one along an axis: 1.5 times, and 5 robust deviations."""
    known = [(case, case.spacing) for case in cases if case.spacing is not None]
    found = [f"the spacing of {len(cases) - len(known)} cases is not known"] if 0 < len(known) < len(cases) else []
    if len(known) < FEW:
        return found
    logs = np.log(np.array([spacing for _, spacing in known]))
    middle = np.median(logs, axis=0)
    distance = np.abs(logs - middle)
    limit = np.maximum(np.log(LARGE_FACTOR), 5 * MAD * np.median(distance, axis=0))
    usual = " × ".join(f"{n:g}" for n in np.exp(middle).round(4))
    odd = [
        f"case {case.id!r}: spacing {' × '.join(f'{n:g}' for n in spacing)} mm, the usual one is {usual} mm"
        for (case, spacing), far in zip(known, (distance > limit).any(axis=1), strict=True)
        if far
    ]
    return [*found, *odd]


def _orientations(cases: Sequence[Case]) -> list[str]:
    """Return the volumes that are stored another way than most; reading brings them to one orientation all the same."""
    codes: dict[str, list[str]] = defaultdict(list)
    tilts: dict[str, float] = {}
    for case in cases:
        if nifti_files.is_nifti(case.image[0].path):
            try:
                code, tilts[case.id] = nifti_files.orientation_of(case.image[0].path, case.id)
            except DataError:
                continue  # named where it was read
            codes[code].append(case.id)
    if len(tilts) < FEW:
        return []
    usual = max(codes, key=lambda code: len(codes[code]))
    found = []
    for code, names in codes.items():
        if code != usual and len(names) < 0.2 * len(tilts) + 1:
            shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            found.append(
                f"{'without a geometry' if code == 'none' else f'stored {code}'}, where most are "
                f"{'without one' if usual == 'none' else usual}: {shown}"
            )
    if np.median(list(tilts.values())) < STEEP / 3:
        found += [
            f"case {name!r}: tilted by {tilt:.0f}°, most lie straight" for name, tilt in tilts.items() if tilt > STEEP
        ]
    return found
