"""What ADELE costs beside its network passes: ``python benchmarks/step_cost_adele.py``.

CPU time, one thread, MONAI's U-Net with 16 base channels, phantom batches:

* the median step (resizing, losses, joint backward, optimiser) over the median of its bare passes: forwards of images that
  are resized already, and one backward through all of them; alternating in one process;
* the share of a step that watching the training-IoU curves takes;
* seconds per case of a revision at which every class is due (prediction, correction, writing), and of its network passes;
* milliseconds to judge the curve of one class of 100 windows, the slowest of several kinds of curve.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CPU, WARM_UP, augmented, built, in_turn, provenance, whole, write
from step_cost import CHANNELS, SHAPES, seconds
from torch import nn

from labeleff.annotators.label_correction import LabelCorrection
from labeleff.batch import Batch, Progress
from labeleff.data.rounds import Rounds
from labeleff.functional.adele import correction_epoch
from labeleff.functional.resizing import resized
from labeleff.prepare import prepare
from labeleff.prepared import Prepared
from labeleff.process import set_up_process
from labeleff.recipe_io import load_recipe
from labeleff.reviewing import Reviewing
from labeleff.strategies.base import Strategy

ROUNDS, REVISIONS = 30, 10


def prepared(folder: Path, *, ndim: int, size: list[int], batch: int, channels: Sequence[int] = CHANNELS) -> Prepared:
    """Return the data of an ADELE recipe on phantoms."""
    values = {
        "name": "step-cost-adele",
        "data": {
            "dataset": {"name": "phantom", "patients": 20, "test": 1, "ndim": ndim, "size": size, "slices": 1},
            "labelled": 4,
            "patch": size,
        },
        "backbone": {"name": "unet", "channels": list(channels)},
        "stages": [
            {"strategy": "adele", "annotator": "label_correction", "revise_every": 1000, "steps": 1000, "batch": batch}
        ],
    }
    return prepare(load_recipe(values), folder / "run", cache=folder.parent / "cache")


def measure(
    data: Prepared, rounds: int = ROUNDS, device: torch.device = CPU, *, revisions: int = 0
) -> dict[str, float]:
    """Return medians of a step, of its bare passes and of watching the curves, taken in turn; of revisions in the last rounds."""
    stage = data.recipe.stages[0]
    (strategy, backbone, optimiser), annotator = built(data, device), LabelCorrection()
    loader = data.loader(stage, 0, strategy, first=0, last=WARM_UP + rounds, revision=0)
    seen: dict[str, Any] = {}

    def step(batch: dict[str, Batch]) -> None:
        seen["output"] = whole(strategy, backbone, optimiser, batch)

    def bare(images: list[torch.Tensor]) -> None:
        total = sum(backbone(image).sum() for image in images)
        backbone.zero_grad()
        total.backward()

    times: dict[str, list[float]] = {}
    for number, read in enumerate(loader):
        batch = augmented(read, device)
        image = batch["labelled"].image
        native = tuple(image.shape[2:])
        sizes = strategy._sizes_of(backbone, native)
        images = [image if s == native else resized(image, s, align_corners=True) for s in sizes]
        in_turn([("step", partial(step, batch)), ("bare", partial(bare, images))], times, number, device)
        watch = partial(annotator.observe, batch, seen["output"].logits, Progress(number, 1000))
        in_turn([("watch", watch)], times, number, device)
        if number >= WARM_UP + rounds - revisions:
            revising = [("revision", partial(revise, data, strategy, backbone, annotator))]
            in_turn([*revising, ("seen", partial(predict, data, backbone, device))], times, number, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    taken, passes, watching = (medians[name] for name in ("step", "bare", "watch"))
    found = {
        "step_seconds": taken,
        "bare_seconds": passes,
        "ratio": taken / passes,
        "watching_share": watching / taken,
    }
    if revisions:
        cases = len(data.split.labelled)
        found["revision_seconds_per_case"] = medians["revision"] / cases
        found["revision_pass_seconds_per_case"] = medians["seen"] / cases
    return found


def revise(data: Prepared, strategy: Strategy, backbone: nn.Module, annotator: LabelCorrection) -> None:
    """Revise the labels with every class due."""
    annotator.need[1:] = True
    reviewing = Reviewing(data, annotator, 0, 1000, 0, Rounds(Path("none")))
    edits = annotator.revise(reviewing.by(backbone, strategy), Progress(1000, 1000))
    data.annotations.apply(edits, step=len(data.annotations.history()), stage=0, author="label_correction")


@torch.no_grad()
def predict(data: Prepared, backbone: nn.Module, device: torch.device) -> None:
    """See every labelled case, which is one window, once."""
    backbone.eval()
    for case in data.split.labelled:
        backbone(torch.from_numpy(data.store.read(case)).unsqueeze(0).to(device))


def fit_milliseconds() -> dict[str, float]:
    """Return the median time to judge one class by kind of curve."""
    t, rng = np.arange(1, 101), np.random.default_rng(0)
    curves = {
        "saturating": 0.9 * (1 - np.exp(-t / 6)),
        "noisy": np.clip(0.8 * (1 - np.exp(-t / 10)) + rng.normal(0, 0.02, 100), 0, 1),
        "late": np.where(t < 30, 0.01, 0.85 * (1 - np.exp(-(t - 29) / 5))),
        "flat": np.full(100, 0.3),
        "linear": t / 100,
        "memorising": 0.6 * (1 - np.exp(-t / 3)) + 0.003 * t,
    }
    found = {}
    for name, curve in curves.items():
        times = [seconds(lambda c=curve: correction_epoch(c, total=100, start="relative")) for _ in range(9)]
        found[name] = 1000 * statistics.median(times)
    return found


def main() -> None:
    """Measure and write ``results/step_cost_adele.json``."""
    set_up_process(1)
    result: dict[str, Any] = {**provenance(), "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            result["ratios"][name] = measure(prepared(Path(folder) / name, **shape), revisions=REVISIONS)
            print(name, {key: round(value, 4) for key, value in result["ratios"][name].items()}, flush=True)
    result["fit_milliseconds"] = fit_milliseconds()
    print({key: round(value, 2) for key, value in result["fit_milliseconds"].items()})
    write("step_cost_adele", result)


if __name__ == "__main__":
    main()
