"""What weights have learnt from, in the header of the file they travel in, and whether a new test list meets it.

A header is text by whoever wrote the file: it is read as JSON of a bounded size and known types, and nothing in it is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from labeleff.errors import RunError, one_line

HEADER = "labeleff"
"""The entry of a safetensors header that is ours: one, since several would come in an order of chance."""
LARGEST = 1 << 25
"""Characters of an entry that is looked at: a million cases and a recipe fit."""
DIGITS = 16
"""Hex digits kept of the SHA-256 of a case: 8 bytes, of which two differ among a million cases but for one time in 10⁷."""
NAMES, LONGEST = 100, 300
"""Data sets and files that are named at the most, and the characters of a name that are kept."""
SHOWN = 5


def digest(content: str) -> str:
    """Return what is kept of the SHA-256 of a decoded image, in hex."""
    return content[:DIGITS]


@dataclass(frozen=True)
class Provenance:
    """What weights have learnt from.

    Args:
        cases: Digests of the images of all cases that any stage saw, as they came: labelled or not, validation and
            development among them.
        datasets: Names of the data sets.
        unknown: Files that training started from and that do not say what they have learnt from.
    """

    cases: frozenset[str] = frozenset()
    datasets: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def joined(self, other: Provenance) -> Provenance:
        """Return what both together have learnt from."""
        return Provenance(
            self.cases | other.cases,
            tuple(dict.fromkeys((*self.datasets, *other.datasets)))[:NAMES],
            tuple(dict.fromkeys((*self.unknown, *other.unknown)))[:NAMES],
        )

    def as_plain(self) -> dict[str, Any]:
        """Return plain values for a header."""
        return {"cases": "".join(sorted(self.cases)), "datasets": list(self.datasets), "unknown": list(self.unknown)}


def provenance_from(plain: Any) -> Provenance | None:
    """Return the provenance that plain values of a stranger hold; None where they do not."""
    if not isinstance(plain, Mapping) or not isinstance(text := plain.get("cases"), str):
        return None
    if len(text) % DIGITS or not re.fullmatch(r"[0-9a-f]*", text):
        return None
    names = [plain.get(key, []) for key in ("datasets", "unknown")]
    if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in names):
        return None
    cases = frozenset(text[i : i + DIGITS] for i in range(0, len(text), DIGITS))
    return Provenance(cases, *(tuple(_printable(name) for name in each[:NAMES]) for each in names))


def _printable(name: str) -> str:
    """Return the beginning of a name by a stranger, on one line and without what a terminal would obey."""
    return "".join(letter for letter in name[:LONGEST] if letter.isprintable())


def provenance_in(path: Path) -> Provenance | None:
    """Return what a file of weights says that it has learnt from; None where it says nothing that can be read.

    Raises:
        RunError: There is no such file, or it is a torn one.
    """
    if not path.is_file():
        raise RunError(f"{path}: these weights cannot be read (there is no such file)")
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(HEADER, "")
        plain = json.loads(text) if 0 < len(text) <= LARGEST else {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: these weights cannot be read ({one_line(error)})") from error
    except (ValueError, RecursionError):
        return None
    return provenance_from(plain.get("provenance")) if isinstance(plain, dict) else None


@dataclass(frozen=True)
class Start:
    """A file that a stage starts from.

    Args:
        stage: Its number.
        file: As the recipe names it.
        provenance: What the file says that it has learnt from; None: nothing.
        overlap: Test cases of this run that are among that.
    """

    stage: int
    file: str
    provenance: Provenance | None
    overlap: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What must stand beside a result that rests on the file; empty where nothing must."""
        where = f"stages.{self.stage}.start: {self.file}"
        if self.provenance is None:
            return f"{where} does not say what it has learnt from; whether it has seen test cases of this run cannot be checked"
        if self.overlap:
            return f"{where} has learnt from {self.in_words} of this run: not a result"
        if self.provenance.unknown:
            named = ", ".join(self.provenance.unknown[:SHOWN])
            return f"{where} goes back to weights that do not say what they have learnt from ({named})"
        return ""

    @property
    def in_words(self) -> str:
        """The overlap, counted and named."""
        more = f" and {len(self.overlap) - SHOWN} more" if len(self.overlap) > SHOWN else ""
        return f"{len(self.overlap)} test cases ({', '.join(map(repr, self.overlap[:SHOWN]))}{more})"

    def as_plain(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        known = None if self.provenance is None else self.provenance.as_plain()
        return {"stage": self.stage, "file": self.file, "provenance": known, "overlap": list(self.overlap)}


def start_from(stage: int, file: str, test: Iterable[tuple[str, str]], *, allowed: bool) -> Start:
    """Return what a stage starts from.

    Args:
        stage: Its number.
        file: Weights.
        test: Test cases of the run: ids and SHA-256 of the images as they came.
        allowed: The file may have learnt from them.

    Raises:
        RunError: The file cannot be read, or has learnt from some of them and must not.
    """
    found = provenance_in(Path(file))
    seen = found.cases if found is not None else frozenset()
    start = Start(stage, file, found, tuple(name for name, content in test if digest(content) in seen))
    if start.overlap and not allowed:
        raise RunError(
            f"stages.{stage}.start: {file} has learnt from {start.in_words} of this run; start from other weights or test on "
            "other cases (start_overlap: allow runs it, and marks the result)"
        )
    return start


def starts_in(content: Any) -> tuple[Start, ...]:
    """Return what was written down of the files that a run starts from.

    Raises:
        ValueError: It was not written by :meth:`Start.as_plain`.
    """
    if not isinstance(content, list):
        raise ValueError("no list")
    found = []
    for row in content:
        known = provenance_from(row["provenance"])
        if known is None and row["provenance"] is not None:
            raise ValueError("no provenance")
        found.append(Start(int(row["stage"]), str(row["file"]), known, tuple(row["overlap"])))
    return tuple(found)
