"""What comes out of a run: validation on the way, the final evaluation, files, tables and pictures."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from labeleff import __version__, registry
from labeleff.asking import summary as rounds_summary
from labeleff.backbones.weights import state_of
from labeleff.data.annotations import AnnotationStore
from labeleff.data.manifest import Case
from labeleff.data.provenance import HEADER
from labeleff.data.raters import reference
from labeleff.data.rounds import Rounds
from labeleff.describing import describe
from labeleff.errors import RunError
from labeleff.evaluation.evaluate import evaluate
from labeleff.evaluation.probe import course_of
from labeleff.evaluation.tables import ROUND, rich_comparison, rich_table, summarise, write_cases_csv
from labeleff.files import append_line, file_digest, write_atomically, write_json
from labeleff.labels import HIDDEN
from labeleff.predictor import FILE, processing_of
from labeleff.prepared import Prepared
from labeleff.recipe import Recipe
from labeleff.recipe_io import to_mapping
from labeleff.report.corrections import write_corrections
from labeleff.report.pictures import draw_case, draw_noise, draw_raters, overlay_grid, select_cases
from labeleff.report.words import warning_in_words
from labeleff.rundir import RunDirectory
from labeleff.runlog import RunLog, console
from labeleff.strategies.base import Strategy

ORACLE = "oracle"
"""Selection by the evaluation cases themselves. Reported on request, marked, never a result."""

DEVELOPMENT = "development"
"""Cases that are not of the test list."""

DISPUTES = 3
"""Labelled cases whose raters are drawn."""

LEDGER = "test_openings.jsonl"
"""One line whenever evaluation labels are opened: in the run directory, and beside the prepared images for all runs."""


def openings_of(ledger: Path, dataset: str, part: str) -> int:
    """Return how often the labels of a part of a data set were opened by all runs that share prepared images."""
    count = 0
    for line in ledger.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        count += (entry.get("dataset"), entry.get("evaluated_on")) == (dataset, part)
    return count


def snapshot_path(directory: RunDirectory, stage: int, step: int) -> Path:
    """Return where the weights of a validation are kept."""
    return directory.folder / "snapshots" / f"stage-{stage:02d}-step-{step:08d}.safetensors"


def _tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state_of(module).items()}


def load_snapshot(path: Path, backbone: nn.Module, strategy: Strategy) -> None:
    """Load the weights of a validation into the backbone and the strategy, in place."""
    tensors = load_file(path)
    for prefix, module in (("backbone", backbone), ("strategy", strategy)):
        module.load_state_dict(
            {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}
        )


def best_of(history: Iterable[Mapping[str, Any]], stage: int) -> Mapping[str, Any] | None:
    """Return the validation with the highest mean Dice of a stage, the earliest of equals; None without validation."""
    entries = [entry for entry in history if entry["stage"] == stage and entry["dice"] is not None]
    return max(entries, key=lambda entry: (entry["dice"], -entry["step"]), default=None)


def keep_snapshot(
    data: Prepared, directory: RunDirectory, backbone: nn.Module, strategy: Strategy, *, stage: int, step: int
) -> None:
    """Keep the weights of the backbone and the strategy as they are at a step."""
    tensors = _tensors("backbone", backbone) | _tensors("strategy", strategy)
    header = {HEADER: json.dumps(origin_of(data))}
    write_atomically(snapshot_path(directory, stage, step), save(tensors, metadata=header))


def origin_of(data: Prepared) -> dict[str, Any]:
    """Return what a file of weights says of where they come from: the run with its seeds, versions, and all cases they saw."""
    return {
        "version": __version__,
        "packages": {name: version(name) for name in ("torch", "pytorch-lightning", "monai", "numpy")},
        "recipe": to_mapping(data.recipe),
        "split": data.split.hash,
        "provenance": data.provenance.as_plain(),
    }


def validate(
    data: Prepared, directory: RunDirectory, backbone: nn.Module, strategy: Strategy, *, stage: int, step: int
) -> dict[str, Any]:
    """Keep a snapshot of the weights and return its entry: stage, step and mean validation Dice of the first predictor."""
    keep_snapshot(data, directory, backbone, strategy, stage=stage, step=step)
    cases = data.evaluation_cases("validation")
    dice = None
    if cases:
        name, network = next(iter(strategy.predictors(backbone).items()))
        rows = evaluate({name: network}, cases, data.viewer(network), data.reference, distances=False)
        dice = _mean_dice(list(rows))
    return {"stage": stage, "step": step, "dice": dice}


def write_prediction(folder: Path, case: str, prediction: NDArray[np.uint8]) -> None:
    """Keep a label map [*S] in ``predictions/<case>.npz``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, prediction=prediction)
    write_atomically(folder / "predictions" / f"{case}.npz", buffer.getvalue())


def read_prediction(folder: Path, case: str) -> NDArray[np.uint8]:
    """Return a label map that :func:`write_prediction` kept."""
    with np.load(folder / "predictions" / f"{case}.npz", allow_pickle=False) as content:
        prediction: NDArray[np.uint8] = content["prediction"]
        return prediction


@dataclass(frozen=True)
class Results:
    """The end of a run: the test labels are opened here, once per selection, and each opening is logged."""

    recipe: Recipe
    directory: RunDirectory
    data: Prepared
    log: RunLog

    def finish(
        self,
        backbone: nn.Module,
        strategy: Strategy,
        history: list[dict[str, Any]],
        seconds: float,
        images: list[dict[str, int]],
    ) -> dict[str, Any]:
        """Evaluate, write ``cases.csv``, pictures, the predictor and ``summary.json``, and return the summary."""
        last = len(self.recipe.stages) - 1
        chosen = self.recipe.stages[-1].take
        rows: list[dict[str, Any]] = []
        networks = self._predictors(backbone, strategy)
        self._save_predictor(networks)
        rows += self._measure(networks, chosen, keep=next(iter(networks)))
        self._pictures([row for row in rows if row["predictor"] == next(iter(networks))])
        self._disputes()
        self._wrong_labels()
        current = _tensors("backbone", backbone) | _tensors("strategy", strategy)
        best = best_of(history, last)
        if best is not None and chosen == "last":
            load_snapshot(snapshot_path(self.directory, last, best["step"]), backbone, strategy)
            rows += self._measure(self._predictors(backbone, strategy), "val_best")
        if self.recipe.evaluation.oracle:
            rows += self._oracle(backbone, strategy, [entry for entry in history if entry["stage"] == last])
        if self.recipe.evaluation.rounds:
            rows += self._rounds(backbone, strategy)
        for prefix, module in (("backbone", backbone), ("strategy", strategy)):
            module.load_state_dict(
                {k.removeprefix(prefix + "."): v for k, v in current.items() if k.startswith(prefix + ".")}
            )
        write_cases_csv(self.directory.folder / "cases.csv", rows)
        write_corrections(
            self.directory.folder, self.data.annotations, self.data.split.labelled, self.data.task.classes
        )
        axis = self.data.manifest.slice_axis if self.data.manifest.axes == 3 else None
        summary = {
            "name": self.recipe.name,
            "labeleff": __version__,
            **describe(self.data),
            "selection": chosen,
            "predictor": next(iter(networks)),
            "steps": [stage.steps for stage in self.recipe.stages],
            "warnings": self.log.warnings(),
            "extensions": self._extensions(),
            "validation": history,
            "probe": self._courses(),
            "rounds": rounds_summary(Rounds(self.directory.folder), axis),
            "results": summarise(rows),
            "training_seconds": round(seconds, 1),
            "images_per_step": images,
            "parameters": sum(p.numel() for p in backbone.parameters()),
            "cases_sha256": file_digest(self.directory.folder / "cases.csv"),
        }
        write_json(self.directory.summary, summary)
        self.log.close()
        show(self.recipe.name, summary)
        console().print(f"everything is in {self.directory.folder}")
        return summary

    def on_development(self, backbone: nn.Module, strategy: Strategy) -> dict[str, Any]:
        """Measure on all cases with a label that are not of the test list, and return what ``development.json`` holds.

        Rows are told apart by what a case was to the run, in place of how its weights were chosen: ``labelled`` (learnt from),
        ``validation``, ``unlabelled`` (seen without its label), and ``development`` where the recipe cut such a part.

        Raises:
            RunError: No such case has a label.
        """
        split, networks = self.data.split, self._predictors(backbone, strategy)
        parts = {"labelled": split.labelled, "validation": split.validation, "unlabelled": split.unlabelled}
        if split.evaluate_on == DEVELOPMENT:
            parts[DEVELOPMENT] = split.test
        rows: list[dict[str, Any]] = []
        for part, ids in parts.items():
            cases = [case for case in map(self.data.manifest.case, ids) if case.has_label and case.role != "test"]
            rows += self._measure(networks, part, cases=cases, evaluated_on=DEVELOPMENT)
        if not rows:
            raise RunError(f"{self.directory.folder}: no case outside the test list has a label to measure on")
        write_cases_csv(self.directory.folder / "development.csv", rows)
        notes = [
            "no test result: rows are named after what the run did with the cases; of those it learnt from, scores flatter"
        ]
        found = {"name": self.recipe.name, "results": summarise(rows), "notes": notes}
        write_json(self.directory.folder / "development.json", found)
        show(self.recipe.name, found)
        return found

    def _courses(self) -> list[dict[str, Any]]:
        """Return how features got better in the stages that a probe looked into: where they have flattened, more steps are idle."""
        looked = range(len(self.recipe.stages)) if self.recipe.evaluation.probe else ()
        found = ((index, course_of(self.log.noted(index, "probe"))) for index in looked)
        return [{"stage": index, **asdict(course)} for index, course in found if course is not None]

    def _predictors(self, backbone: nn.Module, strategy: Strategy) -> dict[str, nn.Module]:
        networks = strategy.predictors(backbone)
        return networks if self.recipe.evaluation.predictors == "all" else dict(list(networks.items())[:1])

    def _measure(
        self,
        networks: Mapping[str, nn.Module],
        selection: str,
        keep: str = "",
        *,
        cases: Sequence[Case] | None = None,
        evaluated_on: str = "",
    ) -> list[dict[str, Any]]:
        """Open the evaluation labels, or those of other cases, and measure; the opening is logged before it happens.

        The label maps of the predictor ``keep`` are written to ``predictions/``.
        """
        cases = self.data.evaluation_cases("test") if cases is None else cases
        if not cases:
            return []
        opening: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "recipe": self.recipe.name,
            "dataset": self.data.manifest.name,
            "evaluated_on": evaluated_on or self.data.split.evaluate_on,
            "split": self.data.split.hash,
            "cases": len(cases),
            "selection": selection,
        }
        ledger = self.data.store.cache / LEDGER
        append_line(ledger, opening)
        opening["so_far"] = openings_of(ledger, opening["dataset"], opening["evaluated_on"])
        append_line(self.directory.folder / LEDGER, opening)
        viewer = self.data.viewer(*networks.values())

        def seen(case: Case, name: str, prediction: NDArray[np.uint8]) -> None:
            if name == keep:
                write_prediction(self.directory.folder, case.id, prediction)

        return list(evaluate(networks, cases, viewer, self.data.reference, selection=selection, seen=seen))

    def _oracle(self, backbone: nn.Module, strategy: Strategy, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows of the snapshot that is best on the evaluation cases."""
        best: list[dict[str, Any]] = []
        for entry in entries:
            load_snapshot(snapshot_path(self.directory, entry["stage"], entry["step"]), backbone, strategy)
            networks = dict(list(strategy.predictors(backbone).items())[:1])
            rows = self._measure(networks, ORACLE)
            if not best or (_mean_dice(rows) or 0.0) > (_mean_dice(best) or 0.0):
                best = rows
        return best

    def _rounds(self, backbone: nn.Module, strategy: Strategy) -> list[dict[str, Any]]:
        """Return the rows of the first predictor as it was before every revision of the last stage."""
        last, rows = len(self.recipe.stages) - 1, []
        for number, step in enumerate(self.recipe.stages[-1].revisions):
            load_snapshot(snapshot_path(self.directory, last, step), backbone, strategy)
            rows += self._measure(dict(list(strategy.predictors(backbone).items())[:1]), f"{ROUND}{number}")
        return rows

    def _save_predictor(self, networks: Mapping[str, nn.Module]) -> None:
        """Write the weights that are handed on, with one header entry (several would come in an order of chance)."""
        name, network = next(iter(networks.items()))
        header = {
            **origin_of(self.data),
            "predictor": name,
            "classes": list(self.data.task.classes),
            "processing": processing_of(self.data).as_plain(),
        }
        content = save(state_of(network), metadata={HEADER: json.dumps(header)})
        write_atomically(self.directory.folder / FILE, content)

    def _pictures(self, rows: list[dict[str, Any]]) -> None:
        """Draw the best, the median and the worst case of the first predictor."""
        if not self.recipe.evaluation.pictures:
            return
        axis = self.data.manifest.slice_axis
        for rank, case_id in select_cases(rows).items():
            case = self.data.manifest.case(case_id)
            image, reference = self.data.dataset.read_image(case)[0].astype(np.float32), self.data.reference(case)
            prediction = read_prediction(self.directory.folder, case_id)
            draw_case(
                self.directory.folder / "pictures" / f"{rank}-{case_id}.png",
                image,
                reference,
                {self.recipe.name: prediction},
                title=f"{rank} case: {case_id}",
                classes=self.data.task.classes,
                slice_axis=axis,
                exclusive=self.data.task.exclusive,
            )
            step = self.recipe.stages[-1].steps
            grid = overlay_grid(image, [reference, prediction], slice_axis=axis, exclusive=self.data.task.exclusive)
            self.log.image(len(self.recipe.stages) - 1, step, f"test/{rank}", grid)

    def _disputes(self) -> None:
        """Draw the labelled cases about which the raters differ most, in a folder of their own: they are no test cases."""
        if not self.recipe.evaluation.pictures or self.data.raters is None:
            return
        ranked = sorted(self.data.raters["cases"], key=lambda row: (-row["disputed"], row["case"]))
        for row in [row for row in ranked if row["disputed"]][:DISPUTES]:
            draw_raters(
                self.directory.folder / "pictures" / "raters" / f"{row['case']}.png",
                self.data.store.read(row["case"])[0],
                self.data.votes(row["case"]),
                title=f"{row['case']}: {row['raters']} raters, disputed {row['disputed']:.2f}",
                classes=self.data.task.classes,
                slice_axis=self.data.manifest.slice_axis,
            )

    def _wrong_labels(self) -> None:
        """Draw what label noise did to the labelled cases it changed least, most and in between."""
        path, hidden = self.directory.folder / "noise.json", self.directory.folder / HIDDEN
        if not self.recipe.evaluation.pictures or not path.exists() or not (hidden / "current").exists():
            return
        clean = AnnotationStore.open(hidden)
        images, given = self.data.store, self.data.annotations
        draw_noise(
            self.directory.folder / "pictures" / "noise",
            [row for row in json.loads(path.read_text())["rows"] if row["dice"] is not None],
            lambda case: (images.read(case)[0], clean.read(case, revision=0), given.read_given(case)),
            called="given",
            among="the labelled cases",
            classes=self.data.task.classes,
            slice_axis=self.data.manifest.slice_axis,
        )

    def _extensions(self) -> list[dict[str, Any]]:
        path = self.directory.folder / "extensions.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(name: str, summary: Mapping[str, Any]) -> None:
    """Print the table of a finished run."""
    if not summary["results"]:
        console().print(f"{name}: trained, and not evaluated")
        return
    console().print(rich_table(name, summary["results"]))
    console().print("95 %: bootstrap over test patients, for this training run only; missed and spurious: cases")
    for note in summary["notes"]:
        console().print(f"note: {note}")
    for one in summary.get("warnings", ()):
        console().print(f"warning: {warning_in_words(one)}")


def compare(recipe: Recipe, folder: Path, summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Print a run beside its baseline, and write ``comparison.json`` and pictures of both on the cases that were drawn.

    Args:
        recipe: The run.
        folder: Its directory; the baseline's is ``baseline`` below it.
        summaries: The baseline's and the run's own.
    """
    value = {"runs": {name: dict(summary) for name, summary in summaries.items()}}
    console().print(rich_comparison({name: summary["results"] for name, summary in summaries.items()}))
    console().print("one training run each: no ranking can be read from this")
    write_json(folder / "comparison.json", value)
    if recipe.evaluation.pictures:
        dataset = registry.made("dataset", recipe.data.dataset)
        manifest = dataset.manifest()
        for drawn in sorted((folder / "pictures").glob("*-*.png")):
            rank, _, name = drawn.stem.partition("-")
            case = manifest.case(name)
            draw_case(
                folder / "comparison" / drawn.name,
                dataset.read_image(case)[0].astype(np.float32),
                reference(dataset, case, recipe.data.raters),
                {"baseline": read_prediction(folder / "baseline", name), recipe.name: read_prediction(folder, name)},
                title=f"{rank} case of {recipe.name}: {name}",
                classes=manifest.classes,
                slice_axis=manifest.slice_axis,
                exclusive=not manifest.overlapping,
            )
        console().print(f"pictures of both: {folder / 'comparison'}")
    return value


def _mean_dice(rows: list[dict[str, Any]]) -> float | None:
    """Return the mean over classes of the mean over cases; None where nothing could be measured."""
    by_class: dict[str, list[float]] = {}
    for row in rows:
        if not np.isnan(row["dice"]):
            by_class.setdefault(row["class"], []).append(row["dice"])
    return float(np.mean([np.mean(values) for values in by_class.values()])) if by_class else None
