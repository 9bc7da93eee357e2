"""What features know without any training of theirs: a linear head on a few labelled cases, and whether they have collapsed.

The head sees the labels of the budget alone, and is measured on patients that it has not seen. It trains nothing that is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from labeleff.backbones.taps import Tap, encode, find_taps
from labeleff.batch import IGNORE, Task, derive_seed
from labeleff.data.split import evenly
from labeleff.evaluation.inference import evaluating
from labeleff.functional.resizing import resized

Level = Literal["encoder", "decoder", "bottleneck"]
GRID = 4
"""Voxels of the patch per place at which features are read, along each axis."""
WINDOWS, PLACES, PARTS = 4, 1000, 5
"""Windows per case, places per case that the head learns from, and parts of the patients that take turns at being held out."""
FLAT_RANK, FLAT_COSINE = 1.5, 0.99
"""Features of a smaller effective rank, or a larger mean cosine, tell hardly anything apart."""
PCA_COLOURS = 3
GAIN, LOOKS = 0.01, 2
"""Dice by which a look must be better than one before it, and looks without one that is, for features to have flattened."""


@dataclass(frozen=True)
class Labelled:
    """A case that the head may learn from.

    Args:
        id: Its name.
        patient: Cases of one patient are held out together.
        image: [C, *S] float32.
        label: [*S]; IGNORE where nobody has said.
    """

    id: str
    patient: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8]


class Probe:
    """Looks at the features of a network.

    Args:
        network: Where the taps are looked for; networks like it can be probed.
        task: What is segmented.
        patch: Window, voxels.
        slice_axis: Axis along which volumes are cut for a 2-D network, or None.
        level: Features of all levels of the ``encoder``, each resized to one grid, those of all levels of the ``decoder`` as
            well, or those of the ``bottleneck`` alone.
        layers: Modules whose outputs are the features, in place of ``level``; empty: found by a dry run.

    Raises:
        ShapeError: The network has no such features.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        patch: Sequence[int],
        slice_axis: int | None = None,
        *,
        level: Level = "encoder",
        layers: Sequence[str] = (),
    ) -> None:
        self.task, self.patch, self.slice_axis = task, tuple(patch), slice_axis
        self.taps = self._found(network, level, layers)
        self.grid = tuple(max(1, n // GRID) for n in self.patch)

    def _found(self, network: nn.Module, level: Level, layers: Sequence[str]) -> tuple[Tap, ...]:
        """Return where features are looked for."""
        if layers:
            *others, last = layers
            named = find_taps(network, self.task, patch=self.patch, bottleneck=last, encoder=others, decoder=())
            return named.encoder
        found = find_taps(network, self.task, patch=self.patch)
        if level == "bottleneck":
            return (found.bottleneck,)
        return (*found.encoder, *found.decoder) if level == "decoder" else found.encoder

    def measure(self, network: nn.Module, cases: Iterable[Labelled]) -> dict[str, float | None]:
        """Return ``dice`` (mean over foreground classes), ``dice/1`` …, and the numbers of :func:`spread_of`.

        Dice is that of a linear head at the places of the grid, on patients held out in turn; None with fewer than two.

        Args:
            network: Left as it is; it is looked at in eval mode.
            cases: Those of the budget.
        """
        features, labels, patients = [], [], []
        for case in cases:
            for image, label in self._windows(case):
                found = self.features(network, image)
                features.append(found.reshape(len(found), -1).T)
                labels.append(self._at_places(label))
                patients.append(case.patient)
        if not features:
            return {}
        kept = [evenly(len(own), max(1, PLACES // WINDOWS)) for own in features]
        x = np.concatenate([own[places] for own, places in zip(features, kept, strict=True)])
        y = np.concatenate([own[places] for own, places in zip(labels, kept, strict=True)])
        groups = np.concatenate([[name] * len(places) for name, places in zip(patients, kept, strict=True)])
        known = y != IGNORE
        scores = held_out_dice(x[known], y[known], groups[known], self.task.num_classes)
        named = {f"dice/{c}": scores[c - 1] for c in range(1, self.task.num_classes)}
        counted = [score for score in scores if score is not None]
        return {"dice": sum(counted) / len(counted) if counted else None, **named, **spread_of(x)}

    def features(self, network: nn.Module, image: Tensor) -> NDArray[np.float32]:
        """Return [D, *grid] of one window [C, *patch]: the features of all taps, resized linearly to one grid."""
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        with evaluating(network):
            maps = encode(network, image[None].to(device), self.taps)
            return torch.cat([resized(one.float(), self.grid, align_corners=False)[0] for one in maps]).cpu().numpy()

    def picture(self, network: nn.Module, case: Labelled) -> NDArray[np.uint8]:
        """Return [3, H, 2 W]: a slice of a window, and its features' three principal components as colours."""
        image, _ = next(iter(self._windows(case)))
        features = self.features(network, image)
        grey = image[0].numpy()
        if self.task.ndim == 3:  # the middle across the shortest axis
            axis = int(np.argmin(grey.shape))
            grey = np.take(grey, grey.shape[axis] // 2, axis)
            features = np.take(features, features.shape[axis + 1] // 2, axis + 1)
        low, high = np.percentile(grey, [1, 99])
        left = np.clip((grey - low) / max(float(high - low), 1e-6), 0, 1)
        right = torch.from_numpy(principal_colours(features))[None]
        shown = F.interpolate(right, left.shape, mode="nearest")[0].numpy()
        both = np.concatenate([np.broadcast_to(left, (PCA_COLOURS, *left.shape)), shown], axis=2)
        return (255 * both).astype(np.uint8)

    def _windows(self, case: Labelled) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield windows [C, *patch] and [*patch] that hold a labelled voxel somewhere; where is drawn, the same every time."""
        generator = np.random.default_rng(derive_seed("probe", case.id))
        there = np.argwhere((case.label > 0) & (case.label != IGNORE))
        there = there if len(there) else np.argwhere(np.ones(case.label.shape, bool))
        for voxel in there[generator.integers(len(there), size=WINDOWS)]:
            image, label, place = case.image, case.label, voxel
            if self.slice_axis is not None:
                image = np.take(image, voxel[self.slice_axis], self.slice_axis + 1)
                label = np.take(label, voxel[self.slice_axis], self.slice_axis)
                place = np.delete(voxel, self.slice_axis)
            yield self._window(image, label, place - generator.integers(self.patch))

    def _window(
        self, image: NDArray[np.float32], label: NDArray[np.uint8], start: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Return the window nearest to a start that lies inside, padded at its end where the image is smaller."""
        seen = np.zeros((len(image), *self.patch), np.float32)
        told = np.full(self.patch, IGNORE, np.uint8)
        room = np.maximum(np.array(label.shape) - self.patch, 0)
        first = np.clip(start, 0, room)
        cut = tuple(slice(a, a + n) for a, n in zip(first, self.patch, strict=True))
        place = tuple(slice(0, n) for n in label[cut].shape)
        seen[(slice(None), *place)], told[place] = image[(slice(None), *cut)], label[cut]
        return torch.from_numpy(seen), torch.from_numpy(told)

    def _at_places(self, label: Tensor) -> NDArray[np.uint8]:
        """Return the labels in the middle of each place of the grid, flattened."""
        resized = F.interpolate(label[None, None].float(), self.grid, mode="nearest-exact")
        return resized.flatten().to(torch.uint8).numpy()


def held_out_dice(
    features: NDArray[np.float32], labels: NDArray[np.uint8], patients: NDArray[np.str_], classes: int
) -> list[float | None]:
    """Return the Dice of every foreground class of a linear head, on patients it has not seen; None where there is nothing.

    Multinomial logistic regression on standardised features, classes weighing alike; up to five parts of the patients.

    Args:
        features: [N, D].
        labels: [N], all known.
        patients: [N] names.
        classes: K.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = min(PARTS, len(np.unique(patients)))
    if parts < 2:
        return [None] * (classes - 1)
    predicted = np.zeros_like(labels)
    for train, test in GroupKFold(parts).split(features, labels, patients):
        present = np.unique(labels[train])
        if len(present) < 2:
            predicted[test] = present[0]
            continue
        head = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=200))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            predicted[test] = head.fit(features[train], labels[train]).predict(features[test])
    found: list[float | None] = []
    for c in range(1, classes):
        sizes = int((predicted == c).sum() + (labels == c).sum())
        found.append(2 * int(((predicted == c) & (labels == c)).sum()) / sizes if sizes else None)
    return found


def spread_of(features: NDArray[np.float32]) -> dict[str, float]:
    """Return how much features differ from place to place.

    * ``effective_rank``: exp of the entropy of the singular values, as shares, of the centred features (Roy and Vetterli,
      EUSIPCO 2007): from 1 (they vary along one line) to D. 0 where they do not vary.
    * ``mean_cosine``: mean cosine of two places: 1 where all point in one direction.

    Args:
        features: [N, D].
    """
    x = features.astype(np.float64)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    total = values.sum()
    shares = values[values > 0] / total if total > np.finfo(np.float32).eps * max(np.abs(x).max(), 1) else None
    rank = float(np.exp(-(shares * np.log(shares)).sum())) if shares is not None else 0.0
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / np.maximum(lengths, np.finfo(np.float32).tiny)
    count = len(x)
    cosine = float((np.square(unit.sum(0)).sum() - np.square(unit).sum()) / (count * (count - 1))) if count > 1 else 1.0
    return {"effective_rank": rank, "mean_cosine": cosine}


def flatness(values: Mapping[str, float | None]) -> str:
    """Return a warning with numbers where features have collapsed; empty where they have not."""
    rank, cosine = values.get("effective_rank"), values.get("mean_cosine")
    if rank is None or cosine is None or (rank >= FLAT_RANK and cosine <= FLAT_COSINE):
        return ""
    return (
        f"features tell hardly anything apart: effective rank {rank:.2f} (below {FLAT_RANK}) or mean cosine {cosine:.3f} "
        f"(above {FLAT_COSINE}); they have collapsed, or have not begun to learn"
    )


@dataclass(frozen=True)
class Course:
    """How the Dice of the probe went over the looks of a stage.

    Args:
        first: At the first look.
        best: The highest.
        best_step: The first step that had it.
        last: At the last look.
        flat_since: Step of the first look that no later one was better than by 0.01, where two or more came later; None: the
            features were still getting better, or there were too few looks to tell.
    """

    first: float
    best: float
    best_step: int
    last: float
    flat_since: int | None

    @property
    def said(self) -> str:
        """All of it in one line."""
        flat = f"no better since step {self.flat_since}" if self.flat_since is not None else "not flat yet"
        values = f"{self.first:.3f} at first, {self.best:.3f} at best (step {self.best_step}), {self.last:.3f} at last"
        return f"Dice of a linear head on the features: {values}; {flat}"


def course_of(looks: Sequence[tuple[int, Mapping[str, float | None]]]) -> Course | None:
    """Return how the Dice went; None where no look had one.

    Args:
        looks: Steps, and values of :meth:`Probe.measure`.
    """
    scores = [(step, dice) for step, values in looks if (dice := values.get("dice")) is not None]
    if not scores:
        return None
    best_step, best = max(scores, key=lambda look: (look[1], -look[0]))
    flat = (
        step
        for number, (step, dice) in enumerate(scores)
        if len(scores) - number > LOOKS and all(later <= dice + GAIN for _, later in scores[number + 1 :])
    )
    return Course(scores[0][1], best, best_step, scores[-1][1], next(flat, None))


def principal_colours(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the three principal components of features [D, h, w] as colours [3, h, w] in [0, 1]; fewer leave channels grey."""
    x = features.reshape(len(features), -1).T.astype(np.float64)
    x = x - x.mean(0)
    count = min(PCA_COLOURS, *x.shape)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    signs = np.sign(axes[np.arange(count), np.abs(axes[:count]).argmax(1)])  # a component and its negative are one
    parts = x @ (axes[:count] * signs[:, None]).T
    colours = np.full((PCA_COLOURS, x.shape[0]), 0.5)
    for channel in range(count):
        low, high = np.percentile(parts[:, channel], [1, 99])
        if high > low:
            colours[channel] = np.clip((parts[:, channel] - low) / (high - low), 0, 1)
    return colours.reshape(PCA_COLOURS, *features.shape[1:]).astype(np.float32)
