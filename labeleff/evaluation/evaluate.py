"""Measuring predictors on cases. This is the only place of the package that opens labels outside training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from labeleff.batch import Task
from labeleff.data.manifest import Case
from labeleff.data.store import ImageStore
from labeleff.evaluation.inference import predict_volume, segment
from labeleff.evaluation.metrics import measure
from labeleff.functional.resizing import resized


@dataclass(frozen=True)
class Viewer:
    """How networks look at whole cases: everything that prediction needs beside the network.

    Args:
        store: Prepared images.
        task: What is segmented.
        patch: Window, voxels.
        slice_axis: Axis along which volumes are cut for a 2-D network, or None.
        overlap: Overlap of windows, share of the patch.
        window_batch: Windows per forward pass.
        largest_component: Keep only the largest component of each class.
        device: Where the networks live.
    """

    store: ImageStore
    task: Task
    patch: tuple[int, ...]
    slice_axis: int | None
    overlap: float = 0.5
    window_batch: int = 8
    largest_component: bool = False
    device: str | torch.device = "cpu"

    def probabilities(self, network: nn.Module, case: str, *, dropout: bool = False) -> Tensor:
        """Return [K, *S] float32 on the stored grid; with dropout left on where asked for."""
        image = torch.from_numpy(self.store.read(case)).to(self.device)
        return predict_volume(
            network,
            image,
            ndim=self.task.ndim,
            patch=self.patch,
            overlap=self.overlap,
            window_batch=self.window_batch,
            slice_axis=self.slice_axis,
            num_classes=self.task.num_classes,
            exclusive=self.task.exclusive,
            dropout=dropout,
        )

    def prediction(self, network: nn.Module, case: str) -> NDArray[np.uint8]:
        """Return the label map [*S] on the grid the case came in."""
        probs = self.probabilities(network, case)
        shape = self.store.original_shape(case)
        if tuple(probs.shape[1:]) != tuple(shape):
            probs = resized(probs[None], shape, align_corners=False)[0]
        return segment(probs, largest_component=self.largest_component, exclusive=self.task.exclusive)


def evaluate(
    networks: Mapping[str, nn.Module],
    cases: Sequence[Case],
    viewer: Viewer,
    read_label: Callable[[Case], NDArray[np.uint8]],
    *,
    selection: str = "last",
    seen: Callable[[Case, str, NDArray[np.uint8]], None] | None = None,
    distances: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yield one row per case, predictor and foreground class, case after case.

    Args:
        networks: Predictors by name; each returns logits.
        cases: What to measure on.
        viewer: How to predict.
        read_label: Opens the label of a case.
        selection: How these weights were chosen: ``last``, ``val_best`` or ``oracle``.
        seen: Called with every case, predictor and label map.
        distances: Measure surface distances too.
    """
    for case in cases:
        reference = read_label(case)
        spacing = case.spacing or (float("nan"),) * reference.ndim
        for name, network in networks.items():
            prediction = viewer.prediction(network, case.id)
            if seen is not None:
                seen(case, name, prediction)
            head = {"case": case.id, "patient": case.patient, "domain": case.domain}
            task = viewer.task
            for row in measure(
                prediction,
                reference,
                classes=task.classes,
                spacing=spacing,
                exclusive=task.exclusive,
                distances=distances,
            ):
                yield head | {"predictor": name, "selection": selection} | row
