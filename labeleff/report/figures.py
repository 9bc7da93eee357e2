"""Figures of a report as SVG, drawn from the rows of the tables.

Text and axes are drawn in ``currentColor`` and the background is left out, so that a figure takes the colours of the page
around it, light or dark. Equal rows give equal bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
INK = "#010203"
"""Stands for ``currentColor``, which matplotlib does not know, until the SVG is written."""
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Without black and yellow, which vanish on one of the two backgrounds; the baseline is drawn in the colour of the text."""
MARKERS = "osD^vPX*<>"
DASHES = ("-", "--", ":", "-.")
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDTH = 6.0
"""Inches, narrow enough for the text to stay readable where a phone shrinks it."""


@dataclass(frozen=True)
class Style:
    """How a method is drawn, the same in every figure."""

    colour: str
    marker: str
    dash: str

    @property
    def css(self) -> str:
        """The colour for the page."""
        return "currentColor" if self.colour == INK else self.colour

    @property
    def marks(self) -> dict[str, Any]:
        """How its points are filled: hollow where another method has the same colour."""
        if self.dash == "-":
            return {"mfc": self.colour, "mew": 0}
        return {"mfc": "none", "mec": self.colour, "mew": 1.2}


def styles(methods: Sequence[str], baseline: str) -> dict[str, Style]:
    """Return how each method is drawn; variants beyond the colours differ by marker and dash."""
    found = {}
    others = 0
    for index, method in enumerate(methods):
        marker = MARKERS[index % len(MARKERS)]
        if method == baseline:
            found[method] = Style(INK, marker, "-")
        else:
            dash = DASHES[others // len(OKABE_ITO) % len(DASHES)]
            found[method] = Style(OKABE_ITO[others % len(OKABE_ITO)], marker, dash)
            others += 1
    return found


# -- the figures -------------------------------------------------------------------------------------------------------


def learning_curve(rows: Sequence[Row], published: Sequence[Row], looks: Mapping[str, Style]) -> Figure:
    """Return mean Dice against labelled patients, with intervals; numbers of papers as hollow markers.

    Args:
        rows: Of the table of curves: one data set, class and metric.
        published: Numbers of papers.
        looks: How methods are drawn.
    """
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    axes = figure.subplots()
    lines = [method for method in looks if any(row["method"] == method for row in rows)]
    budgets = sorted({row["labels"] for row in rows} | {row["labelled"] for row in published})
    span = max(1.0, math.log2(budgets[-1] / budgets[0]))
    step = span * min(0.014, 0.08 / len(lines))
    for index, method in enumerate(lines):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: int(row["labels"]))
        shift = (index - (len(lines) - 1) / 2) * step
        _line(axes, own, [math.log2(row["labels"]) + shift for row in own], looks[method])
    for row in published:
        look = looks.get(_as_ours(row["method"], lines))
        colour = look.colour if look else INK
        x = math.log2(row["labelled"])
        axes.plot([x], [row["dice"]], "D", ms=7, mfc="none", mec=colour, mew=1.4, zorder=4)
        if look is None:
            _below(axes, row["method"], x, row["dice"], at_edge=x > math.log2(budgets[0]) + 0.9 * span)
    axes.set_xticks([math.log2(n) for n in _apart(budgets, span)], [f"{n:g}" for n in _apart(budgets, span)])
    axes.set_xlim(math.log2(budgets[0]) - 0.05 * span, math.log2(budgets[-1]) + 0.05 * span)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="labelled patients (logarithmic)", ylabel="mean Dice")
    axes.grid(axis="y")
    handles = [_handle(looks[m], m) for m in lines]
    if published:
        handles.append(Line2D([], [], ls="", marker="D", ms=7, mfc="none", mec=INK, mew=1.4, label="published"))
    _legend(figure, handles)
    return figure


def budget_curves(
    rounds: Sequence[Row], areas: Sequence[Row], curves: Sequence[Row], looks: Mapping[str, Style]
) -> Figure | None:
    """Return mean Dice against voxels labelled on request, a panel per budget of labelled patients; None without rows.

    Methods with a curve have bands of their intervals, those that ask once a marker at their end, and those that never ask
    a horizontal line.

    Args:
        rounds: Of the table of rounds, one data set.
        areas: Of the table of areas under the budget curve: the same data set.
        curves: Of the table of curves: the same data set, one class and metric.
        looks: How methods are drawn.
    """
    if not rounds:
        return None
    budgets = {row["labelled"]: row["labels"] for row in sorted(rounds, key=lambda row: int(row["labels"]))}
    figure = Figure(figsize=(WIDTH, 3.7 * len(budgets) + 0.3), layout="constrained")
    panels = figure.subplots(len(budgets), 1, squeeze=False)[:, 0]
    handles: dict[str, Line2D] = {}
    for axes, (budget, labels) in zip(panels, budgets.items(), strict=True):
        with_curve = {row["method"] for row in areas if row["labelled"] == budget and row["area"] is not None}
        for method, look in looks.items():
            # of several evaluations without a question between them the last
            own = {row["voxels"]: row for row in rounds if (row["labelled"], row["method"]) == (budget, method)}
            if method in with_curve:
                _band(axes, list(own.values()), look, strength=min(0.12, 0.4 / len(with_curve)))
                handles[method] = _handle(look, method)
            elif own:
                _points(axes, [max(own)], [own[max(own)]], "dice", look, look.marker, alone=True)
                handles[method] = _handle(look, method, line=False)
            for row in curves:
                if (row["labelled"], row["method"]) == (budget, method) and not own:
                    axes.axhline(row["mean"], color=look.colour, ls=look.dash, lw=1.1, alpha=0.8, zorder=1)
                    handles[method] = Line2D([], [], color=look.colour, ls=look.dash, lw=1.1, alpha=0.8, label=method)
        if len(budgets) > 1:
            axes.set_title(f"{labels} labelled", fontsize=9)
        axes.set(ylabel="mean Dice")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(axis="y")
    panels[-1].set_xlabel("voxels labelled on request, per run")
    _legend(figure, [handles[method] for method in looks if method in handles])
    return figure


def _band(axes: Axes, rows: Sequence[Row], look: Style, *, strength: float) -> None:
    """Draw a budget curve and its intervals."""
    xs = [row["voxels"] for row in rows]
    axes.plot(xs, [row["dice"] for row in rows], color=look.colour, ls=look.dash, lw=1.6, zorder=3)
    axes.plot(xs, [row["dice"] for row in rows], marker=look.marker, ms=4.5, ls="", zorder=3, **look.marks)
    if all(row["low"] is not None for row in rows):
        lows, highs = [row["low"] for row in rows], [row["high"] for row in rows]
        axes.fill_between(xs, lows, highs, color=look.colour, alpha=strength, lw=0, zorder=1)


def _line(axes: Axes, rows: Sequence[Row], xs: Sequence[float], look: Style) -> None:
    axes.plot(xs, [row["mean"] for row in rows], color=look.colour, ls=look.dash, lw=1.6, zorder=3)
    _points(axes, xs, rows, "mean", look, look.marker)


def _points(
    axes: Axes, xs: Sequence[float], rows: Sequence[Row], what: str, look: Style, marker: str, *, alone: bool = False
) -> None:
    """Draw points, and their intervals where there are any; one that stands alone larger and above lines."""
    size, height = (8.5, 5) if alone else (5.5, 3)
    axes.plot(xs, [row[what] for row in rows], marker=marker, ms=size, ls="", zorder=height, **look.marks)
    known = [(x, row) for x, row in zip(xs, rows, strict=True) if row["low"] is not None]
    if known:
        axes.vlines(
            [x for x, _ in known], [r["low"] for _, r in known], [r["high"] for _, r in known],
            colors=look.colour, lw=1.5, zorder=2,
        )  # fmt: skip


def _as_ours(name: str, methods: Sequence[str]) -> str:
    """Return the method that a paper's name stands for: ``Mean Teacher`` is ``mean_teacher``."""

    def plain(text: str) -> str:
        return re.sub(r"[\W_]", "", text).lower()

    return next((method for method in methods if plain(method) == plain(name)), "")


def _below(axes: Axes, text: str, x: float, y: float, *, at_edge: bool) -> None:
    axes.annotate(
        text, (x, y), xytext=(5 if at_edge else 0, -7), textcoords="offset points",
        ha="right" if at_edge else "center", va="top", fontsize=8,
    )  # fmt: skip


def _apart(budgets: Sequence[float], span: float) -> list[float]:
    """Return the budgets whose ticks do not run into each other."""
    kept = [budgets[0]]
    for budget in budgets[1:]:
        if math.log2(budget / kept[-1]) >= 0.045 * span:
            kept.append(budget)
    return kept


def cost_and_gain(
    cost: Sequence[Row], differences: Sequence[Row], baseline: str, looks: Mapping[str, Style]
) -> Figure | None:
    """Return differences to the baseline against seconds and images per run; None where nothing is compared.

    Args:
        cost: Rows of the table of costs, one data set.
        differences: Of the table of differences: the same data set, one class and metric.
        baseline: Name of the baseline.
        looks: How methods are drawn.
    """
    if not differences:
        return None
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    known = {(row["method"], row["labelled"]): row for row in cost}
    budgets = {row["labelled"]: row["labels"] for row in sorted(differences, key=lambda row: int(row["labels"]))}
    shapes = {labelled: MARKERS[i % len(MARKERS)] for i, labelled in enumerate(budgets)}
    for axes, title, price in zip(
        panels, ("seconds of training per run", "images seen per run"), (_seconds, _images), strict=True
    ):
        costs = [price(row) for row in cost]
        scaled = max(costs) > 20 * min(costs) > 0
        for row in differences:
            index = list(budgets).index(row["labelled"]) - (len(budgets) - 1) / 2
            x = price(known[row["method"], row["labelled"]])
            # budgets of one method cost nearly the same: beside each other instead of on top of each other
            step = min(0.03, 0.12 / len(budgets))
            x = x * (1 + 2 * step) ** index if scaled else x + index * step * max(costs)
            _points(axes, [x], [row], "difference", looks[row["method"]], shapes[row["labelled"]])
        ours = [price(row) for row in cost if row["method"] == baseline]
        axes.axhline(0, color=INK, lw=1, alpha=0.6)
        axes.plot(ours, [0] * len(ours), "|", color=INK, ms=9, mew=1.2)
        if scaled:
            axes.set_xscale("log")
        else:
            axes.set_xlim(0, 1.1 * max(costs))
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.set(xlabel=title)
        axes.grid(axis="y")
    panels[0].set_ylabel(f"difference in mean Dice to {baseline}")
    compared = [m for m in looks if any(row["method"] == m for row in differences)]
    handles: list[Any] = [Patch(fc=looks[m].marks["mfc"], ec=looks[m].colour, label=m) for m in compared]
    handles.append(Line2D([], [], color=INK, ls="", marker="|", ms=9, mew=1.2, label=baseline))
    handles += [
        Line2D([], [], color=INK, ls="", marker=shapes[k], ms=5.5, mew=0, label=f"{n} labelled")
        for k, n in budgets.items()
    ]
    _legend(figure, handles)
    return figure


def _seconds(row: Row) -> float:
    return float(row["seconds"])


def _images(row: Row) -> float:
    return float(row["images_with_gradient"] + row["images_without"])


def per_case(
    rows: Sequence[Row], labels: Mapping[str, int], baseline: str, looks: Mapping[str, Style]
) -> Figure | None:
    """Return the Dice of every patient, each method against the baseline, a panel per budget; None without rows.

    Args:
        rows: Of the table of cases, one data set.
        labels: Labelled patients by budget as written.
        baseline: Name of the baseline.
        looks: How methods are drawn.
    """
    if not rows:
        return None
    budgets = sorted({row["labelled"] for row in rows}, key=lambda budget: labels[budget])
    columns = min(3, len(budgets))
    lines = math.ceil(len(budgets) / columns)
    size = (WIDTH - 0.5) / max(2, columns)
    # as wide as every figure, so that letters are of one size on the page
    figure = Figure(figsize=(WIDTH, (size + 0.2) * lines + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    low = min(min(row["dice"], row["baseline_dice"]) for row in rows)
    high = max(max(row["dice"], row["baseline_dice"]) for row in rows)
    edge = 0.04 * max(high - low, 0.02)
    limits = (max(-0.02, low - edge), min(1.02, high + edge))
    methods = [m for m in looks if any(row["method"] == m for row in rows)]
    for axes in panels:
        axes.set_visible(False)
    for axes, budget in zip(panels, budgets, strict=False):
        axes.set_visible(True)
        axes.plot(limits, limits, color=INK, lw=1, alpha=0.45, zorder=1)
        for method in methods:
            own = [row for row in rows if (row["labelled"], row["method"]) == (budget, method)]
            look = looks[method]
            xs, ys = [row["baseline_dice"] for row in own], [row["dice"] for row in own]
            axes.plot(xs, ys, ls="", marker=look.marker, ms=4.5, alpha=0.9, **look.marks)
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.set_title(f"{labels[budget]} labelled", fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4))
        axes.grid()
    for axes in panels[max(0, len(budgets) - columns) : len(budgets)]:
        axes.tick_params(labelbottom=True)
    across, up = f"Dice of {baseline}", "Dice of the method"
    if columns == 1:  # a lone panel is narrower than the figure
        panels[0].set_xlabel(across, fontsize=9)
        panels[0].set_ylabel(up, fontsize=9)
    else:
        figure.supxlabel(across, fontsize=9)
        figure.supylabel(up, fontsize=9)
    _legend(figure, [_handle(looks[m], m, line=False) for m in methods])
    return figure


def ranks(rows: Sequence[Row], looks: Mapping[str, Style]) -> Figure | None:
    """Return how often each method takes each rank, a panel per budget; None without rows.

    Args:
        rows: Of the table of ranks, one data set.
        looks: How methods are drawn; gives their order.
    """
    if not rows:
        return None
    budgets = {row["labelled"]: row["labels"] for row in sorted(rows, key=lambda row: int(row["labels"]))}
    methods = [m for m in looks if any(row["method"] == m for row in rows)]
    most = max(row["rank"] for row in rows)
    columns = min(3, len(budgets))
    lines = math.ceil(len(budgets) / columns)
    figure = Figure(figsize=(WIDTH, (0.34 * len(methods) + 0.5) * lines + 0.7), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    strength = [1 - 0.78 * rank / max(1, most - 1) for rank in range(most)]
    for axes in panels:
        axes.set_visible(False)
    for axes, (budget, labels) in zip(panels, budgets.items(), strict=False):
        axes.set_visible(True)
        for row in (row for row in rows if row["labelled"] == budget):
            alone = [r["share"] for r in rows if (r["labelled"], r["method"]) == (budget, row["method"])]
            _bar(
                axes,
                methods.index(row["method"]),
                sum(alone[: row["rank"] - 1]),
                row["share"],
                strength[row["rank"] - 1],
            )
        axes.set_title(f"{labels} labelled", fontsize=9)
        axes.set_yticks(range(len(methods)), methods)
        axes.set(xlim=(0, 1), ylim=(len(methods) - 0.45, -0.55))
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
    for axes in panels[max(0, len(budgets) - columns) : len(budgets)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("share of resamples", fontsize=9)
    _legend(figure, [Patch(color=OKABE_ITO[0], alpha=a, lw=0, label=f"rank {i + 1}") for i, a in enumerate(strength)])
    return figure


def _bar(axes: Axes, place: int, left: float, share: float, strength: float) -> None:
    axes.barh(place, share, left=left, height=0.62, color=OKABE_ITO[0], alpha=strength, lw=0)
    if share >= 0.15:
        colour = "#ffffff" if strength > 0.75 else INK
        axes.text(left + share / 2, place, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)


# -- drawing ------------------------------------------------------------------------------------------------------------


def _handle(look: Style, label: str, *, line: bool = True) -> Line2D:
    dash = look.dash if line else ""
    return Line2D([], [], color=look.colour, ls=dash, lw=1.6, marker=look.marker, ms=5.5, label=label, **look.marks)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Put the legend above the axes, in as many columns as fit, read row by row."""
    lengths = [len(str(handle.get_label())) + 7.5 for handle in handles]
    room = 13.8 * figure.get_figwidth()
    columns = len(handles) if sum(lengths) <= room else max(1, int(room / max(lengths)))
    figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(handles) / columns) - 1))
    by_row = [handle for column in range(columns) for handle in handles[column::columns]]
    figure.legend(
        handles=by_row, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=1.8,
        columnspacing=1.6, borderaxespad=0.1,
    )  # fmt: skip


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Draw in the colour of the text, without frames, and with identifiers that depend on the name only."""
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.family": "DejaVu Sans",
        "font.size": 9, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": INK, "grid.alpha": 0.13,
        "grid.linewidth": 0.7, "axes.axisbelow": True, "figure.facecolor": "none", "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }  # fmt: skip
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        yield


def svg_of(figure: Figure, name: str, title: str) -> str:
    """Return a figure as an SVG element for the page; call it inside :func:`drawing`.

    Args:
        figure: What to write.
        name: Its file's name, which makes its identifiers unique on the page.
        title: What it shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family:[^;\"]*;? ?", "", text)
    text = re.sub(r'\bid="|href="#|url\(#', lambda found: f"{found.group()}{name}-", text)
    # matplotlib's style element would hold for the whole page
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    width, height = (round(inches * 96) for inches in figure.get_size_inches())
    box = re.search(r'viewBox="[^"]*"', text)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box.group() if box else ""} '
        f'width="{width}" height="{height}" stroke-linejoin="round" role="img" aria-labelledby="{name}-title">'
        f'<title id="{name}-title">{escape(title)}</title>'
    )
    return head + text[text.index(">") + 1 :].replace(INK, "currentColor").strip()


def alone(svg: str) -> str:
    """Return an SVG file that can be opened by itself: a grey that reads on white and on black, and fonts."""
    return svg.replace("<svg ", f'<svg style="color: #767b82; font-family: {FONTS}" ', 1) + "\n"


def inline(svg: str) -> str:
    """Return an SVG as HTML wants it: without namespaces, in the fonts of the page."""
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
