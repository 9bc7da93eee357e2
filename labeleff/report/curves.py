"""Training-IoU curves of ``label_correction``, drawn: points, fits, and when a class became due."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.functional.adele import fit_early_learning
from labeleff.report.pictures import COLOURS


def has_curves(described: Mapping[str, Any]) -> bool:
    """Return whether an annotator's description holds curves (``iou/CLASS``)."""
    return any(key.startswith("iou/") for key in described)


def corrected_windows(
    history: Iterable[Mapping[str, Any]], described: Mapping[str, Any], *, steps: int
) -> dict[int, list[int]]:
    """Return per class number the windows after which labels were changed to it or from it.

    Args:
        history: Changes of one stage, as ``AnnotationStore.history`` returns them.
        described: What ``LabelCorrection.describe`` returns.
        steps: Length of the stage.
    """
    found: dict[int, set[int]] = {}
    for entry in history:
        window = int(entry["step"] * described["windows"] // steps)
        for pair in entry["voxels"]:
            for value in map(int, pair.split("->")):
                found.setdefault(value, set()).add(window)
    return {c: sorted(windows) for c, windows in found.items()}


def draw_curves(
    described: Mapping[str, Any], classes: Sequence[str], corrected: Mapping[int, Sequence[int]] | None = None
) -> bytes:
    """Return a PNG with one panel per foreground class.

    Args:
        described: What ``LabelCorrection.describe`` returns: per class number ``iou/``, ``skipped/``, ``window/`` and
            ``due_since/``.
        classes: Names, background first.
        corrected: Windows after which labels of a class number were changed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * (len(classes) - 1) + 0.4, 3.1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(classes) - 1, sharey=True, squeeze=False)[0]
    for c, (axes, name) in enumerate(zip(panels, classes[1:], strict=True), start=1):
        curve = np.array([np.nan if v is None else v for v in described[f"iou/{c}"]], float)
        colour = COLOURS[1 + (c - 1) % (len(COLOURS) - 1)]
        axes.plot(np.arange(1, len(curve) + 1), curve, ".", color=colour, markersize=4, label="training IoU")
        skipped = int(described[f"skipped/{c}"])
        if np.isfinite(curve[skipped:]).sum() > 1:
            axes.plot(*fitted(curve[skipped:], skipped), color="0.35", linewidth=1, label="fit")
        since = int(described[f"due_since/{c}"])
        if since >= 0:
            axes.axvline(since, color="0.35", linestyle=":", linewidth=1.2, label="due")
        changed = (corrected or {}).get(c, ())
        if changed:
            axes.plot(changed, [0.02] * len(changed), "|", color="0.35", markersize=6, label="labels changed")
        axes.set_title(name if since < 0 else f"{name}: due from window {since}", fontsize=9)
        axes.set_xlabel("window", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("IoU of predictions and labels", fontsize=8)
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), fontsize=7, frameon=False, loc="outside lower center", ncols=len(handles)
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def fitted(curve: NDArray[np.float64], skipped: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return windows and values of the fit to a curve whose first ``skipped`` points were left out.

    The fit has its n points from 0 to n inclusive; here they stand at windows skipped + 1 … skipped + n.
    """
    count = len(curve)
    a, b, c = fit_early_learning(curve)
    time = np.linspace(0, count, 200)
    with np.errstate(all="ignore"):
        values = a * (1 - np.exp(-(time**b) / c))
    return skipped + 1 + time * (count - 1) / count, values


def draw_diagnostics(noted: Sequence[tuple[int, Mapping[str, float | None]]], classes: Sequence[str]) -> bytes:
    """Return a PNG with one panel per foreground class: early learning, memorisation, and how near labels are to clean ones.

    Args:
        noted: Steps, and what ``NoiseDiagnostics.measure`` returned there.
        classes: Names, background first.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * (len(classes) - 1) + 0.4, 3.1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(classes) - 1, sharey=True, squeeze=False)[0]
    styles = {
        "early_learning": ("-", "wrong voxels: prediction and clean label"),
        "memorisation": (":", "wrong voxels: prediction and given label"),
        "label_iou": ("--", "all voxels: current and clean label"),
    }
    for c, (axes, name) in enumerate(zip(panels, classes[1:], strict=True), start=1):
        colour = COLOURS[1 + (c - 1) % (len(COLOURS) - 1)]
        for what, (dash, label) in styles.items():
            values = [np.nan if found[f"{what}/{c}"] is None else found[f"{what}/{c}"] for _, found in noted]
            shade = "0.35" if what == "label_iou" else colour
            axes.plot([step for step, _ in noted], values, dash, color=shade, linewidth=1.3, label=label)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("IoU", fontsize=8)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, fontsize=7, frameon=False, loc="outside lower center", ncols=min(3, len(classes) - 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
