"""A run at work on a node of its own, and what is kept of it in the sweep's folder, for machines that share no folder.

All rests on one order. A run writes a file when everything that file relies on is on the disk. So a directory is read the
other way round, what relies on others first, and is put in place in the order of the run: a copy that ends anywhere is the
directory of a run that was killed there, and is resumed like one.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from labeleff.files import write_atomically
from labeleff.sweep.worker import wait_for_lock

OPENINGS = "test_openings.jsonl"
INCOMING = ".incoming"
Mark = tuple[int, int, int]
"""Inode, size in bytes and time of the last change in ns: a file with the same mark is the same file."""


@dataclass(frozen=True)
class Parcel:
    """What has changed in a run directory.

    Args:
        archive: A tar of the changed files, what relies on others first.
        checkpoints: All checkpoint files that are there, changed or not.
        marks: All files that are there.
    """

    archive: bytes
    checkpoints: frozenset[str]
    marks: Mapping[str, Mark]


def _rank(path: Path) -> int:
    """Return the turn of a file: of two, the one that may rely on the other has the lower number."""
    if path.name in ("comparison.json", "summary.json"):
        return 0
    if path.parent.name == "checkpoints":
        return 1 if path.suffix == ".ckpt" else 2
    if path.parent.name == "annotations":
        return 3
    return 4 if path.parent.name == "revisions" else 5


def _files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield files and their turns. Every turn lists the folder anew: what was read relies on what is there only now."""
    for turn in range(6):
        found = [path for path in folder.rglob("[!.]*") if _rank(path) == turn]
        for path in sorted(found, key=lambda path: (len(path.parts), path.name), reverse=turn == 1):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if not hidden and path.is_file() and not path.is_symlink():
                yield turn, path


def pack(folder: Path, known: Mapping[str, Mark]) -> Parcel:
    """Return what has changed in a run directory, which may be at work. Locks and temporary files stay.

    Args:
        folder: The run directory.
        known: Marks of the files that the other side has.
    """
    buffer = io.BytesIO()
    marks: dict[str, Mark] = {}
    checkpoints = set()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for turn, path in _files(folder):
            name = path.relative_to(folder).as_posix()
            try:
                with path.open("rb") as file:
                    status = os.fstat(file.fileno())
                    marks[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
                    content = b"" if known.get(name) == marks[name] else file.read()
            except FileNotFoundError:  # an old checkpoint that has just been dropped
                continue
            if turn in (1, 2):
                checkpoints.add(name)
            if known.get(name) == marks[name]:
                continue
            if path.suffix == ".jsonl":
                content = content[: content.rfind(b"\n") + 1]  # a line that is being written is none yet
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), int(status.st_mtime)
            archive.addfile(entry, io.BytesIO(content))
    return Parcel(buffer.getvalue(), frozenset(checkpoints), marks)


def unpack(archive: bytes, folder: Path) -> list[str]:
    """Write the files of an archive into a folder, and return their names in the archive's order."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as content:
        names = [tarfile.data_filter(entry, str(folder)).name for entry in content]
        content.extractall(folder, filter="data")
    return names


def install(parcel: Parcel, folder: Path) -> None:
    """Bring a run directory to the state of a parcel: file by file, each at once, what others rely on first."""
    incoming = folder / INCOMING
    shutil.rmtree(incoming, ignore_errors=True)  # of a push that was killed
    incoming.mkdir(parents=True)
    for name in reversed(unpack(parcel.archive, incoming)):
        source, target = incoming / name, folder / name
        if target.name == OPENINGS and target.exists():
            source.write_bytes(_no_line_less(target.read_bytes(), source.read_bytes()))
        with source.open("rb") as file:
            os.fsync(file.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    for turn, path in _files(folder):
        if turn in (1, 2) and path.relative_to(folder).as_posix() not in parcel.checkpoints:
            path.unlink()
    shutil.rmtree(incoming, ignore_errors=True)


def _no_line_less(before: bytes, after: bytes) -> bytes:
    """Return the later log of openings, with whatever line of the earlier one it lacks."""
    if after.startswith(before):
        return after
    more = Counter(after.splitlines(keepends=True)) - Counter(before.splitlines(keepends=True))
    return before + b"".join(more.elements())


def landmarks(folder: Path) -> frozenset[tuple[str, int]]:
    """Return what makes a push worth while: checkpoints, and the lengths of the logs of openings."""
    found = {(str(path), 0) for path in folder.rglob("checkpoints/[!.]*.ckpt")}
    return frozenset(found | {(str(path), path.stat().st_size) for path in folder.rglob(OPENINGS)})


class Keeper:
    """Keeps the state of runs that are at work elsewhere, and gives it to the next attempt.

    Args:
        places: Run directory and log by name of the run.
    """

    def __init__(self, places: Mapping[str, tuple[Path, Path]]) -> None:
        self._places = places
        self._attempts: dict[str, str] = {}

    def begin(self, name: str, attempt: str) -> tuple[bytes, bytes]:
        """Return an archive of what is kept of a run, and its log. Earlier attempts are not listened to any more."""
        folder, log = self._places[name]
        self._attempts[name] = attempt
        wait_for_lock(folder)
        return pack(folder, {}).archive, log.read_bytes() if log.exists() else b""

    def push(self, name: str, attempt: str, parcel: Parcel, log: bytes) -> bool:
        """Keep the state of a run; False where another attempt has taken its place."""
        if self._attempts.setdefault(name, attempt) != attempt:
            return False
        folder, path = self._places[name]
        install(parcel, folder)
        write_atomically(path, log)
        return True
