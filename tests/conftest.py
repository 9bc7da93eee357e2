"""What all tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labeleff import registry

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped without it."""
    folder = os.environ.get("LABELEFF_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LABELEFF_DATA is not set to a folder with the real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A folder of prepared images for the whole session of this worker."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    known = {kind: {name: registry.get(kind, name) for name in registry.names(kind)} for kind in registry.PACKAGES}
    monkeypatch.setattr(registry, "_registered", known)


def tiny(**changes):
    """Return plain values of a recipe that runs in a second."""
    recipe = {
        "name": "tiny",
        "data": {
            "dataset": {"name": "phantom", "patients": 8, "test": 3, "size": [32, 32], "slices": 2},
            "labelled": 2,
            "patch": [32, 32],
        },
        "backbone": {"name": "unet", "channels": [4, 8, 16], "dropout": 0.2, "norm": "batch"},
        "stages": [
            {"strategy": "bcp_pretrain", "steps": 6, "batch": 4, "augment": {"rotate": 20.0, "noise": 0.1}},
            {"strategy": "bcp", "steps": 6, "batch": 4, "augment": {"rotate": 20.0, "noise": 0.1}},
        ],
        "trainer": {"checkpoint_every": 2, "log_every": 1},
        "evaluation": {"pictures": False},
    }
    return recipe | changes


def command_line(recipe, folder, cache, *overrides):
    """Run a recipe in a process of its own, as a user does; more than one where ``trainer.devices`` says so."""
    command = [
        sys.executable,
        "-m",
        "labeleff",
        "run",
        str(recipe),
        *overrides,
        "--folder",
        str(folder),
        "--cache",
        str(cache),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
