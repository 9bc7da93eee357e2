"""Numbers in words: verdicts that claim no more than the design allows, and the answer in two sentences or three."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from labeleff.evaluation.statistics import FEWEST_DRAWS, FEWEST_FOR_INTERVAL

Row = Mapping[str, Any]
LEVEL = 0.05
SMALL_P = 0.0001
"""A smaller p value is not told in full: the tail of so few draws is not known so well."""
ENOUGH = 0.95
"""Share of the score with all labels that counts as having got there."""


def verdict(row: Row, *, lower_is_better: bool = False) -> str:
    """Return what a paired difference allows one to say: gain, loss, or no evidence of either.

    A difference counts where its interval excludes 0 and, from six draws on, the p value adjusted after Holm is below 0.05.
    """
    if row["low"] is None:
        return f"fewer than {FEWEST_FOR_INTERVAL} draws: no interval"
    better = -row["difference"] if lower_is_better else row["difference"]
    counts = not row["low"] <= 0 <= row["high"] and (row["p_holm"] is None or row["p_holm"] < LEVEL)
    few = "" if row["draws"] >= FEWEST_DRAWS else "; too few draws for a test"
    if not counts:
        return f"no evidence of a gain{few}"
    return f"{'gain' if better > 0 else 'loss'} by the interval{few}" if few else ("gain" if better > 0 else "loss")


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """Return a number for the page; a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if math.isinf(value):
        return "∞"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    # a bound that is not 0 but rounds to it keeps its side
    return text if value == 0 or float(text) != 0 else f"{value:{'+' if signed else ''}.1g}"


def between(row: Row, *, signed: bool = False, digits: int = 3) -> str:
    """Return the interval of a row, or an empty string."""
    if row["low"] is None:
        return ""
    return f"[{number(row['low'], digits, signed=signed)}, {number(row['high'], digits, signed=signed)}]"


def labels_word(row: Row) -> str:
    """Return ``4 labelled patients``."""
    return f"{row['labels']} labelled patient{'s' if row['labels'] != 1 else ''}"


def answer(
    dataset: str, baseline: str, tables: Mapping[str, Sequence[Row]], references: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return two sentences: does any method help, and how many labels are needed.

    Where methods ask, a third says which of them are better over the whole budget. If none is, it comes first.

    Args:
        dataset: Which of those in the tables.
        baseline: What methods are compared with.
        tables: Those of an analysis.
        references: Methods that know what the others may not: they are no answer.
    """
    primary = [
        row
        for row in tables["differences"]
        if row["dataset"] == dataset
        and (row["class"], row["metric"]) == ("mean", "dice")
        and row["method"] not in references
    ]
    curve = sorted(
        (
            row
            for row in tables["curves"]
            if row["dataset"] == dataset
            and row["method"] == baseline
            and (row["class"], row["metric"]) == ("mean", "dice")
        ),
        key=lambda row: int(row["labels"]),
    )
    said = (_does_it_help(baseline, primary), _how_many(baseline, curve, primary, tables["savings"], dataset))
    areas = [row for row in tables["budget_areas"] if row["dataset"] == dataset and row["method"] not in references]
    if not any(row["area"] is not None for row in areas):
        return said
    over = _over_the_budget(baseline, [row for row in areas if row["difference"] is not None])
    return (*said, over) if any(row["verdict"].startswith("gain") for row in areas) else (over, *said)


def _said(row: Row) -> str:
    draws = f"{row['draws']} draw{'s' if row['draws'] != 1 else ''}"
    p = row["p_holm"]
    test = f", p {'= ' + format(p, '.2g') if p >= SMALL_P else f'< {SMALL_P}'} after Holm" if p is not None else ""
    return f"{number(row['difference'], signed=True)} Dice {between(row, signed=True)}, {draws}{test}".replace(
        " ,", ","
    )


def _does_it_help(baseline: str, rows: Sequence[Row]) -> str:
    if not rows:
        return f"Only {baseline} was run, so nothing is compared."
    gains = [row for row in rows if row["verdict"].startswith("gain")]
    losses = [row for row in rows if row["verdict"].startswith("loss")]
    few = all(row["draws"] < FEWEST_DRAWS for row in rows)
    tail = " There are too few draws for a test." if few and any(row["low"] is not None for row in rows) else ""
    if gains:
        best = max(gains, key=lambda row: row["difference"])
        more = len(gains) - 1
        rest = (
            f", and {more} further comparison{'s' * (more > 1)} of {len(rows)} show{'s' * (more == 1)} a gain"
            * bool(more)
        )
        said = f"With {labels_word(best)}, {best['method']} gains over {best['baseline']} ({_said(best)}){rest}"
    elif any(row["low"] is not None for row in rows):
        best = max(rows, key=lambda row: row["difference"])
        said = (
            f"No evidence of a gain over {baseline} for any method at any budget (the largest difference is that of "
            f"{best['method']} with {labels_word(best)}, {_said(best)})"
        )
    else:
        said = f"There are fewer than {FEWEST_FOR_INTERVAL} draws: no interval can be given, and nothing is claimed"
    if losses:
        worst = min(losses, key=lambda row: row["difference"])
        said += f"; {worst['method']} loses with {labels_word(worst)} ({_said(worst)})"
        if len(losses) > 1:
            others = [f"{row['method']} with {row['labels']}" for row in losses if row is not worst]
            said += f", and so {'does' if len(losses) == 2 else 'do'} {listed(others)}"
    return f"{said}.{tail}"


def _over_the_budget(baseline: str, rows: Sequence[Row]) -> str:
    """Return which methods have a larger area under the budget curve than the baseline."""
    if not rows:
        return f"No budget curve is compared with one of {baseline}."
    several = len({row["labelled"] for row in rows}) > 1

    def named(row: Row) -> str:
        return f"{row['method']} with {labels_word(row)}" if several else str(row["method"])

    ranked = sorted(rows, key=lambda row: float(row["difference"]), reverse=True)
    gains = [row for row in ranked if row["verdict"].startswith("gain")]
    losses = [row for row in ranked if row["verdict"].startswith("loss")]
    best = f"{named(ranked[0])}, {_said(ranked[0])}"
    if gains:
        said = f"Over the whole budget of questions, {named(gains[0])} beats {baseline} (area under the budget curve "
        said += f"{_said(gains[0])})"
        if len(gains) > 1:
            said += f", and so {'does' if len(gains) == 2 else 'do'} {listed([named(row) for row in gains[1:]])}"
    elif any(row["low"] is not None for row in rows):
        said = (
            f"No evidence that any method beats {baseline} over the budget of questions (the largest difference in the "
            f"area under the budget curve is that of {best})"
        )
    else:
        said = f"With fewer than {FEWEST_FOR_INTERVAL} draws, no method can be said to beat {baseline} over the budget of questions"
    if losses:
        said += (
            f"; {listed([f'{named(row)} ({_said(row)})' for row in losses])} {'loses' if len(losses) == 1 else 'lose'}"
        )
    return f"{said}."


def listed(names: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + list(names[-1:]))


def _how_many(
    baseline: str, curve: Sequence[Row], differences: Sequence[Row], savings: Sequence[Row], dataset: str
) -> str:
    if len(curve) < 2:
        return "Only one budget was run, so nothing can be said about how many labels are needed."
    full = curve[-1]
    gains = [row for row in differences if row["verdict"].startswith("gain")]
    said = ""
    if gains:
        best = max(gains, key=lambda row: row["difference"])
        found = next(
            (
                r
                for r in savings
                if (r["dataset"], r["method"], r["labels"]) == (dataset, best["method"], best["labels"])
            ),
            None,
        )
        said = _saved(found, baseline) if found is not None else ""
    enough = next(row for row in curve if row["mean"] >= ENOUGH * full["mean"])
    reach = (
        f"{baseline} reaches {number(full['mean'])} Dice {between(full)} with {labels_word(full)}, and "
        f"{100 * ENOUGH:.0f} % of that with {enough['labels']}"
        if enough["labels"] < full["labels"]
        else f"{baseline} reaches {number(full['mean'])} Dice {between(full)} with {labels_word(full)}, "
        f"and less than {100 * ENOUGH:.0f} % of that with fewer"
    )
    whole = f"{said}{'; ' if said else ''}{reach}.".replace(" , ", ", ").replace("  ", " ")
    return whole[0].upper() + whole[1:]


def _saved(row: Row, baseline: str) -> str:
    if row["censored"] == "above":
        limit = number(row["limit"], 1)
        if limit == "1.0":
            return f"{baseline} does not reach that score with the most labels it was given"
        return f"for that score {baseline} needs at least {limit} times as many labels: it did not get there"
    if row["censored"] == "below":
        return f"{baseline} is there already with its smallest budget"
    interval = f" (95 %: {number(row['low'], 1)} to {number(row['high'], 1)})" if row["low"] is not None else ""
    return f"for that score {baseline} needs {number(row['factor'], 1)} times as many labels{interval}"


def warning_in_words(warning: Mapping[str, Any]) -> str:
    """Return one entry of a summary's ``warnings`` as a line."""
    fold = f"fold {warning['fold']}, " if "fold" in warning else ""
    return f"{fold}stage {warning['stage']}, step {warning['step']}: {warning['words']}"
