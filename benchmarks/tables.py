"""Writes ``docs/results.md``, and what other pages hold of ``results/*.json`` between marks; ``--check``: current?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml

from labeleff.evaluation.statistics import FEWEST_DRAWS, compare
from labeleff.report.words import answer, listed, number

HERE = Path(__file__).parent
README, PAGE = HERE.parent / "README.md", HERE.parent / "docs" / "results.md"
VOCO, METHODS = HERE.parent / "docs" / "voco.md", HERE.parent / "docs" / "methods.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->"
BY_CLASS = ("chest_regions", "scribbles_acdc")
"""Suites whose Dice is told class by class."""

TITLES = {
    "phantom": "Generated patients, 2-D",
    "left_atrium": "Left atrium, real scans at half resolution, 2-D network",
    "acdc": "ACDC, real scans at 128 x 128, 2-D network",
    "noise_phantom": "Wrong labels (Dice 0.8, mostly too large), generated patients, 2-D, no augmentation",
    "noise_phantom_3d": "Wrong labels (Dice 0.8, mostly too large), generated volumes, no augmentation",
    "noise_half": "Half of the patients with wrong labels (Dice 0.8, mostly too large), generated patients, 2-D, no augmentation",
    "adaptation_phantom": "From one generated site to another without its labels, 2-D, batch norm",
    "adaptation_phantom_instance": "From one generated site to another without its labels, 2-D, instance norm",
    "adaptation_nuclei": "From fluorescence to stained tissue without its labels, nuclei at 128 x 128, real images",
    "queries_phantom": "From one generated site to another, 2 % of whose pixels are told in five rounds, 2-D",
    "queries_nuclei": "From fluorescence to stained tissue, 2 % of whose pixels are told in five rounds, real images",
    "active_acdc": "Three labelled patients and 2 % of the voxels of twenty others, told in five rounds, ACDC at 128 x 128, 2-D",
    "cotraining_phantom": "Four labelled generated volumes: three views that teach one another beside the same views trained on",
    "cotraining_left_atrium": "Left atrium, real scans at half resolution, 3-D network, short schedules, equal steps or time",
    "cotraining_sites": "From one generated site to another without its labels, 2-D, batch norm, three views",
    "scribbles_acdc": "Seven patients with scribbles in place of dense labels, ACDC at 128 x 128, 2-D",
    "chest_regions": "Four labelled generated chest radiographs, regions that overlap",
    "voco_phantom_3d": "Two labelled generated volumes, after learning from 40 without labels, 3-D network",
    "voco_left_atrium": "Left atrium, real scans at half resolution, 3-D network: BCP after volume contrast, and without it",
    "pretraining_acdc": "ACDC at 128 x 128, 2-D, batch norm: learning from 70 patients without labels, then from labelled ones",
    "four_stages": "From four labelled patients of one generated site to another: four stages, one left out at a time, 2-D",
    "noise_acdc": "Wrong labels (Dice 0.8, mostly too large), ACDC at 128 x 128, 2-D network (`adele` with threshold 0.9)",
    "noise_acdc_adele": "The same wrong labels of ACDC: ADELE with today's threshold",
}

EXPECTED = {
    "generated patients, 2-D, no augmentation": ("noise_phantom", "noise_phantom", ""),
    "generated volumes, no augmentation": ("noise_phantom_3d", "noise_phantom_3d", ""),
    "ACDC, seven patients, `area_normalised`": ("noise_acdc_adele", "noise_acdc", "area_normalised"),
    "`area_normalised` with `threshold` 0.9": ("noise_acdc", "noise_acdc", "area_normalised"),
    "ACDC, seven patients, `markov`": ("noise_acdc_adele", "noise_acdc", "markov"),
    "`markov` with `threshold` 0.9": ("noise_acdc", "noise_acdc", "markov"),
}
"""Rows of what ADELE gives: the suite with its runs, the one with the others, the data set in both."""


def paired(result: dict[str, Any]) -> list[str]:
    """Return the table of a suite: mean Dice over draws, and the paired difference in words."""
    runs = result["runs"]
    steps = sum(runs[0]["steps"])
    lines = [f"{steps} steps, same draws and seeds, as many labelled images per step.", ""]
    lines += [
        "| labelled patients | method | draws | mean Dice | difference to supervised [95 % over draws] | |",
        "|---|---|---|---|---|---|",
    ]
    for budget, method in dict.fromkeys((str(r["labelled"]), r["method"]) for r in runs):
        own = [r["dice"]["mean"] for r in runs if (str(r["labelled"]), r["method"]) == (budget, method)]
        found = next((d for d in result["differences"] if (d["labelled"], d["method"]) == (budget, method)), None)
        difference = f"{found['mean']:+.3f} [{found['interval'][0]:+.3f}, {found['interval'][1]:+.3f}]" if found else ""
        lines.append(
            f"| {budget} | {method} | {len(own)} | {sum(own) / len(own):.3f} | {difference} | {found['verdict'] if found else ''} |"
        )
    return [*lines, ""]


def compared(name: str, result: dict[str, Any]) -> list[str]:
    """Return the answer and the table of a sweep."""
    tables, benchmark, suite = result["tables"], result["benchmark"], suite_of(name)
    steps = {row["steps"] for row in tables["cost"]}
    terms = f"on equal terms but for {' and '.join(benchmark['allow'])}" if benchmark.get("allow") else "on equal terms"
    lines = [
        f"{'/'.join(map(str, sorted(steps)))} steps, {len(benchmark['draws'])} draws, {terms}.",
        *[suite["note"].strip()] * ("note" in suite),
        "",
    ]
    several = len({row["dataset"] for row in tables["curves"]}) > 1
    what = ("dataset", "method", "labelled")
    found = {tuple(row[key] for key in what): row for row in tables["differences"] if is_primary(row)}
    if found:
        for dataset, sentences in answers(name, result).items():
            lines.append(f"> {f'{dataset}: ' * several}{' '.join(sentences)}\n")
    titles = [*["data"] * several, "labelled patients", "method", "mean Dice [95 %]"]
    against = f" difference to {benchmark['baseline']} [95 %] | |" * bool(found)
    lines += [f"| {' | '.join(titles)} |{against}", "|---" * (len(titles) + against.count("|")) + "|"]
    for row in filter(is_primary, tables["curves"]):
        own = [*[row["dataset"]] * several, str(row["labels"]), row["method"], f"{row['mean']:.3f}{bounds(row, '.3f')}"]
        if found:
            other = found.get(tuple(row[key] for key in what))
            difference = f"{other['difference']:+.3f}{bounds(other, '+.3f')}" if other else ""
            own += [difference, other["verdict"] if other else ""]
        lines.append(f"| {' | '.join(own)} |")
    lines += ["", *made_on(tables.get("machines", [])), *asked(tables.get("budget_areas", []), benchmark["baseline"])]
    return [*lines, *(by_class(tables["curves"]) if name in BY_CLASS else [])]


def made_on(machines: list[dict[str, Any]]) -> list[str]:
    """Return where the runs were made; nothing where that was one machine."""
    places = [f"{row['runs']} on {row['gpus'] or row['cpu']} (torch {row['torch']})" for row in machines]
    return [f"Runs: {', '.join(places)}.", ""] if len(places) > 1 else []


@cache
def suite_of(name: str) -> dict[str, Any]:
    """Return a suite as it stands today."""
    return yaml.safe_load((HERE / "suites" / f"{name}.yaml").read_text())


def by_class(curves: list[dict[str, Any]]) -> list[str]:
    """Return a table of the mean Dice of each class by method and budget."""
    own = [row for row in curves if row["metric"] == "dice" and row["class"] != "mean"]
    classes = list(dict.fromkeys(row["class"] for row in own))
    lines = [f"| labelled patients | method | {' | '.join(classes)} |", "|---" * (len(classes) + 2) + "|"]
    for labels, method in dict.fromkeys((row["labels"], row["method"]) for row in own):
        of = {row["class"]: row["mean"] for row in own if (row["labels"], row["method"]) == (labels, method)}
        lines.append(f"| {labels} | {method} | {' | '.join(f'{of[name]:.3f}' for name in classes)} |")
    return ["Dice of each class:", "", *lines, ""]


def answers(name: str, result: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the answers in today's words: references as the suite names them today."""
    suite = suite_of(name)
    tables = {"budget_areas": [], **result["tables"]}
    return {
        key: answer(key, suite.get("baseline", "supervised"), tables, suite.get("references", ()))
        for key in result["answers"]
    }


def asked(rows: list[dict[str, Any]], baseline: str) -> list[str]:
    """Return what methods that ask were told, and the area under their budget curve; nothing where none asks."""
    if not rows:
        return []
    slices = any(row["slices"] is not None for row in rows)
    several = len({row["labelled"] for row in rows}) > 1
    titles = ["method", "regions", *["slices"] * slices, "foreground, %", "area under the budget curve [95 %]"]
    lines = [f"| {' | '.join(titles)} | difference to {baseline} [95 %] | |", "|---" * (len(titles) + 2) + "|"]
    for row in rows:
        told = [f"{row['regions']:.0f}", *[f"{row['slices'] or 0:.0f}"] * slices, percent(row["foreground"])]
        area = {"low": row["area_low"], "high": row["area_high"]}
        cells = [
            f"{row['method']}, {row['labels']} labelled patients" if several else row["method"],
            *told,
            "" if row["area"] is None else f"{row['area']:.3f}{bounds(area, '.3f')}",
            "" if row["difference"] is None else f"{row['difference']:+.3f}{bounds(row, '+.3f')}",
            row["verdict"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def percent(share: float | None) -> str:
    """Return a share in per cent; nothing where there is none."""
    return "" if share is None else f"{100 * share:.0f}"


def is_primary(row: dict[str, Any]) -> bool:
    """Return whether a row is about the mean Dice over classes."""
    return (row["class"], row["metric"]) == ("mean", "dice")


def bounds(row: dict[str, Any], form: str) -> str:
    """Return the interval of a row."""
    return "" if row["low"] is None else f" [{row['low']:{form}}, {row['high']:{form}}]"


def beside_passes(name: str, found: dict[str, float]) -> str:
    """Return the first cells of a row: a step, its bare passes, and their ratio."""
    return f"| {name} | {found['step_seconds']:.3f} | {found['bare_seconds']:.3f} | {found['ratio']:.3f}"


def step_table(result: dict[str, Any], step: str = "step") -> list[str]:
    """Return the table of steps, their bare passes, and ratios."""
    lines = [f"| | {step}, s | bare passes, s | ratio |", "|---|---|---|---|"]
    return [*lines, *(f"{beside_passes(name, found)} |" for name, found in result["ratios"].items())]


def step_cost(result: dict[str, Any]) -> list[str]:
    """Return what a step costs."""
    lines = [
        "**What a step costs** beside its bare passes, that is the same forwards and backwards of the network and nothing else;",
        "one thread, U-Net with 16 base channels, `pairing: paper` and `both` of `bcp`",
        "",
    ]
    lines += step_table(result, "BCP step")
    waits = ", ".join(f"{name} {100 * found['share']:.1f} %" for name, found in result["data_wait"].items())
    memory = result["anonymous_megabytes"]
    return [
        *lines,
        "",
        f"Waiting for data: {waits} of a step. Memory: {memory['20']:.0f} MB with 20 cases, {memory['2000']:.0f} MB with 2,000.",
        "",
    ]


def step_cost_gpu(result: dict[str, Any]) -> list[str]:
    """Return what steps cost on a GPU."""
    (card,) = set(result["environment"]["gpus"])
    lines = [
        f"**What steps cost on a GPU** ({card}; 32 base channels, 16 x 256 x 256 and 4 x 96 x 96 x 96, {result['rounds']} steps"
        " timed): networks of this size wait for Python, so a loss of many small operations weighs more than on a CPU",
        "",
    ]
    return [*lines, *step_table(result), ""]


def step_cost_adele(result: dict[str, Any]) -> list[str]:
    """Return what a step of ADELE costs."""
    lines = [
        "**What an ADELE step costs** beside its passes at three scales, one thread, U-Net with 16 base channels",
        "",
    ]
    lines += ["| | step, s | bare passes, s | ratio | watching the curves |", "|---|---|---|---|---|"]
    for name, found in result["ratios"].items():
        lines.append(f"{beside_passes(name, found)} | {100 * found['watching_share']:.1f} % |")
    slowest = max(result["fit_milliseconds"].values())
    revised = ", ".join(
        f"{name} {found['revision_seconds_per_case']:.3f} s ({found['revision_pass_seconds_per_case']:.3f} s its pass)"
        for name, found in result["ratios"].items()
    )
    return [
        *lines,
        "",
        f"Judging the curve of a class takes at most {slowest:.0f} ms. A revision takes per case of one window: {revised}.",
        "",
    ]


def step_cost_umct(result: dict[str, Any]) -> list[str]:
    """Return what a step of co-training and its samples cost."""
    lines = ["**What a step of co-training costs** beside the passes of its views, 10 samples included, one thread", ""]
    lines += [
        *step_table(result),
        "",
        "| 8 samples | s | one full pass, s | what comes after the first dropout, s | to 1 + 7 of these |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name, found in result["sampling"].items():
        lines.append(
            f"| {name} | {found['samples_seconds']:.3f} | {found['full_seconds']:.3f} | {found['after_seconds']:.3f} "
            f"| {found['ratio']:.3f} |"
        )
    return [*lines, ""]


def step_cost_voco(result: dict[str, Any]) -> list[str]:
    """Return what steps without labels cost, and how far their passes go."""
    lines = [
        "**What a step without labels costs** beside its bare passes, CPU time, one thread; and its forward pass, which ends"
        " where its features are, beside one of the whole network",
        "",
    ]
    lines += [
        "| | step, s | bare passes, s | ratio | its forward pass, of one of the whole network |",
        "|---|---|---|---|---|",
    ]
    for name, found in result["ratios"].items():
        lines.append(f"{beside_passes(name, found)} | {100 * found['share_of_network']:.0f} % |")
    return [*lines, ""]


def predict_memory(result: dict[str, Any]) -> list[str]:
    """Return what predicting one large volume takes."""
    shape, side = " x ".join(map(str, result["shape"])), result["window"]
    lines = [f"**What predicting one volume of {shape} takes**, windows of {side}, on {result['threads']} thread", ""]
    lines += [
        "| windows | peak memory, GiB | of that imports | CPU seconds per window | as the in-memory path, bit for bit |"
    ]
    lines += ["|---|---|---|---|---|"]
    same = {True: "yes", False: "no"}[result["equal_to_in_memory"]]
    lines += [
        f"| {result['windows']} | {result['peak_GiB']:.2f} | {result['imports_GiB']:.2f} "
        f"| {result['cpu_seconds_per_window']:.2f} | {same} |"
    ]
    return [*lines, ""]


def label_noise(result: dict[str, Any]) -> list[str]:
    """Return how nearly noise models hit their targets."""
    lines = ["**Label noise at a target Dice** of 0.9, 0.8 and 0.7, all training labels", ""]
    lines += [
        "| data | models × targets | farthest mean of a class from its target | repeated bit for bit | slowest, s per case |"
    ]
    lines += ["|---|---|---|---|---|"]
    for name, found in result["sets"].items():
        rows = found["rows"]
        slowest = max(rows, key=lambda row: row["seconds_per_case"])
        lines.append(
            f"| {name} | {len(rows)} | {found['worst_distance']:.3f} | {'yes' if all(r['bit_equal'] for r in rows) else 'no'} "
            f"| {slowest['seconds_per_case']:.2f} ({slowest['model']}) |"
        )
    return [*lines, ""]


def backtest(result: dict[str, Any]) -> list[str]:
    """Return how good forecasts would have been."""
    lines = ["**What forecasts would have said**, supervised, from at most 8 labelled patients", ""]
    lines += ["| | labelled patients | forecast [95 %] | observed | error |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        low, high = row["interval"]
        lines.append(
            f"| {row['sweep']} | {row['labels']} | {row['forecast']:.3f} [{low:.3f}, {high:.3f}] | {row['observed']:.3f} "
            f"| {row['error']:+.3f} |"
        )
    return [*lines, ""]


def voco_position(result: dict[str, Any]) -> list[str]:
    """Return how predicted and true overlaps of held-out patients correlate."""
    stage, found = result["recipe"]["stages"][0], result["summary"]
    networks = {key: len(row["seeds"]) for key, row in found.items()}
    patients = len(result["runs"][0]["measured"]["own"]["patients"])
    lines = [
        f"**Where crops come from**, told by `voco` after {stage['steps']} steps of {stage['batch']} windows: correlation of "
        f"predicted and true overlaps [95 % over networks and {patients} held-out patients], share of crops whose nearest cell of "
        f"{result['cells']} is told",
        "",
        "| | networks | cells of the crop's own volume | nearest | cells of another patient's | nearest |",
        "|---|---|---|---|---|---|",
    ]
    for arm, title in result["arms"].items():
        cells = [
            f"{row['correlation']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | {100 * row['nearest']:.0f} %"
            for row in (found[f"{arm}, own"], found[f"{arm}, other"])
        ]
        lines.append(f"| {title} | {networks[f'{arm}, own']} | {' | '.join(cells)} |")
    return [*lines, ""]


def correction_threshold(result: dict[str, Any]) -> list[str]:
    """Return what corrections do to wrong and to clean labels, by threshold."""
    rows = result["rows"]
    draws = len({row["draw"] for row in rows})
    lines = [
        f"**How sure a prediction must be before `label_correction` writes it over a label**: generated patients, 2-D, {draws}"
        f" draws of a population that no benchmark uses ({result['benchmark']}), the revisions of one run each made again",
        "",
        "| `threshold` | clean labels: foreground changed, mean (most) | wrong labels: the same | nearer to the clean ones, Dice |",
        "|---|---|---|---|",
    ]
    for threshold in dict.fromkeys(row["threshold"] for row in rows):
        own = {
            labels: [row for row in rows if (row["labels"], row["threshold"]) == (labels, threshold)]
            for labels in ("clean labels", "wrong labels")
        }
        clean, wrong = ([100 * row["changed_share_of_foreground"] for row in found] for found in own.values())
        nearer = mean(mean(row["nearer"]) for row in own["wrong labels"])
        lines.append(
            f"| {threshold} | {mean(clean):.2f} % ({max(clean):.2f} %) | {mean(wrong):.2f} % | {nearer:+.4f} |"
        )
    return [*lines, ""]


COSTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "forecast_backtest": backtest,
    "label_noise": label_noise,
    "step_cost": step_cost,
    "step_cost_adele": step_cost_adele,
    "step_cost_gpu": step_cost_gpu,
    "step_cost_umct": step_cost_umct,
    "step_cost_voco": step_cost_voco,
    "predict_memory": predict_memory,
    "voco_position": voco_position,
    "correction_threshold": correction_threshold,
}


def found(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the results that are there."""
    return {name: result for name in names if (result := result_of(name)) is not None}


@cache
def result_of(name: str) -> dict[str, Any] | None:
    """Return a result, read once for all pages; None where there is none."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def page() -> str:
    """Return the page with every table."""
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/tables.py` from [benchmarks/results](../benchmarks/results), where runs, per-case values,",
        "versions and machine are. Intervals are over draws of the labelled patients and over test patients; three draws rank",
        "nothing.",
        "",
    ]
    for name, result in found(TITLES).items():
        lines += [f"## {TITLES[name]}", ""]
        lines += compared(name, result) if "tables" in result else paired(result)
    lines += ["## Costs, targets, forecasts", ""]
    for name, result in found(COSTS).items():
        lines += COSTS[name](result)
    return "\n".join(lines).rstrip() + "\n"


def summary(name: str, result: dict[str, Any]) -> list[str]:
    """Return a line for each data set of a suite: what gains, what loses, what shows nothing, against which baseline."""
    if "tables" not in result:
        rows = [{**row, "low": row["interval"][0], "high": row["interval"][1]} for row in result["differences"]]
        rows = [{**row, "labels": int(row["labelled"]), "difference": row["mean"]} for row in rows]
        return [summary_line(TITLES[name], "supervised", rows)]
    suite = suite_of(name)
    tables, baseline = result["tables"], suite.get("baseline", "supervised")
    over = [row for row in tables.get("budget_areas", []) if row["difference"] is not None]
    measured = over or [row for row in tables["differences"] if is_primary(row)]
    measured = [row for row in measured if row["method"] not in suite.get("references", ())]
    kinds = list(dict.fromkeys(row["dataset"] for row in measured))
    title = TITLES[name] + (" (area under the budget curve)" if over else "")
    return [
        summary_line(
            f"{title}: {kind}" if len(kinds) > 1 else title, baseline, [r for r in measured if r["dataset"] == kind]
        )
        for kind in kinds
    ]


def summary_line(title: str, baseline: str, rows: list[dict[str, Any]]) -> str:
    """Return a line of the README's table: the largest difference of a cell is told, other methods are named."""
    most = max(row["draws"] for row in rows)
    several = len({row["labels"] for row in rows}) > 1
    cells = []
    for verdict in ("gain", "loss", "no evidence"):
        own = [row for row in rows if row["verdict"].startswith(verdict)]
        own.sort(key=lambda row: row["difference"], reverse=verdict != "loss")
        found = {method: [row for row in own if row["method"] == method] for method in methods(own)}
        cells.append(
            ", ".join(_named(group, most, told=not n, several=several) for n, group in enumerate(found.values()))
        )
    return f"| {title}{'' if most >= FEWEST_DRAWS else f' ({most} draws)'} | `{baseline}` | {' | '.join(cells)} |"


def methods(rows: list[dict[str, Any]]) -> list[str]:
    """Return the methods of rows, each once."""
    return list(dict.fromkeys(row["method"] for row in rows))


def _named(rows: list[dict[str, Any]], most: int, *, told: bool, several: bool) -> str:
    """Return a method, its largest difference where that is told, its budgets, and its draws where others had more."""
    first, words = rows[0], f"`{rows[0]['method']}`"
    if told:
        low, high = (number(first[side], signed=True) for side in ("low", "high"))
        words += f" {number(first['difference'], signed=True)} [{low}, {high}]"
    if several:
        budgets = sorted({row["labels"] for row in rows} - ({first["labels"]} if told else set()))
        where = f" at {listed([str(labels) for labels in budgets])}"
        words += f" at {first['labels']}" + f", also{where}" * bool(budgets) if told else where
    draws = min(row["draws"] for row in rows)
    return words + (f" ({draws} draws)" if draws < most else "")


def readme() -> str:
    """Return the README with its summary made anew."""
    lines = [
        "Mean Dice against a baseline, paired by draw of the labelled patients: the largest difference with its 95 % interval, and",
        "the names of the others. *Gain* and *loss* hold after Holm's correction over six draws; with fewer draws, whose number is",
        "told, they are by the interval alone.",
        "",
        "| setting | against | gain | loss | no evidence of either |",
        "|---|---|---|---|---|",
    ]
    for name, result in found(TITLES).items():
        lines += summary(name, result)
    lines += ["", *step_cost(found(["step_cost"])["step_cost"])]
    return between(README, lines)


def voco() -> str:
    """Return the page of volume contrast with its measurement made anew."""
    return between(VOCO, [line for result in found(["voco_position"]).values() for line in voco_position(result)])


def runs_of(result: dict[str, Any], method: str, dataset: str) -> list[dict[str, Any]]:
    """Return patients' scores of the runs of a method by draw; a reference stands in one of the data sets."""
    own = [row for row in result["tables"]["scores"] if row["method"] == method]
    own = [row for row in own if row["dataset"] == dataset] or own
    return sorted(own, key=lambda row: row["draw"])


def to(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Return the paired difference of two methods' runs, which may be of two sweeps."""
    if [(row["draw"], set(row["patients"])) for row in ours] != [(row["draw"], set(row["patients"])) for row in theirs]:
        sys.exit(f"{ours[0]['method']} and {theirs[0]['method']} have other draws or test patients: not to be paired")
    arrays = (
        np.array([[[row["patients"][p] for p in sorted(row["patients"])]] for row in rows]) for rows in (ours, theirs)
    )
    found = compare(*arrays).interval
    return f"{found.value:+.3f}{bounds(vars(found), '+.3f')}"


def expected() -> list[str]:
    """Return what ADELE gives beside supervised training of as many steps, of as many passes, and what clean labels give."""
    results = found({name for row in EXPECTED.values() for name in row[:2]})
    lines = [
        "| `adele` to supervised training | of as many steps | of as many passes | what clean labels give |",
        "|---|---|---|---|",
    ]
    for title, (suite, others, dataset) in EXPECTED.items():
        adele = runs_of(results[suite], "adele", dataset)
        plain, as_long, clean = (
            runs_of(results[others], method, dataset)
            for method in ("supervised", "supervised_equal_passes", "clean_labels")
        )
        lines.append(f"| {title} | {to(adele, plain)} | {to(adele, as_long)} | {to(clean, plain)} |")
    return [*lines, ""]


def between(path: Path, lines: list[str]) -> str:
    """Return a page with lines in place of what stands between its two marks."""
    text = path.read_text()
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n".join(lines) + text[text.index(END) :]


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    made = {README: readme(), PAGE: page(), VOCO: voco(), METHODS: between(METHODS, expected())}
    if not parser.parse_args().check:
        for path, text in made.items():
            path.write_text(text)
    elif stale := [path.name for path, text in made.items() if not path.exists() or path.read_text() != text]:
        sys.exit(f"{', '.join(stale)}: not made from benchmarks/results; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
