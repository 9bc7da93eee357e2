"""What every benchmark writes beside its numbers."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from labeleff.data import phantom
from labeleff.rundir import environment

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Return commit, versions, machine, and the hash of the phantom generator."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()  # noqa: S607
    source = Path(phantom.__file__).read_bytes()
    return {"commit": commit, "generator_sha256": hashlib.sha256(source).hexdigest(), "environment": environment()}


def write(name: str, result: dict[str, Any]) -> None:
    """Write ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
