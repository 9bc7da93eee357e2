"""ADELE, the labels: wrong ones are corrected class by class, from when the class stops being learned fast.

Liu et al., CVPR 2022, arXiv:2110.03740. The training step that goes with it is the strategy ``adele``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from labeleff.annotators.base import Annotator
from labeleff.batch import IGNORE, Batch, Progress
from labeleff.edits import Edit, Reviewed
from labeleff.errors import RecipeError
from labeleff.functional.adele import ROUNDING, CorrectionRule, Start, correct_labels, correction_epoch, flat_start
from labeleff.functional.regions import hard_labels
from labeleff.machine import is_distributed, process_count
from labeleff.registry import register


@register("annotator", "label_correction")
class LabelCorrection(Annotator):
    """Overwrite labels of a class with confident predictions once its training-IoU curve has lost its slope.

    The curve of a class has one IoU per window of steps, pooled over all voxels of the window, between the labels and
    the logits that the strategy hands back, at no extra pass. Windows take the place of the authors' epochs: there are
    ``windows`` of them in the stage, however many steps or cases it has, or fewer, so that each holds ``patches``. A window
    without a voxel of the class is left out of its curve. The curves are judged when labels are revised (``revise_every``),
    window by window, by the counts of all processes.

    Parity with the authors' code, SegTHOR: ``threshold=0.7, agreement=0, against=current, start=reference, points=2, least=0,
    patches=1, repeat=segthor`` with ``revise_every`` the steps of one window; VOC: ``rule=voc, threshold=0.8, agreement=0,
    start=none, points=2, least=0, patches=1, windows=200, epoch=10.58, latest=16, source=given, scales=[0.75, 1, 1.5],
    combine=logits`` with ``revise_every`` the steps of an epoch (1058 of 20000), from their tenth epoch on with ``flips=[1]`` and
    a conditional random field, which is left out. Differs from the authors' SegTHOR: predictions are those
    of the whole case in eval mode by the run's sliding window, not those of training.

    Args:
        rule: Which of the authors' rules, see ``correct_labels``.
        threshold: Probability that must be exceeded.
        agreement: Share of a class's voxels in an image that the prediction must give to it too, or the class is left alone
            there: a network that has not found an object has nothing to say about its border. 0: no such rule.
        background_threshold: ``segthor``: that of background; 0: the same.
        class_constraint: Write a class only where the label of the case has it.
        slice_axis: Axis of volumes whose slices are images for themselves in the rule; -1: the case is one image.
        mode: ``voc``: ``single``, or ``both``: only labels of background and of classes that are due are overwritten.
        veto: ``voc``: leave labels alone that would all but vanish.
        logic255: ``segthor``: labelled voxels that are predicted as background become unknown.
        r: Share of its first slope that a curve must have lost.
        windows: Number of windows in the stage.
        patches: Fewest labelled patches, or slices, that a window holds, over all processes. A few patches of a volume make
            a curve of chance: it seems flat after a dozen steps, when the network as yet knows less than the labels.
        epoch: Windows of an epoch. It is the unit of time of the fitted curve: the slope after the first epoch is the first slope,
            and a curve is judged at the end of each.
        latest: Epochs N after the first by whose end every class is due, whatever its curve; 0: none. For VOC the authors'
            criterion knows 16, and they train 19.
        against: Labels that the curve compares with: as ``given``, or the ``current`` ones.
        start: What is left out at the start of a curve: nothing (``none``), or see ``flat_start``; by ``reference`` a
            class that never rises by 0.1 from one window to the next is never corrected.
        points: Fewest points that a curve is judged by.
        least: IoU that a curve must have reached: a plateau before a class is learned looks like the end of learning, and
            corrections would wipe out a class of which the network as yet sees nothing.
        repeat: ``latch``: a class that was once due stays so, even if that was a plateau before it was learned;
            ``present``: it is due while its curve so far says so; ``segthor``: it must be due again to be corrected
            again, which is possible at every ``every`` windows.
        every: Of ``repeat=segthor``, windows; 0: at each, negative: a class is corrected once.
        source: What is corrected: the ``current`` labels, so that corrections add up, or those ``given``, anew each time: a
            network that slowly fits the errors then takes its corrections back. Voxels nobody gave keep their current
            label either way.
        scales: Sizes, relative to the window, that the prediction is averaged over: a pass each.
        flips: Axes of the network that it is averaged over, mirrored and not: each doubles the passes.
        kept: Axes of the network that ``scales`` leaves alone, such as that across thick slices.
        combine: Mean of the ``probs``, or of the ``logits``.
    """

    role: ClassVar[str] = "labelled"
    counts: Tensor  # [windows, 3, K] int64: voxels in common, predicted, labelled
    total: Tensor  # steps of the stage when counting began
    checked: Tensor  # windows that were judged
    need: Tensor  # [K] due
    done: Tensor  # [K] corrected since the last multiple of ``every``
    since: Tensor  # [K] windows done when first due, -1: never

    def __init__(
        self,
        *,
        rule: CorrectionRule = "segthor",
        threshold: float = 0.95,
        agreement: float = 0.5,
        background_threshold: float = 0.0,
        class_constraint: bool = True,
        slice_axis: int = -1,
        mode: Literal["single", "both"] = "single",
        veto: bool = True,
        logic255: bool = False,
        r: float = 0.9,
        windows: int = 100,
        patches: int = 64,
        epoch: float = 1.0,
        latest: int = 0,
        against: Literal["given", "current"] = "given",
        start: Literal["relative", "reference", "none"] = "relative",
        points: int = 4,
        least: float = 0.3,
        repeat: Literal["latch", "present", "segthor"] = "latch",
        every: int = 10,
        source: Literal["given", "current"] = "current",
        scales: tuple[float, ...] = (1.0,),
        flips: tuple[int, ...] = (),
        kept: tuple[int, ...] = (),
        combine: Literal["probs", "logits"] = "probs",
    ) -> None:
        super().__init__()
        if not all(0 <= value <= 1 for value in (threshold, agreement, background_threshold)) or not 0 < r < 1:
            raise ValueError("threshold, agreement and background_threshold must lie in [0, 1], r in (0, 1)")
        if not 0 <= least <= 1:
            raise ValueError("least is an IoU in [0, 1]")
        if windows < 2 or points < 2 or patches < 1:
            raise ValueError("windows and points must be at least 2: a curve has two points; patches at least 1")
        if epoch < 1 or latest < 0:
            raise ValueError("epoch is at least 1 window, latest 0 or an epoch")
        self.windows, self.patches, self.epoch, self.latest = windows, patches, epoch, latest
        if latest and self._whole_after(latest + 1) > windows:
            raise ValueError(f"latest: {windows} windows of {epoch:g} to an epoch end before epoch {latest + 1}")
        if not scales or min(scales) <= 0 or len(set(scales)) != len(scales):
            raise ValueError(f"scales are {list(scales)}; they must be positive and differ")
        if len(set(flips)) != len(flips) or min((*flips, *kept), default=0) < 0:
            raise ValueError("flips and kept are axes, numbered from 0, each named once")
        self.scales, self.flips, self.kept, self.combine = tuple(scales), tuple(flips), tuple(kept), combine
        self.rule: dict[str, Any] = {
            "rule": rule,
            "threshold": threshold,
            "agreement": agreement,
            "background_threshold": background_threshold or None,
            "class_constraint": class_constraint,
            "mode": mode,
            "veto": veto,
            "logic255": logic255,
        }
        self.slice_axis, self.r, self.against, self.least = slice_axis, r, against, least
        self.start, self.points, self.repeat, self.every, self.source = start, points, repeat, every, source
        for name in ("counts", "total", "checked", "need", "done", "since"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))
        # counts of this process alone since they were gathered, as before every checkpoint; no buffer, since data-parallel
        # training puts the buffers of the first process in place of all others
        self._fresh: Tensor | None = None
        self._length = 0

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the shapes that were saved: the number of classes is known from the first step on only."""
        for name, tensor in self.named_buffers(recurse=False):
            if prefix + name in state_dict:
                setattr(self, name, state_dict[prefix + name].to(tensor.device).clone())
        self._length = 0
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- the curves -----------------------------------------------------------------------------------------------------

    def observe(self, batch: Mapping[str, Batch], logits: Mapping[str, Tensor], progress: Progress) -> None:
        """Count one step's voxels.

        Raises:
            RecipeError: The strategy does not hand back the logits of the labelled stream.
        """
        if "labelled" not in logits or "labelled" not in batch:
            raise RecipeError(
                "annotator 'label_correction' needs the logits of labelled images; this strategy does not hand them back: "
                "use adele, supervised or mean_teacher"
            )
        scores, share = logits["labelled"], batch["labelled"]
        if not len(self.counts):
            self._begin(scores, progress)
        window = self._finished(progress.step)
        fresh = self._fresh = torch.zeros_like(self.counts) if self._fresh is None else self._fresh
        if window < len(self.counts):
            label = (share.label if self.against == "current" else share.given).to(torch.uint8)
            predicted = torch.where(label == IGNORE, IGNORE, hard_labels(scores)).to(torch.uint8)
            for c in range(1, scores.shape[1]):
                is_, said = predicted == c, label == c
                fresh[window, :, c] += torch.stack([(is_ & said).sum(), is_.sum(), said.sum()])

    def _begin(self, scores: Tensor, progress: Progress) -> None:
        classes, device = scores.shape[1], scores.device
        seen = progress.total * progress.micro_batches * len(scores) * process_count()
        windows = max(2, min(self.windows, progress.total, seen // self.patches))
        if self.latest and self._whole_after(self.latest + 1) > windows:
            raise RecipeError(
                f"annotator 'label_correction': the stage has {windows} windows, and latest = {self.latest} asks for "
                f"{self._whole_after(self.latest + 1)}; lower patches or latest, or make the stage longer"
            )
        self.counts = torch.zeros(windows, 3, classes, dtype=torch.int64, device=device)
        self.total = torch.tensor(progress.total, device=device)
        self.checked = torch.tensor(0, device=device)
        self.need, self.done = torch.zeros(2, classes, dtype=torch.bool, device=device)
        self.since = torch.full((classes,), -1, device=device)
        self._length = progress.total

    def gather(self) -> None:
        """Add what all processes have counted since the last time to the counts that they share."""
        if self._fresh is None:
            return
        own = self._fresh.cpu()
        parts: list[Any] = [own]
        if is_distributed():
            parts = [None] * process_count()
            torch.distributed.all_gather_object(parts, own)  # objects: after a fit, tensors are back on the CPU
        self.counts += torch.stack(parts).sum(0).to(self.counts.device)
        self._fresh = None

    def _finished(self, step: int) -> int:
        """Return how many windows are whole after so many steps: the number of the window that the next belongs to."""
        self._length = self._length or int(self.total)  # read once: looking at a tensor waits for the device
        return step * len(self.counts) // self._length

    def curves(self, finished: int) -> NDArray[np.float64]:
        """Return the IoU [K, finished] per class and window; NaN where no voxel of the class was labelled."""
        counts = self.counts if self._fresh is None else self.counts + self._fresh.to(self.counts.device)
        common, predicted, labelled = counts[:finished].double().cpu().permute(1, 2, 0).numpy()
        iou: NDArray[np.float64] = common / (labelled + predicted - common + 1e-10)
        return np.where(labelled > 0, iou, np.nan)

    def _skipped(self, curve: NDArray[np.float64]) -> int:
        """Return how many values at its start a curve is judged without."""
        return 0 if self.start == "none" else flat_start(curve, rule=self.start)

    def _from(self, curve: NDArray[np.float64]) -> int:
        """Return the window from which a class is due, as its curve so far has it; the number of windows: not at all."""
        rule: Start = "reference" if self.start == "none" else self.start
        skipped = self._skipped(curve)
        known = curve[skipped:][np.isfinite(curve[skipped:])]
        epochs = due = self.latest or math.ceil(len(self.counts) / self.epoch)
        if len(known) >= self.points and known.max() >= self.least:
            skip = self.start != "none"
            due = correction_epoch(curve, total=epochs, r=self.r, skip_flat_start=skip, start=rule, unit=1 / self.epoch)
        if due == epochs and not self.latest:
            return len(self.counts)
        return min(self._whole_after(due + 1) - 1, len(self.counts))

    def _whole_after(self, epochs: int) -> int:
        """Return how many windows are whole after so many epochs."""
        return math.floor(epochs * self.epoch + ROUNDING)

    def _ends_epoch(self, finished: int) -> bool:
        """Return whether the last of so many whole windows is the last of an epoch."""
        return self._whole_after(math.ceil(finished / self.epoch - ROUNDING)) == finished

    # -- the labels -----------------------------------------------------------------------------------------------------

    def revise(self, cases: Iterable[Reviewed], progress: Progress) -> Iterator[Edit]:
        """Yield one edit per case and kind of change, with its mean confidence; nothing while no class is due."""
        due = self._due(progress) if len(self.counts) else []
        if due:
            note = "due since window " + ", ".join(f"{int(self.since[c])} (class {c})" for c in due)
            for case in cases:
                yield from self._edits(case, due, note)

    def _due(self, progress: Progress) -> list[int]:
        """Judge the windows that have become whole since the last time."""
        finished = min(self._finished(progress.step), len(self.counts))
        curves, fresh = self.curves(finished), range(int(self.checked) + 1, finished + 1)
        for count in fresh:
            if self._ends_epoch(count):
                self._judge(curves[:, :count])
            if self.repeat == "segthor":
                if self.every == 0 or (self.every > 0 and count % self.every == 0):
                    self.done.zero_()
                self.need &= ~self.done
        self.checked.fill_(finished)
        if self.repeat == "segthor":
            self.done |= self.need
        return [c for c in range(1, len(curves)) if self.need[c] and (fresh or self.repeat != "segthor")]

    def _judge(self, curves: NDArray[np.float64]) -> None:
        """Note which classes their curves [K, windows] so far call due."""
        count = curves.shape[1]
        if self.repeat == "present":
            self.need.zero_()
        for c in range(1, len(curves)):
            if not self.need[c] and count - 1 >= self._from(curves[c]):
                self.need[c] = True
                self.since[c] = count if self.since[c] < 0 else self.since[c]

    def _edits(self, case: Reviewed, due: list[int], note: str) -> Iterator[Edit]:
        probs = case.probs.mean(0)
        old = case.label
        base = old if self.source == "current" else np.where(case.given == IGNORE, old, case.given)
        new = self._corrected(torch.from_numpy(base), probs, due)
        for before in np.unique(old[old != new]):
            for after in np.unique(new[(old == before) & (old != new)]):
                where = (old == before) & (new == after)
                sides = [
                    np.flatnonzero(where.any(tuple(a for a in range(old.ndim) if a != axis)))
                    for axis in range(old.ndim)
                ]
                box = tuple(slice(int(s[0]), int(s[-1]) + 1) for s in sides)
                sure = float(probs[int(after)].numpy()[where].mean()) if after < len(probs) else float("nan")
                origin = tuple(s.start for s in box)
                yield Edit(case.case, new[box].copy(), "corrected", origin, where[box], sure, note)

    def _corrected(self, label: Tensor, probs: Tensor, due: list[int]) -> NDArray[np.uint8]:
        """Return the corrected label [*S]; the images of the rule are the case, or its slices."""
        if self.slice_axis < 0 or label.ndim < 3:
            found = correct_labels(label[None], probs[None], due, **self.rule)[0]
        else:
            slices = label.movedim(self.slice_axis, 0), probs.movedim(self.slice_axis + 1, 0)
            found = correct_labels(*slices, due, **self.rule).movedim(0, self.slice_axis)
        return np.ascontiguousarray(found.numpy())

    def describe(self, progress: Progress) -> Mapping[str, float | list[float | None]]:
        """Return per class the curve (``iou``), its ``skipped`` start, the ``window`` it is due from now, and ``due_since``.

        ``windows`` is how many there are in the stage.
        """
        found: dict[str, float | list[float | None]] = {}
        if len(self.counts):
            found["windows"] = float(len(self.counts))
            finished = min(self._finished(progress.step), len(self.counts))
            for c, curve in enumerate(self.curves(finished)[1:], start=1):
                found[f"iou/{c}"] = [None if np.isnan(v) else round(float(v), 6) for v in curve]
                found[f"skipped/{c}"] = float(self._skipped(curve))
                found[f"window/{c}"] = float(self._from(curve))
                found[f"due_since/{c}"] = float(self.since[c])
        return found
