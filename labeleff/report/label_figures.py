"""Figures of a report about labels: a panel per method and class, a thin line per run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from labeleff.report.curves import fitted
from labeleff.report.figures import INK, WIDTH, Row, Style
from labeleff.report.labels import points

COLUMNS = 3


class Line(NamedTuple):
    """One line of one panel."""

    method: str
    name: str  # of the class
    xs: Sequence[float]
    ys: Sequence[float]
    dash: str = "-"
    mark: int | None = None  # index of a point that is marked
    fit: bool = False  # to the line before it, in ink


def training_iou(rows: Sequence[Row], looks: Mapping[str, Style]) -> Figure | None:
    """Return the training-IoU curves of every run with their fits, marked where the class became due; None without rows.

    Args:
        rows: Of the table of these curves, one data set.
        looks: How methods are drawn; gives their order.
    """
    lines = []
    for row in rows:
        ys = points(row["curve"])
        due = row["due_since"]
        mark = due - 1 if due is not None and 0 < due <= len(ys) else None
        lines.append(Line(row["method"], row["class"], range(1, len(ys) + 1), ys, mark=mark))
        rest = np.array(ys[row["skipped"] :])
        if np.isfinite(rest).sum() > 1:
            windows, values = fitted(rest, row["skipped"])
            lines.append(Line(row["method"], row["class"], windows.tolist(), values.tolist(), ":", fit=True))
    keys = [
        Line2D([], [], color=INK, ls="-", lw=1, label="training IoU"),
        Line2D([], [], color=INK, ls=":", lw=1, label="fit"),
        Line2D([], [], color=INK, ls="", marker="o", ms=4, label="due from here on"),
    ]
    return _panels(lines, looks, ("window", "IoU of predictions and labels"), keys)


def memorisation(rows: Sequence[Row], looks: Mapping[str, Style]) -> Figure | None:
    """Return IoU with the clean and with the given labels over the steps, where these differ; None without rows.

    Args:
        rows: Of the table of diagnostics, one data set.
        looks: How methods are drawn; gives their order.
    """
    runs: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["run"], row["stage"], row["class"]), []).append(row)
    lines = []
    for own in runs.values():
        steps = [row["step"] for row in own]
        for what, dash in (("early_learning", "-"), ("memorisation", ":")):
            values = [math.nan if row[what] is None else row[what] for row in own]
            lines.append(Line(own[0]["method"], own[0]["class"], steps, values, dash))
    keys = [
        Line2D([], [], color=INK, ls="-", lw=1, label="with the clean labels"),
        Line2D([], [], color=INK, ls=":", lw=1, label="with the given labels"),
    ]
    return _panels(lines, looks, ("step", "IoU where labels are wrong"), keys)


def _panels(
    lines: Sequence[Line], looks: Mapping[str, Style], names: tuple[str, str], keys: Sequence[Line2D]
) -> Figure | None:
    if not lines:
        return None
    classes = list(dict.fromkeys(line.name for line in lines))
    methods = [method for method in looks if any(line.method == method for line in lines)]
    columns = min(COLUMNS, len(classes))
    deep = math.ceil(len(classes) / columns)
    figure = Figure(figsize=(WIDTH, 1.75 * deep * len(methods) + 0.6), layout="constrained")
    panels = figure.subplots(deep * len(methods), columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    for m, method in enumerate(methods):
        for c, name in enumerate(classes):
            axes = panels[m * deep + c // columns, c % columns]
            axes.set_visible(True)
            for line in (line for line in lines if (line.method, line.name) == (method, name)):
                colour = INK if line.fit else looks[method].colour
                axes.plot(line.xs, line.ys, color=colour, ls=line.dash, lw=0.9, alpha=0.75)
                if line.mark is not None:
                    axes.plot([line.xs[line.mark]], [line.ys[line.mark]], "o", color=colour, ms=5, mew=0, zorder=3)
            axes.set_title(f"{method}: {name}", fontsize=9)
            axes.set_ylim(0, 1)
            axes.grid(axis="y")
            # the panels below may be hidden
            axes.tick_params(labelbottom=m == len(methods) - 1 and c + columns >= len(classes))
    figure.supxlabel(names[0], fontsize=9)
    figure.supylabel(names[1], fontsize=9)
    figure.legend(handles=list(keys), loc="outside upper left", ncols=len(keys), frameon=False, fontsize=9)
    return figure
