"""The report of a sweep: one HTML page that needs nothing else, its figures, and its tables as CSV."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from labeleff.evaluation.statistics import FEWEST_DRAWS, FEWEST_FOR_INTERVAL
from labeleff.evaluation.tables import METRICS
from labeleff.files import write_atomically
from labeleff.report import figures, label_figures
from labeleff.report.analysis import TABLES, Analysis
from labeleff.report.cells import PRIMARY, Row, variant
from labeleff.report.figures import Style
from labeleff.report.templates import template
from labeleff.report.words import number, warning_in_words
from labeleff.sweep.collect import Record

PICTURE_CHARACTERS = 1_600_000
"""Of all pictures together: a page that can be sent by e-mail."""
PICTURE_WIDTHS = (720, 560, 440, 320)
TITLES = {
    "learning_curve": "Mean Dice against labelled patients",
    "budget": "Mean Dice against voxels labelled on request",
    "cases": "Dice of every test patient, each method against the baseline",
    "cost": "Difference in mean Dice to the baseline against seconds and images per run",
    "ranks": "How often each method takes each rank",
    "training_iou": "IoU of training predictions and labels, per class and run",
    "memorisation": "IoU with clean and with given labels where these differ, per class and run",
}
RANKS = ("best", "median", "worst")
DIGITS = {
    "hd95": 2,
    "assd": 2,
    "seconds": 0,
    "regions": 0,
    "voxels": 0,
    "slices": 0,
    "factor": 1,
    "limit": 1,
    "gap_closed": 2,
    "share": 3,
    "missed": 1,
    "spurious": 1,
}
"""Decimals of a metric or column on the page; 3 for the others, none for whole numbers."""

Indexed = tuple[int, Row]
"""A row with its place in its table."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the page and of ``figures/``."""

    file: str
    svg: str


@dataclass(frozen=True)
class Picture:
    """Overlays of one case, as a data URL."""

    rank: str
    case: str
    url: str
    width: int
    height: int


@dataclass(frozen=True)
class Gallery:
    """Pictures of one run."""

    method: str
    record: Record
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Shown:
    """What the page shows of one data set, beside the rows of its tables."""

    name: str
    methods: tuple[str, ...]
    looks: Mapping[str, Style]
    main: Sequence[tuple[Indexed, Indexed | None]]
    drawings: Mapping[str, Drawing]
    galleries: Sequence[Gallery]
    splits: Sequence[tuple[Row, tuple[str, ...]]]
    unit: str


def write_report(analysis: Analysis, folder: Path) -> Path:
    """Write ``index.html``, ``figures/*.svg`` and a CSV file per table, each atomically, and return the page's path.

    Args:
        analysis: What is shown; the page computes nothing.
        folder: Where to; it is made.
    """
    for name, columns in TABLES.items():
        write_atomically(folder / f"{name}.csv", csv_text(columns, analysis.tables[name]))
    galleries = make_galleries(analysis)
    shown = [
        _shown(analysis, dataset, files, galleries[dataset]) for dataset, files in _file_names(analysis.classes).items()
    ]
    for drawing in (drawing for part in shown for drawing in part.drawings.values()):
        write_atomically(folder / "figures" / drawing.file, figures.alone(drawing.svg))
    page = folder / "index.html"
    write_atomically(page, render(analysis, shown))
    return page


def exact(value: Any) -> str:
    """Return a value as the CSV files hold it: every digit of a float, nothing for None."""
    if value is None:
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def csv_text(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a table as CSV, columns in the given order."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([exact(row[column]) for column in columns] for row in rows)
    return buffer.getvalue()


def render(analysis: Analysis, shown: Sequence[Shown]) -> str:
    """Return the page."""
    plan = analysis.collected.plan
    return template("page.html.j2", {"exact": exact}).render(
        analysis=analysis,
        shown=shown,
        plan=plan,
        table={name: list(enumerate(rows)) for name, rows in analysis.tables.items()},
        ordered=lambda part, name: ordered(analysis, part, name),
        number=number,
        rounded=rounded,
        p_value=p_value,
        saving=saving,
        short=short,
        inline=lambda drawing: Markup(figures.inline(drawing.svg)),  # noqa: S704  # matplotlib escapes what it writes
        metrics=METRICS,
        fonts=figures.FONTS,
        planned=len(plan["jobs"]),
        fewest=FEWEST_DRAWS,
        fewest_for_interval=FEWEST_FOR_INTERVAL,
        scored=sorted(
            {(variant(r), r.summary["predictor"], r.summary["selection"]) for r in analysis.collected.records}
        ),
        warnings=[
            f"{variant(run)}, {run.labelled} labels, draw {run.draw}, seed {run.seed}: {warning_in_words(warning)}"
            for run in analysis.collected.records
            for warning in run.summary.get("warnings", ())
        ],
        run_notes=list(dict.fromkeys(text for r in analysis.collected.records for text in r.summary["notes"])),
    )


# -- cells --------------------------------------------------------------------------------------------------------------


def rounded(value: Any, what: str, *, signed: bool = False) -> str:
    """Return a number as the page shows it.

    Args:
        value: A number or None.
        what: Its metric or column, which says how many decimals are shown.
        signed: Write a plus, too.
    """
    whole = isinstance(value, int)
    return number(value, 0 if whole else DIGITS.get(what, 3), signed=signed)


def p_value(value: float | None) -> str:
    """Return a p value; the smallest ones as below 0.001."""
    return "<0.001" if value is not None and value < 0.001 else number(value)


def short(verdict: str) -> str:
    """Return a verdict as it stands in a column; what else it says is said once below the table."""
    return (
        verdict.split(";")[0].replace("no evidence of a gain", "no evidence").replace(" by the interval", " (interval)")
    )


def saving(row: Row) -> str:
    """Return what a row of the table of savings says."""
    if row["censored"] == "above":
        return f"not reached by {row['baseline']} at any budget"
    if row["censored"] == "below":
        return f"{row['baseline']} is better already with its fewest labels"
    if row["factor"] > 1:
        return f"{row['baseline']} needs more labels for that score"
    return f"{row['baseline']} gets there with {'as many' if row['factor'] == 1 else 'fewer'} labels"


def ordered(analysis: Analysis, part: Shown, name: str) -> list[Indexed]:
    """Return the rows of a table on one data set as they are read: by budget, the baseline first."""

    def place(item: Indexed) -> tuple[Any, ...]:
        row = item[1]
        return row.get("labels", 0), part.methods.index(row["method"]), row.get("draw", 0), row.get("seed", 0)

    return sorted(((i, r) for i, r in enumerate(analysis.tables[name]) if r["dataset"] == part.name), key=place)


# -- parts of the page --------------------------------------------------------------------------------------------------


def _file_names(datasets: Mapping[str, Any]) -> dict[str, str]:
    """Return a name for files by data set; no two are the same."""
    names: dict[str, str] = {}
    for dataset in datasets:
        plain = re.sub(r"[^\w.-]", "_", dataset, flags=re.ASCII)
        names[dataset] = plain if plain not in names.values() else f"{plain}-{len(names)}"
    return names


def _shown(analysis: Analysis, dataset: str, files: str, galleries: Sequence[Gallery]) -> Shown:
    rows = analysis.tables["curves"]
    curves = [(i, row) for i, row in enumerate(rows) if row["dataset"] == dataset]
    # the baseline first, wherever the plan has it; a method looks the same on all data sets of a page
    everywhere = sorted(dict.fromkeys(row["method"] for row in rows), key=lambda name: name != analysis.baseline)
    here = {row["method"] for _, row in curves}
    looks = {name: look for name, look in figures.styles(everywhere, analysis.baseline).items() if name in here}
    named = tuple(looks)
    records = _records(analysis, dataset)
    return Shown(
        dataset,
        named,
        looks,
        _main(analysis, curves, named),
        _drawings(analysis, dataset, files, looks),
        galleries,
        _splits(analysis, dataset),
        str(records[0].summary["results"][0]["unit"]),
    )


def _records(analysis: Analysis, dataset: str) -> list[Record]:
    """Return the runs of a data set in the order of draws and seeds."""
    found = [r for r in analysis.collected.records if (r.dataset or r.summary["dataset"]) == dataset]
    return sorted(found, key=lambda record: (record.draw, record.seed, record.fold or 0))


def _main(
    analysis: Analysis, curves: Sequence[Indexed], methods: Sequence[str]
) -> list[tuple[Indexed, Indexed | None]]:
    """Return every row of the curves beside its difference to the baseline, by rising budget, the baseline first."""
    keys = ("dataset", "method", "labelled", "class", "metric")
    differences = {tuple(row[key] for key in keys): (i, row) for i, row in enumerate(analysis.tables["differences"])}
    pairs = [((i, row), differences.get(tuple(row[key] for key in keys))) for i, row in curves]
    return sorted(pairs, key=lambda pair: (pair[0][1]["labels"], methods.index(pair[0][1]["method"])))


def _drawings(analysis: Analysis, dataset: str, files: str, looks: Mapping[str, Style]) -> dict[str, Drawing]:
    own = {
        name: [row for row in analysis.tables[name] if row["dataset"] == dataset]
        for name in (
            "curves",
            "differences",
            "rounds",
            "budget_areas",
            "cost",
            "cases",
            "ranks",
            "training_iou",
            "diagnostics",
        )
    }
    main = {
        name: [row for row in own[name] if (row["class"], row["metric"]) == PRIMARY]
        for name in ("curves", "differences")
    }
    labels = {row["labelled"]: row["labels"] for row in own["cost"]}
    # a paper's number names no data set
    published = analysis.tables["published"] if len(analysis.classes) == 1 else []
    baseline = analysis.baseline
    with figures.drawing(files):
        made = {
            "learning_curve": figures.learning_curve(main["curves"], published, looks),
            "budget": figures.budget_curves(own["rounds"], own["budget_areas"], main["curves"], looks),
            "cases": figures.per_case(own["cases"], labels, baseline, looks),
            "cost": figures.cost_and_gain(own["cost"], main["differences"], baseline, looks),
            "ranks": figures.ranks(own["ranks"], looks),
            "training_iou": label_figures.training_iou(own["training_iou"], looks),
            "memorisation": label_figures.memorisation(own["diagnostics"], looks),
        }
        return {
            kind: Drawing(
                f"{kind}-{files}.svg", figures.svg_of(figure, f"{kind}-{files}", f"{TITLES[kind]}: {dataset}")
            )
            for kind, figure in made.items()
            if figure is not None
        }


def _splits(analysis: Analysis, dataset: str) -> list[tuple[Row, tuple[str, ...]]]:
    """Return the hashes of the splits by budget, draw and fold: one each, where all methods had the same patients."""
    found: dict[tuple[Any, ...], tuple[Row, list[str]]] = {}
    for row in analysis.tables["runs"]:
        if row["dataset"] == dataset:
            place = (row["labels"], row["labelled"], row["draw"], row["fold"] or 0)
            _, hashes = found.setdefault(place, (row, []))
            if row["split"] not in hashes:
                hashes.append(row["split"])
    return [(row, tuple(hashes)) for _, (row, hashes) in sorted(found.items(), key=lambda item: item[0])]


# -- pictures -----------------------------------------------------------------------------------------------------------


def make_galleries(analysis: Analysis) -> dict[str, list[Gallery]]:
    """Return pictures of the best, median and worst case of every method, by data set, as large as the page may be.

    They are those of the first draw at the smallest budget that all methods of the data set have, or else at the method's
    own smallest.
    """
    chosen = {dataset: _pictured(_records(analysis, dataset)) for dataset in analysis.classes}
    found: dict[str, list[Gallery]] = {}
    for width in PICTURE_WIDTHS:
        found = {
            dataset: [Gallery(variant(record), record, tuple(_pictures(record, width))) for record in records]
            for dataset, records in chosen.items()
        }
        urls = [picture.url for own in found.values() for gallery in own for picture in gallery.pictures]
        if sum(map(len, urls)) <= PICTURE_CHARACTERS:
            break
    return found


def _pictured(records: Sequence[Record]) -> list[Record]:
    """Return the run of every method that is shown in pictures."""
    budgets: dict[str, set[int]] = {}
    for record in records:
        budgets.setdefault(variant(record), set()).add(record.labels)
    shared = set.intersection(*budgets.values())
    smallest = {method: min(shared or own) for method, own in budgets.items()}
    return [next(r for r in records if (variant(r), r.labels) == place) for place in smallest.items()]


def _pictures(record: Record, width: int) -> Iterator[Picture]:
    """Yield the pictures of a run that are there and readable."""
    for rank in RANKS:
        for path in sorted((record.folder / "pictures").glob(f"{rank}-*.png"))[:1]:
            try:
                with Image.open(path) as image:
                    small = image.convert("RGB")
            except OSError:
                continue
            small.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=80, method=4)
            url = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            yield Picture(rank, path.stem.removeprefix(f"{rank}-"), url, *small.size)
