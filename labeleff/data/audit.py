"""The auditor of splits: patients and images that play two roles stop a run before it starts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE
from labeleff.data.lookalikes import ALIKE, COPY, Field, Match, factors_for, matches, too_many
from labeleff.data.manifest import Manifest
from labeleff.data.split import Split
from labeleff.errors import SplitError

FEW_CASES = 50
SHOWN = 10
"""Pairs and cases that are named; more are counted."""
_TRAINING = ("labelled", "unlabelled")


class Prepared(Protocol):
    """What is asked of prepared images, see :class:`labeleff.data.store.ImageStore`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return *S of a case."""

    def reduced(self, name: str, factors: tuple[int, ...]) -> Field:
        """Return the image of a case, reduced along each axis, channels averaged."""

    def read(self, name: str) -> NDArray[np.float32]:
        """Return the image [C, *S] of a case."""

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return plain values that an earlier run has kept under a name, else make and keep them."""


@dataclass(frozen=True)
class Audit:
    """What was found. ``leaks`` stop a run; ``warnings`` travel with its result, as does what was ``checked``."""

    leaks: tuple[str, ...]
    warnings: tuple[str, ...]
    checked: tuple[str, ...] = ("patients", "same images")

    @property
    def verdict(self) -> str:
        """The audit in a line."""
        leaks = f"{len(self.leaks)} leaks" if self.leaks else "no leaks"
        return f"{leaks}, {len(self.warnings)} warnings; checked: {', '.join(self.checked)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"verdict": self.verdict, **asdict(self)}

    def with_labels(self, warnings: Sequence[str]) -> Audit:
        """Return the audit with what was found in the labels of the budget."""
        return replace(self, warnings=(*self.warnings, *warnings), checked=(*self.checked, "labels of the budget"))


def audit(
    manifest: Manifest,
    split: Split,
    *,
    contents: Mapping[str, str],
    images: Prepared | None = None,
    adapted: bool = False,
) -> Audit:
    """Look for what two roles share.

    Args:
        manifest: The data set.
        split: The roles.
        contents: Hash of the decoded image by case id.
        images: Prepared images; with them, copies are found whose files differ: mirrored, saved again, resized, cropped.
        adapted: That labels are of other sites than the test is meant.
    """
    roles = {name: getattr(split, name) for name in (*_TRAINING, "validation", "test")}
    leaks = _shared_patients(manifest, roles)
    same, warnings = _same_images(roles, contents)
    leaks += same
    checked: tuple[str, ...] = ("patients", "same images")
    if images is not None:
        copies, alike = _nearly_the_same(manifest, roles, contents, images)
        leaks += copies
        warnings += alike
        checked += ("images that look the same",)
    if not adapted:
        warnings += confounded(manifest, {role: ids for role, ids in roles.items() if role != "unlabelled"})
        checked += ("sites",)
    count = len({manifest.case(i).patient for i in split.test})
    if 0 < count < FEW_CASES:
        warnings.append(f"evaluated on {count} patients: intervals will be wide")
    return Audit(tuple(leaks), tuple(warnings), checked)


def _shared_patients(manifest: Manifest, roles: Mapping[str, Sequence[str]]) -> list[str]:
    found = []
    for (one, first), (two, second) in combinations(roles.items(), 2):
        if (one, two) == _TRAINING:
            continue  # some slices of a patient may be labelled and others not
        patients = {manifest.case(i).patient: i for i in first}
        for other in second:
            if (mine := patients.get(manifest.case(other).patient)) is not None:
                found.append(
                    f"patient {manifest.case(other).patient!r} is in {one} (case {mine!r}) and in {two} (case {other!r})"
                )
    return found


def _same_images(roles: Mapping[str, Sequence[str]], contents: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return images that are in two roles, and those that are twice in one."""
    leaks: list[str] = []
    warnings: list[str] = []
    seen: dict[str, tuple[str, str]] = {}
    for role, ids in roles.items():
        for name in ids:
            earlier = seen.setdefault(contents[name], (role, name))
            if earlier[1] == name:
                continue
            text = f"cases {earlier[1]!r} ({earlier[0]}) and {name!r} ({role}) are the same image"
            only_training = {earlier[0], role} <= set(_TRAINING)
            (warnings if only_training or earlier[0] == role else leaks).append(text)
    return leaks, warnings


def check_audit(
    manifest: Manifest,
    split: Split,
    *,
    contents: Mapping[str, str],
    images: Prepared | None = None,
    adapted: bool = False,
) -> Audit:
    """Return the audit of a split without leaks.

    Raises:
        SplitError: There are leaks; the first are named.
    """
    found = audit(manifest, split, contents=contents, images=images, adapted=adapted)
    if found.leaks:
        more = f" (and {len(found.leaks) - 3} more)" if len(found.leaks) > 3 else ""
        raise SplitError(f"{manifest.name}: {'; '.join(found.leaks[:3])}{more}. Give each patient and image one role")
    return found


def _nearly_the_same(
    manifest: Manifest, roles: Mapping[str, Sequence[str]], contents: Mapping[str, str], images: Prepared
) -> tuple[list[str], list[str]]:
    """Return copies and look-alikes that training shares with validation or test, or those with one another."""
    role_of = {name: role for role, ids in roles.items() for name in ids}
    side = {name: "training" if role in _TRAINING else role for name, role in role_of.items()}
    if len(set(side.values())) < 2:
        return [], []
    if said := too_many(len(side)):
        return [], [said]

    def apart(one: str, two: str) -> bool:
        # patients of two roles, and the same image twice, are said already
        other = manifest.case(one).patient != manifest.case(two).patient
        return side[one] != side[two] and other and contents[one] != contents[two]

    def looked_for() -> Any:
        factors = factors_for([images.shape(name) for name in role_of])
        reduced = {name: images.reduced(name, factors) for name in role_of}
        found, unsaid = matches(reduced, factors=factors, full=images.read, apart=apart)
        return {"matches": [astuple(match) for match in found], "unsaid": unsaid}

    key = [COPY, ALIKE, sorted((name, contents[name], side[name], manifest.case(name).patient) for name in role_of)]
    known = images.kept(f"lookalikes-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}", looked_for)
    found, unsaid = [Match(*values) for values in known["matches"]], known["unsaid"]
    copies = [in_words(match, role_of) for match in found if match.is_copy]
    alike = [in_words(match, role_of) for match in found if not match.is_copy]
    return copies, [*listed(alike, "pairs that look alike"), *([unsaid] if unsaid else [])]


def in_words(match: Match, role_of: Mapping[str, str]) -> str:
    """Return what two images have in common, as a sentence."""
    one, two = (f"{name!r} ({role_of[name]})" for name in (match.one, match.two))
    if not match.is_copy:
        return f"cases {one} and {two} look alike (correlation {match.score:.2f}): scans of one person, or neighbours?"
    if match.how == "a crop of":
        return f"case {two} is a crop of {one} (correlation {match.score:.2f})"
    return f"cases {one} and {two} are the same image{', ' if match.how else ''}{match.how} (correlation {match.score:.2f})"


def listed(texts: Sequence[str], what: str) -> list[str]:
    """Return the first texts, and how many more there are."""
    return [*texts[:SHOWN], *([f"{len(texts) - SHOWN} more {what}"] if len(texts) > SHOWN else [])]


def confounded(manifest: Manifest, roles: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what roles and domains have to do with one another where a data set has several domains.

    Args:
        manifest: The data set.
        roles: Case ids by role; labels come from the first one.
    """
    where = {role: Counter(manifest.case(name).domain for name in ids) for role, ids in roles.items()}
    if len({domain for count in where.values() for domain in count}) < 2:
        return []
    first, *others = where
    known = where[first]
    found = []
    for role in others:
        strange = [domain for domain in where[role] if domain not in known]
        if not known or not strange:
            continue
        names = ", ".join(f"{domain or 'unnamed'} ({where[role][domain]} cases)" for domain in sorted(strange))
        if len(strange) == len(where[role]):
            mine = ", ".join(domain or "unnamed" for domain in sorted(known))
            found.append(f"{first} cases are of {mine}, {role} cases of {names}: no site is in both")
        else:
            found.append(f"{role} cases of {names}: no {first} case is of there")
    return found


def audit_labels(manifest: Manifest, cases: Sequence[str], read: Callable[[str], NDArray[np.uint8]]) -> list[str]:
    """Return what stands out in labels of classes and IGNORE.

    Args:
        manifest: The data set.
        cases: Whose labels are looked at.
        read: Reads a label.
    """
    return label_warnings(manifest, {name: classes_in(read(name), manifest) for name in cases})


def classes_in(label: NDArray[np.uint8], manifest: Manifest) -> frozenset[int]:
    """Return the classes that a label holds, background and IGNORE among them; of bits, the regions they stand for."""
    values = {int(value) for value in np.unique(label)}
    if not manifest.overlapping:
        return frozenset(values)
    bits = values - {0, IGNORE}
    regions = {r for r in range(1, len(manifest.classes)) if any(value >> (r - 1) & 1 for value in bits)}
    return frozenset(regions | (values & {0, IGNORE}))


def label_warnings(manifest: Manifest, present: Mapping[str, frozenset[int]]) -> list[str]:
    """Return what stands out in the classes that labels hold: empty ones, and classes that nobody or one site alone has."""
    if not present:
        return []
    silent = [name for name, values in present.items() if values <= {IGNORE}]
    empty = [name for name, values in present.items() if values <= {0, IGNORE} and name not in silent]
    found = []
    for names, what in ((silent, "say nothing (all unlabelled)"), (empty, "hold background only")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            found.append(f"labels of {len(names)} of {len(present)} cases {what}: {', '.join(names[:SHOWN])}{more}")
    domains = Counter(manifest.case(name).domain for name in present)
    for index, name in enumerate(manifest.classes[1:], start=1):
        holders = Counter(manifest.case(case).domain for case, values in present.items() if index in values)
        if not holders:
            found.append(f"the class {name!r} is in none of {len(present)} labels")
        elif len(holders) == 1 and len([d for d, n in domains.items() if n > 2]) > 1:
            (domain,) = holders
            found.append(
                f"the class {name!r} is in labels of {domain or 'unnamed'} only: site and class cannot be told apart"
            )
    return found
