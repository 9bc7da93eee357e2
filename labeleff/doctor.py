"""What of this machine matters to a run, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from labeleff.errors import one_line
from labeleff.machine import cores, in_bytes
from labeleff.prepare import DEFAULT_CACHE

State = Literal["good", "note", "bad"]
EXTRAS = {
    "SimpleITK": "DICOM, and several raters joined by STAPLE",
    "onnx": "export to ONNX",
    "onnxruntime": "export to ONNX",
    "onnxscript": "export to ONNX",
    "ray": "sweeps on a cluster",
    "mlflow": "tracking",
    "wandb": "tracking",
}
LEAST_DISK = 2 * 2**30
LITTLE_DISK = 20 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        state: ``good``; ``note``: worth knowing; ``bad``: runs will fail or go wrong.
        what: What was looked at.
        words: What was found, and what helps.
    """

    state: State
    what: str
    words: str


def examine(*, cache: Path | None = None) -> list[Finding]:
    """Return all that was found.

    Args:
        cache: Where prepared images are kept; None: the default.
    """
    place = cache or DEFAULT_CACHE
    return [
        Finding("good", "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        *_packages(),
        *_extras(),
        *_devices(),
        _data(os.environ.get("LABELEFF_DATA", "")),
        _folder("prepared images", place),
        _folder("this folder", Path.cwd()),
    ]


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what the package asks for: there the versions with known faults are left out."""
    wrong, count = [], 0
    for text in metadata.requires("labeleff") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed: pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} has known faults or is too old: pip install '{requirement}'")
    yield from (Finding("bad", "packages", words) for words in wrong)
    if not wrong:
        yield Finding(
            "good", "packages", f"all {count} are of versions that labeleff runs with; torch {torch.__version__}"
        )


def _extras() -> Iterator[Finding]:
    missing = [f"{name} ({use})" for name, use in EXTRAS.items() if find_spec(name) is None]
    if missing:
        yield Finding(
            "note", "extras", f"not installed, and only needed for what stands beside them: {', '.join(missing)}"
        )


def _devices() -> Iterator[Finding]:
    yield Finding("good", "cpu", f"{cores()} cores, {torch.get_num_threads()} threads of torch, {_memory()}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if built and Path("/dev/nvidiactl").exists():
            words = f"there is one, but torch (made for {built}) cannot use it; is its driver as new as torch wants it?"
            yield Finding("bad", "gpu", words)
        else:
            yield Finding("note", "gpu", "none that torch can use; networks run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            sample = torch.ones(8, device=f"cuda:{index}")
            works = float((sample @ sample).cpu()) == 8
            free, total = torch.cuda.mem_get_info(index)
        except (RuntimeError, AssertionError) as error:  # the latter where torch was made without CUDA
            yield Finding("bad", "gpu", f"{name} (cuda:{index}) fails: {one_line(error)}")
            continue
        state: State = "good" if works else "bad"
        said = "" if works else ", and computes wrongly"
        yield Finding(state, "gpu", f"{name} (cuda:{index}), {in_bytes(free)} of {in_bytes(total)} free{said}")


def _memory() -> str:
    try:
        return f"{in_bytes(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def _data(value: str) -> Finding:
    """Look at the folder that paths of data sets are relative to."""
    if not value:
        return Finding(
            "note", "data", "LABELEFF_DATA is not set; recipes that name a data set by a relative path need it"
        )
    folder = Path(value)
    if not folder.is_dir():
        return Finding(
            "bad", "data", f"LABELEFF_DATA is {value}, which is no folder; set it to the folder of data sets"
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        return Finding("bad", "data", f"LABELEFF_DATA is {value}, which may not be read; change its permissions")
    count = sum(path.is_dir() for path in folder.iterdir())
    return Finding("good", "data", f"LABELEFF_DATA is {value}, with {count} folder(s)")


def _folder(what: str, folder: Path) -> Finding:
    """Look at a folder that is written to: whether it can be, and how much fits."""
    there = folder
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding("bad", what, f"{folder} cannot be written to ({error.strerror}); give another one")
    free = shutil.disk_usage(there).free
    words = f"{folder}, {in_bytes(free)} free"
    if free < LEAST_DISK:
        return Finding("bad", what, f"{words}: too little for checkpoints and prepared images; make room")
    return Finding("note" if free < LITTLE_DISK else "good", what, words)
