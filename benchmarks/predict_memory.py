"""What predicting one large volume takes: ``python benchmarks/predict_memory.py``.

A volume of 512 x 512 x 600 (``--shape``) of 16-bit noise and a U-Net of MONAI with random weights and windows of 96 voxels, in a
process of its own: peak memory (that of the imports beside it), seconds per window. ``--check`` compares the label map with
that of the in-memory path, which takes the memory that it takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from common import provenance, write
from safetensors.torch import save

from labeleff import predict as prediction
from labeleff.backbones.weights import state_of
from labeleff.evaluation.inference import count_windows, predict_volume, segment
from labeleff.predictor import FILE, HEADER, Processing, open_predictor
from labeleff.prepared import make_backbone
from labeleff.recipe_io import load_recipe, to_mapping
from labeleff.unseen import read_unseen

UNIT = 1 if sys.platform == "darwin" else 1024


def write_run(folder: Path, side: int) -> None:
    """Write what a finished run leaves for prediction."""
    recipe = load_recipe(
        {
            "name": "large",
            "data": {"dataset": {"name": "phantom"}, "patch": [side] * 3},
            "backbone": {"name": "unet"},
            "stages": [{"strategy": "supervised", "steps": 1}],
        }
    )
    processing = Processing(
        axes=3, dimensions=3, channels=1, classes=("background", "organ"), exclusive=True, orientation="RAS", spacing=None,
        seen=None, normalise="zscore", slice_axis=None, patch=(side,) * 3, overlap=0.5, window_batch=2,
        largest_component=False,
    )  # fmt: skip
    header = {
        "version": "benchmark", "predictor": "student", "recipe": to_mapping(recipe), "split": "",
        "classes": list(processing.classes), "processing": processing.as_plain(),
    }  # fmt: skip
    network = make_backbone(recipe, processing.task, 0)
    (folder / FILE).write_bytes(save(state_of(network), metadata={HEADER: json.dumps(header)}))


def child(folder: Path) -> None:
    """Predict, and print what it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
    said: list[str] = []
    prediction.predict([folder], folder / "image.nii", folder / "label.nii", device="cpu", say=said.append)
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"imports": before, "peak": after.ru_maxrss * UNIT, "cpu": after.ru_utime, "said": said[-1]}))


def main() -> None:
    """Measure, and write ``results/predict_memory.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", type=int, nargs=3, default=(512, 512, 600))
    options.add_argument("--side", type=int, default=96)
    options.add_argument("--check", action="store_true")
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.child is not None:
        child(chosen.child)
        return
    shape = tuple(chosen.shape)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, chosen.side)
        noise = np.random.default_rng(0).integers(-1000, 1000, shape, np.int16)
        nib.save(nib.Nifti1Image(noise, np.diag([0.7, 0.7, 1.0, 1.0])), folder / "image.nii")
        del noise
        command = [sys.executable, __file__, "--child", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        windows = count_windows(shape, (chosen.side,) * 3, 0.5)
        result = {
            "shape": list(shape),
            "window": chosen.side,
            "windows": windows,
            "peak_GiB": found["peak"] / 2**30,
            "imports_GiB": found["imports"] / 2**30,
            "cpu_seconds_per_window": found["cpu"] / windows,
            "threads": torch.get_num_threads(),
            "said": found["said"].partition(": ")[2],
        }
        if chosen.check:
            predictor = open_predictor(folder)
            case = read_unseen([folder / "image.nii"], predictor.processing)
            probs = predict_volume(
                predictor.network, torch.from_numpy(case.image), ndim=3, patch=predictor.processing.patch,
                window_batch=2, num_classes=2,
            )  # fmt: skip
            label = np.asarray(nib.load(folder / "label.nii").dataobj)
            result["equal_to_in_memory"] = bool(np.array_equal(segment(probs), label))
    print(json.dumps(result, indent=1))
    write("predict_memory", result | provenance())


if __name__ == "__main__":
    main()
