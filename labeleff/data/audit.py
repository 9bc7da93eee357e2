"""The auditor of splits: patients and images that play two roles stop a run before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from labeleff.data.manifest import Manifest
from labeleff.data.split import Split
from labeleff.errors import SplitError

FEW_CASES = 50


@dataclass(frozen=True)
class Audit:
    """What was found. ``leaks`` stop a run; ``warnings`` travel with its result."""

    leaks: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def audit(manifest: Manifest, split: Split, *, contents: Mapping[str, str]) -> Audit:
    """Look for what two roles share.

    Args:
        manifest: The data set.
        split: The roles.
        contents: Hash of the decoded image by case id.
    """
    roles = {name: getattr(split, name) for name in ("labelled", "unlabelled", "validation", "test")}
    leaks: list[str] = []
    warnings: list[str] = []
    for (one, first), (two, second) in combinations(roles.items(), 2):
        if (one, two) == ("labelled", "unlabelled"):
            continue  # some slices of a patient may be labelled and others not
        patients = {manifest.case(i).patient: i for i in first}
        for other in second:
            if (mine := patients.get(manifest.case(other).patient)) is not None:
                leaks.append(
                    f"patient {manifest.case(other).patient!r} is in {one} (case {mine!r}) and in {two} (case {other!r})"
                )
    seen: dict[str, tuple[str, str]] = {}
    for role, ids in roles.items():
        for name in ids:
            earlier = seen.setdefault(contents[name], (role, name))
            if earlier[1] == name:
                continue
            text = f"cases {earlier[1]!r} ({earlier[0]}) and {name!r} ({role}) are the same image"
            only_training = {earlier[0], role} <= {"labelled", "unlabelled"}
            (warnings if only_training or earlier[0] == role else leaks).append(text)
    count = len({manifest.case(i).patient for i in split.test})
    if 0 < count < FEW_CASES:
        warnings.append(f"evaluated on {count} patients: intervals will be wide")
    return Audit(tuple(leaks), tuple(warnings))


def check_audit(manifest: Manifest, split: Split, *, contents: Mapping[str, str]) -> Audit:
    """Return the audit of a split without leaks.

    Raises:
        SplitError: There are leaks; the first are named.
    """
    found = audit(manifest, split, contents=contents)
    if found.leaks:
        more = f" (and {len(found.leaks) - 3} more)" if len(found.leaks) > 3 else ""
        raise SplitError(f"{manifest.name}: {'; '.join(found.leaks[:3])}{more}. Give each patient and image one role")
    return found
