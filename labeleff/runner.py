"""From a recipe to a run directory: stages, revisions, resume, evaluation."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from labeleff import registry
from labeleff.annotators.base import Annotator
from labeleff.asking import answer_by_oracle, edits_or_questions, in_words, regions_of, still_open, weights_digest
from labeleff.batch import Progress, derive_seed
from labeleff.data.annotations import AnnotationStore
from labeleff.data.rounds import Asked, Rounds
from labeleff.diagnostics import NoiseDiagnostics
from labeleff.edits import Edit
from labeleff.errors import RecipeError, RunError, ShapeError, Waiting, one_line
from labeleff.evaluation.inference import segment
from labeleff.evaluation.probe import Labelled, Probe, course_of, flatness
from labeleff.files import write_atomically
from labeleff.folds import fold_folder, one_fold, pool_folds
from labeleff.labels import HIDDEN
from labeleff.learner import Learner, StepMeans
from labeleff.machine import cores, is_distributed
from labeleff.prepare import prepare
from labeleff.prepared import Prepared
from labeleff.process import set_up_process
from labeleff.recipe import Component, Recipe, Stage
from labeleff.report.curves import corrected_windows, draw_curves, draw_diagnostics, has_curves
from labeleff.report.pictures import png_array, png_bytes
from labeleff.results import Results, best_of, compare, keep_snapshot, load_snapshot, show, snapshot_path, validate
from labeleff.reviewing import Reviewing
from labeleff.rundir import RunDirectory
from labeleff.runlog import RunLog, console
from labeleff.signals import StopRequest, interrupted, stopping_at_once
from labeleff.strategies.base import LearningWarning, Strategy

PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def run(
    recipe: Recipe,
    folder: Path,
    *,
    fresh: bool = False,
    extend: bool = False,
    cache: Path | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """Train, evaluate and write a run directory; go on where an earlier process stopped.

    Args:
        recipe: What to run.
        folder: The run directory. One that holds the same recipe is resumed.
        fresh: Remove what an earlier run wrote and start over. The log of test-label openings stays.
        extend: Accept a recipe whose last stage has become longer, and record that.
        cache: Where prepared images are kept; default: ``labeleff/prepared`` in the user's cache folder.
        start: Directory that :func:`train` left for the first stages of this very recipe: a run that has not begun takes them
            over instead of training them. (Of a recipe without folds of its evaluation and without a baseline.)

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        RunError: The folder holds another recipe, or another process is at work in it.
        Interrupted: SIGTERM or SIGINT arrived; a checkpoint was written.
    """
    folder = Path(folder)
    if recipe.evaluation.folds and recipe.evaluation.fold is None:
        parts = [
            run(one_fold(recipe, fold), fold_folder(folder, fold), fresh=fresh, extend=extend, cache=cache)
            for fold in range(recipe.evaluation.folds)
        ]
        return pool_folds(recipe, folder, parts)
    if not recipe.baseline:
        return _run_one(recipe, folder, fresh=fresh, extend=extend, cache=cache, start=start)
    main = replace(recipe, baseline=())
    results = {
        "baseline": _run_one(
            replace(main, stages=recipe.baseline, name=f"{recipe.name}-baseline"),
            folder / "baseline",
            fresh=fresh,
            extend=extend,
            cache=cache,
        )
    }
    results[recipe.name] = _run_one(main, folder, fresh=fresh, extend=extend, cache=cache)
    return compare(recipe, folder, results)


def train(recipe: Recipe, folder: Path, *, cache: Path | None = None, start: Path | None = None) -> None:
    """Run the stages of a recipe and evaluate nothing: runs that begin with these stages can take them over.

    Args:
        recipe: Its stages are the first ones of longer recipes.
        folder: Its directory. An earlier attempt is resumed.
        cache: Where prepared images are kept.
        start: Directory of this recipe's own first stages, as in :func:`run`.
    """
    directory = RunDirectory(Path(folder))
    with directory.locked(), stopping_at_once():
        directory.claim(pinned(recipe))
        if start is not None:
            directory.take_over(start)
        Run(resolve(recipe), directory, cache).train()


def _run_one(
    recipe: Recipe, folder: Path, *, fresh: bool, extend: bool, cache: Path | None, start: Path | None = None
) -> dict[str, Any]:
    given, recipe = pinned(recipe), resolve(recipe)
    directory = RunDirectory(folder)
    if process_rank():  # other processes of a data-parallel run only read
        return Run(recipe, directory, cache).execute()
    with directory.locked(), stopping_at_once():
        if fresh:
            directory.clear()
        finished = directory.claim(given, extend=extend)  # what is written down is what was asked for
        if finished is not None:
            console().print(f"{folder}: this run is complete; --fresh starts over")
            show(recipe.name, finished)
            return finished
        if start is not None:
            directory.take_over(start)
        return Run(recipe, directory, cache).execute()


def pinned(recipe: Recipe) -> Recipe:
    """Replace what depends on the machine by what it is here: the number of threads is part of a run."""
    threads = recipe.trainer.threads or cores()
    return replace(recipe, trainer=replace(recipe.trainer, threads=threads))


def resolve(recipe: Recipe) -> Recipe:
    """Return the recipe as it is run here: threads pinned, and a stage for every part that folds leave out."""
    stages, baseline = (
        tuple(one for stage in given for one in _unfolded(stage)) for given in (recipe.stages, recipe.baseline)
    )
    return replace(pinned(recipe), stages=stages, baseline=baseline)


def _unfolded(stage: Stage) -> Iterator[Stage]:
    """Yield a stage, or one for every part that is left out: resume and logs need know nothing of parts."""
    if not stage.folds or stage.fold is not None:
        yield stage
    else:
        yield from (replace(stage, fold=fold) for fold in range(stage.folds))


def process_rank() -> int:
    """Return the number of this process of a data-parallel run; 0 is the one that writes."""
    return int(getattr(rank_zero_only, "rank", 0))


class _Edge(lightning.Callback):
    """What happens after every optimiser step of a fit: lines of metrics, checkpoints, the wish to stop."""

    def __init__(self, run: Run, learner: Learner, stop: StopRequest, last: int) -> None:
        self.run, self.learner, self.stop, self.last = run, learner, stop, last
        self.step = learner.first_step
        learner.after_optimiser_step.append(self.seen)

    def seen(self, step: int, means: StepMeans) -> None:
        every = self.run.recipe.trainer.log_every
        self.step = step
        if step % every == 0 or step == self.learner.stage.steps:
            self.run.log.step(self.learner.index, step, means.read())
        for what, words in self.learner.strategy.warned.items():
            self.run.log.warn(self.learner.index, step, what, words)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self.stop.listen()  # after Lightning has put its own handlers in place

    def on_train_batch_end(self, trainer: lightning.Trainer, *seen: Any) -> None:
        """Save where it is due or asked for; ``seen`` ends with the number of the micro-batch."""
        batch_idx: int = seen[-1]
        if (batch_idx + 1) % self.learner.accumulate:
            return
        every = self.run.recipe.trainer.checkpoint_every
        asked = self.stop.asked is not None
        if trainer.world_size > 1:
            asked = bool(trainer.strategy.reduce_boolean_decision(asked, all=False))
        if self.step < self.last and (asked or self.step % every == 0):
            self.run.save(self.learner, self.step, trainer)
        if asked:
            self.stop.asked = self.stop.asked or "a signal to another process"
            trainer.should_stop = True


class _Bar(TQDMProgressBar):
    """Lightning's bar with the stage's name and the last losses read."""

    def __init__(self, log: RunLog, title: str) -> None:
        super().__init__(refresh_rate=5)
        self.log_, self.title = log, title

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def on_train_epoch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self.title)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: Any) -> dict[str, Any]:  # noqa: ARG002
        return {name: f"{value:.3g}" for name, value in self.log_.latest.items()}


class Run:
    """One run in its directory. Everything drawn is arithmetic, so that a resumed run is the undisturbed one."""

    def __init__(self, recipe: Recipe, directory: RunDirectory, cache: Path | None) -> None:
        self.recipe, self.directory = recipe, directory
        set_up_process(recipe.trainer.threads)
        self.data: Prepared = prepare(recipe, directory.folder, cache=cache, write=not process_rank())
        self.log = RunLog(directory, recipe, write=not process_rank())
        self.backbone = self.data.backbone(derive_seed(recipe.seed, "init"))
        self.revision = 0
        self.rounds = Rounds(directory.folder)
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.images: list[dict[str, int]] = [{} for _ in recipe.stages]
        self.diagnostics = self._clean_labels() if recipe.evaluation.diagnose else None
        self.probe = self._new_probe() if recipe.evaluation.probe else None

    # -- stages ---------------------------------------------------------------------------------------------------------

    def execute(self) -> dict[str, Any]:
        """Run the stages that are left, evaluate, and return the summary."""
        strategy = self.train()
        if process_rank():
            return {}
        results = Results(self.recipe, self.directory, self.data, self.log)
        return results.finish(self.backbone, strategy, self.history, self.seconds, self.images)

    def train(self) -> Strategy:
        """Run the stages that are left, and return the strategy of the last one."""
        state, notes = self.directory.load_checkpoint()
        for note in notes:
            console().print(note)
        return self.go_on(state)

    def go_on(self, state: Mapping[str, Any] | None) -> Strategy:
        """Run the stages that are left after a checkpoint, and return the strategy of the last one."""
        first, strategy, optimiser = 0, None, None
        if state is not None:
            console().print(f"resuming {self.recipe.name} at stage {state['stage']}, step {state['step']}")
            first = state["stage"]
            self.history, self.revision, self.seconds = state["history"], state["revision"], state["seconds"]
            taken = state["images"]  # of fewer stages, where a run of the first ones was taken over
            self.images = [*taken, *self.images[len(taken) :]]
            self.data.annotations.discard_after(self.revision)
            self.log.rewind(state["stage"], state["step"])
        else:
            self.data.annotations.discard_after(0)
            self.log.rewind(0, 0)
        for index in range(first, len(self.recipe.stages)):
            strategy, optimiser = self._stage(index, strategy, optimiser, state if index == first else None)
        assert strategy is not None  # noqa: S101  a recipe has at least one stage
        return strategy

    def _stage(
        self, index: int, previous: Strategy | None, moments: Any, state: Mapping[str, Any] | None
    ) -> tuple[Strategy, Any]:
        """Run one stage from its start, or from a checkpoint inside it, and return its strategy and optimiser state."""
        stage = self.recipe.stages[index]
        strategy: Strategy = registry.made("strategy", stage.strategy)
        annotator: Annotator | None = None
        if stage.annotator is not None:
            annotator = registry.made("annotator", stage.annotator)
            last = self.data.task.ndim - 1
            if beyond := [axis for axis in (*annotator.flips, *annotator.kept) if not 0 <= axis <= last]:
                raise RecipeError(
                    f"stages.{index}.annotator: no axis {beyond[0]}; this network has the axes 0 to {last}"
                )
        handed: dict[str, Tensor] = {}
        if state is None:
            seed = derive_seed(self.recipe.seed, "init")
            self.backbone, handed, said = self.data.start(self.backbone, stage, seed)
            if said:
                self.log.say(f"stage {index}: {said}")
        else:
            self._reshape_as_before(index)
        flags = [(p, p.requires_grad) for p in self.backbone.parameters()]
        # a look at whole cases may have left it on a GPU, whose generator would draw other weights for what is made like it
        self.backbone.cpu()
        torch.manual_seed(derive_seed(self.recipe.seed, "build", index))
        strategy.build(self.backbone, self.data.task)
        optimiser = moments if stage.optimiser_state == "previous" else None
        step = 0
        if state is not None:
            self.backbone.load_state_dict(state["backbone"])
            strategy.load_state_dict(state["strategy"])
            if annotator is not None:
                annotator.load_state_dict(state["annotator"])
            optimiser, step = state["optimiser"], state["step"]
        else:
            self._hand_on(index, previous, strategy, handed)
        optimiser = self._fit_stage(index, strategy, annotator, optimiser, step, state)
        if stage.take == "val_best":
            self._take_best(index, strategy)
        for parameter, asked in flags:
            parameter.requires_grad_(asked)
        return strategy, optimiser

    def _reshape_as_before(self, index: int) -> None:
        """Give the network of a resumed stage the structure that the stages before it have left."""
        stages = self.recipe.stages[: index + 1]
        first = max((number for number, stage in enumerate(stages) if stage.start == "fresh"), default=0)
        for stage in stages[first:index]:
            earlier: Strategy = registry.made("strategy", stage.strategy)
            earlier.reshape(self.backbone, self.data.task)

    def _hand_on(self, index: int, previous: Strategy | None, strategy: Strategy, handed: Mapping[str, Tensor]) -> None:
        """Give a strategy the state of the one before, or what came with the weights that the stage starts from."""
        stage = self.recipe.stages[index]
        if strategy.said:
            self.log.say(f"stage {index}: {strategy.said}")
        if stage.fold is not None:  # the strategy of another part has seen the labels of this one
            return
        if handed or previous is not None:
            report = strategy.inherit(handed or (previous.state_dict() if previous is not None else {}))
            if report.note:
                self.log.say(f"stage {index}: {report.note}")

    def _take_best(self, index: int, strategy: Strategy) -> None:
        """Load the weights of the best validation of a stage.

        Raises:
            RecipeError: There was no validation to choose by.
        """
        best = best_of(self.history, index)
        if best is None:
            raise RecipeError(
                f"stages.{index}.take is val_best, but nothing was validated: set evaluation.every to a number of steps "
                "that the stage reaches and data.validation to a number of patients"
            )
        load_snapshot(snapshot_path(self.directory, index, best["step"]), self.backbone, strategy)

    def _fit_stage(
        self,
        index: int,
        strategy: Strategy,
        annotator: Annotator | None,
        optimiser: Any,
        step: int,
        state: Mapping[str, Any] | None,
    ) -> Any:
        """Fit segment after segment; a segment ends where labels are revised or the predictor is validated."""
        stage = self.recipe.stages[index]
        scaler = state["scaler"] if state is not None else None
        pending = state is not None and state["pending"]
        if annotator is not None and (pending or (state is None and stage.revise_at_start)):
            self._revise(index, strategy, annotator, step, (optimiser, scaler))
        for end in self._edges(stage, step):
            learner = Learner(
                self.backbone,
                strategy,
                stage,
                index=index,
                seed=self.recipe.seed,
                first_step=step,
                accumulate=self.recipe.trainer.accumulate,
                annotator=annotator,
                optimiser_state=optimiser,
                regions=self.data.task.regions,
            )
            trainer, asked = self._fit(learner, end, scaler)
            optimiser, step = _state_of(trainer.optimizers[0]), end
            self.images[index] = learner.images
            scaler = trainer.precision_plugin.state_dict() or None
            every = self.recipe.evaluation.every
            if every and end % every == 0:
                self._validate(index, end, strategy)
            if self.diagnostics is not None and (end % self.recipe.evaluation.diagnose == 0 or end == stage.steps):
                self._diagnose(index, end, strategy)
            if self.probe is not None and (end % self.recipe.evaluation.probe == 0 or end == stage.steps):
                self._look_inside(index, end)
            if annotator is not None and end in stage.revisions and not stage.folds:
                self._revise(index, strategy, annotator, end, (optimiser, scaler))
            if stage.fold is not None and end == stage.steps:
                self._end_fold(index, strategy, annotator)
            elif annotator is not None and end == stage.steps:
                self._end_curves(index, annotator)
            self.save(learner, end, trainer)
            if asked is not None:
                raise interrupted(asked, f"after step {end} of stage {index}")
        return optimiser

    def _edges(self, stage: Stage, step: int) -> Iterator[int]:
        """Yield the steps after ``step`` at which a fit must end."""
        looks = self.recipe.evaluation.diagnose if self.diagnostics is not None else 0
        revisions = stage.revise_every if stage.annotator else 0
        probes = self.recipe.evaluation.probe if self.probe is not None else 0
        periods = [p for p in (self.recipe.evaluation.every, looks, revisions, probes) if p]
        for candidate in range(step + 1, stage.steps + 1):
            if candidate == stage.steps or any(candidate % period == 0 for period in periods):
                yield candidate

    def _fit(self, learner: Learner, end: int, scaler: Any) -> tuple[lightning.Trainer, str | None]:
        """Fit from the learner's first step to ``end``; return the trainer, and the signal that came at the very end.

        Raises:
            Interrupted: The process was asked to stop; the checkpoint is written.
        """
        spec, stage = self.recipe.trainer, learner.stage
        with StopRequest() as stop, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", category=LearningWarning)  # the log says it
            logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
            edge = _Edge(self, learner, stop, end)
            title = f"stage {learner.index + 1}/{len(self.recipe.stages)} {stage.strategy.name}"
            bar: list[lightning.Callback] = [_Bar(self.log, title)] if self.log.interactive else []
            trainer = _trainer(
                accelerator=spec.accelerator,
                devices=spec.devices,
                num_nodes=spec.nodes,
                precision=PRECISION[spec.precision],
                max_steps=end - learner.first_step,
                gradient_clip_val=spec.clip or None,
                accumulate_grad_batches=spec.accumulate,
                callbacks=[edge, *bar],
                enable_progress_bar=bool(bar),
                enable_checkpointing=False,
                enable_model_summary=False,
                logger=False,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                default_root_dir=self.directory.folder,
            )
            if scaler is not None:
                trainer.precision_plugin.load_state_dict(scaler)
            began = time.perf_counter()
            loader = self.data.loader(
                learner.stage,
                learner.index,
                learner.strategy,
                first=learner.first_step,
                last=end,
                revision=self.revision,
                rank=trainer.global_rank,
                world=trainer.world_size,
            )
            trainer.fit(learner, loader)
            self.seconds += time.perf_counter() - began
        if stop.asked is not None and edge.step < end:
            raise interrupted(stop.asked, f"after step {edge.step} of stage {learner.index}")
        if edge.step != end:
            raise RunError(f"stage {learner.index} ended at step {edge.step} instead of {end}")
        return trainer, stop.asked

    # -- what happens at edges -------------------------------------------------------------------------------------------

    def save(self, learner: Learner, step: int, trainer: lightning.Trainer) -> None:
        """Write a checkpoint of everything that training depends on, on the first process."""
        if learner.annotator is not None:
            learner.annotator.gather()
        if not process_rank():
            moments = _state_of(trainer.optimizers[0]), trainer.precision_plugin.state_dict() or None
            self._checkpoint(learner.index, step, learner.strategy, learner.annotator, moments)

    def _checkpoint(
        self,
        index: int,
        step: int,
        strategy: Strategy,
        annotator: Annotator | None,
        moments: tuple[Any, Any],
        *,
        pending: bool = False,
    ) -> None:
        """Write a checkpoint; ``pending``: before a revision of labels that is still due at this step."""
        self.log.flush()
        self.directory.save_checkpoint(
            {
                "stage": index,
                "step": step,
                "revision": self.revision,
                "history": self.history,
                "seconds": self.seconds,
                "images": self.images,
                "backbone": self.backbone.state_dict(),
                "strategy": strategy.state_dict(),
                "annotator": annotator.state_dict() if annotator is not None else {},
                "optimiser": moments[0],
                "scaler": moments[1],
                "pending": pending,
            }
        )

    def _end_fold(self, index: int, strategy: Strategy, annotator: Annotator | None) -> None:
        """Keep the network of a part; after the last one the annotator sees every case by the network that never did."""
        stage = self.recipe.stages[index]
        if not process_rank():
            keep_snapshot(self.data, self.directory, self.backbone, strategy, stage=index, step=stage.steps)
        if annotator is not None and stage.fold == stage.folds - 1:
            self._revise(index, strategy, annotator, stage.steps, (None, None))

    def _validate(self, index: int, step: int, strategy: Strategy) -> None:
        """Keep a snapshot and, where there are validation cases, the mean Dice of the first predictor."""
        entry: list[Any] = [None]
        if not process_rank():
            entry[0] = validate(self.data, self.directory, self.backbone, strategy, stage=index, step=step)
            if entry[0]["dice"] is not None:
                self.log.scalar(index, step, "validation/dice", entry[0]["dice"])
        if is_distributed():
            torch.distributed.broadcast_object_list(entry)
        self.history.append(entry[0])

    def _clean_labels(self) -> NoiseDiagnostics | None:
        """Return what compares with the labels before they were made wrong; None where they were not, or are gone."""
        hidden = self.directory.folder / HIDDEN
        if not (hidden / "current").exists():
            return None
        return NoiseDiagnostics(AnnotationStore.open(hidden), self.data.annotations, self.data.task)

    def _diagnose(self, index: int, step: int, strategy: Strategy) -> None:
        """Note and draw how the wrong labels of this stage's cases are learnt, as they are before a revision here."""
        if self.diagnostics is not None and not process_rank():
            stage, spec = self.recipe.stages[index], self.recipe.evaluation
            network = next(iter(strategy.predictors(self.backbone).values()))
            viewer, left_out = self.data.viewer(network), set(self.data.held_out(stage))
            values = self.diagnostics.measure(
                [case for case in self.data.cases_of("labelled") if case not in left_out],
                lambda case: segment(viewer.probabilities(network, case)),
                revision=self.revision,
                most=spec.diagnose_cases,
            )
            self.log.diagnostics(index, step, values)
            if spec.pictures:
                png = draw_diagnostics(self.log.noted(index, "diagnostics"), self.data.task.classes)
                write_atomically(self.directory.folder / "pictures" / f"diagnostics_stage_{index}.png", png)
        if is_distributed():
            torch.distributed.barrier()

    def _new_probe(self) -> Probe | None:
        """Return what looks at features; None where no case has a label."""
        if not self.data.split.labelled:
            self.log.say("evaluation.probe: no case is labelled, so that there is nothing to look with")
            return None
        data, looks = self.recipe.data, self.recipe.evaluation
        level, layers = looks.probe_level, looks.probe_layers
        try:
            return Probe(self.backbone, self.data.task, data.patch, self.data.slice_axis, level=level, layers=layers)
        except ShapeError as error:
            raise RecipeError(f"evaluation.probe: {error} (evaluation.probe_layers)") from error

    def _look_inside(self, index: int, step: int) -> None:
        """Note and draw what the features of the backbone know of the labels of the budget."""
        if self.probe is not None and not process_rank():
            self.data.viewer(self.backbone)  # on the device of the run
            labelled = self.data.split.labelled
            values = self.probe.measure(self.backbone, map(self._probed, labelled))  # one case in memory at a time
            self.log.probe(index, step, values)
            if warning := flatness(values):
                self.log.warn(index, step, "features", warning)
            if step == self.recipe.stages[index].steps and (course := course_of(self.log.noted(index, "probe"))):
                self.log.say(f"stage {index}: {course.said}")
            if self.recipe.evaluation.pictures:
                picture = self.probe.picture(self.backbone, self._probed(labelled[0]))
                self.log.image(index, step, "probe/features", picture)
                file = self.directory.folder / "pictures" / f"probe_stage_{index}.png"
                write_atomically(file, png_bytes(picture))
        if is_distributed():
            torch.distributed.barrier()

    def _probed(self, case: str) -> Labelled:
        """Return a labelled case as it is now."""
        label = self.data.annotations.read(case, revision=self.revision)
        return Labelled(case, self.data.manifest.case(case).patient, self.data.store.read(case), label)

    def _revise(
        self, index: int, strategy: Strategy, annotator: Annotator, step: int, moments: tuple[Any, Any]
    ) -> None:
        """Let the annotator change labels; the first process applies them, the others wait and read the new revision.

        Args:
            index: The stage.
            strategy: Its predictor is what the annotator sees.
            annotator: Makes changes, or asks.
            step: Where the stage stands.
            moments: State of optimiser and scaler, for a checkpoint where people have to answer first.

        Raises:
            Waiting: They have to; the checkpoint is written.
        """
        annotator.gather()
        waits = [""]
        if not process_rank():
            if self.recipe.evaluation.rounds and index == len(self.recipe.stages) - 1:
                keep_snapshot(self.data, self.directory, self.backbone, strategy, stage=index, step=step)
            changes = self._changes(index, strategy, annotator, step)
            waits = [self._unanswered(index, changes) if isinstance(changes, Asked) else ""]
            if waits[0]:
                self._checkpoint(index, step, strategy, annotator, moments, pending=True)
            else:
                self._apply(index, step, annotator, changes)
        if is_distributed():
            torch.distributed.broadcast_object_list(waits)  # a barrier too: nobody reads before it is written
        if waits[0]:
            raise Waiting(waits[0])
        self.revision += 1

    def _progress(self, index: int, step: int) -> Progress:
        """Return where a stage stands at a revision."""
        stage = self.recipe.stages[index]
        return Progress(
            step,
            stage.steps,
            index,
            self.recipe.seed,
            round=stage.revisions.index(step) if step in stage.revisions else 0,
        )

    def _changes(self, index: int, strategy: Strategy, annotator: Annotator, step: int) -> Iterator[Edit] | Asked:
        """Return the changes that the annotator makes itself, or the round of questions it asks here.

        A round that was asked here before a restart is that round.

        Raises:
            RecipeError: It asks, and nobody is there to answer.
        """
        stage, name = self.recipe.stages[index], self._author(index)
        if (earlier := self.rounds.at(index, step)) is not None:
            return earlier
        progress = self._progress(index, step)
        torch.manual_seed(derive_seed(self.recipe.seed, "revise", index, step))
        network = next(iter(strategy.predictors(self.backbone).values()))
        reviewing = Reviewing(self.data, annotator, index, step, self.revision, self.rounds)
        seen = (
            reviewing.out_of_fold(self.directory, self.history, self.backbone, strategy)
            if stage.folds
            else reviewing.by(network, strategy)
        )
        found = edits_or_questions(annotator.revise(seen, progress), name)
        if not isinstance(found, list):
            return found
        if stage.answers == "nobody":
            raise RecipeError(
                f"stages.{index}: {name} asks for labels, but nobody is there to answer; write answers: oracle (a simulation "
                "by hidden labels of training cases) or answers: person"
            )
        regions = regions_of(found, self.data)
        component = stage.annotator or Component(name)
        asked = Asked(
            number=len(self.rounds.numbers()) + 1,
            stage=index,
            step=step,
            revision=self.revision,
            annotator={"name": component.name, **component.options},
            weights=weights_digest(network),
            regions=regions,
            noted=dict(annotator.describe(progress)),
        )
        viewer = self.data.viewer(network)
        cases = dict.fromkeys(region.case for region in regions) if stage.answers == "person" else ()
        self.rounds.ask(asked, ((case, segment(viewer.probabilities(network, case))) for case in cases))
        self.log.say(f"stage {index}, step {step}: {name} asked round {asked.number}: {in_words(asked, self.data)}")
        return asked

    def _unanswered(self, index: int, asked: Asked) -> str:
        """Let the oracle answer a round, where it is the one to; return what is said if answers are still missing."""
        if self.recipe.stages[index].answers == "oracle":
            answer_by_oracle(self.data, self.rounds, asked.number)
        self.rounds.reconcile()
        return still_open(self.rounds, asked)

    def _apply(self, index: int, step: int, annotator: Annotator, changes: Iterator[Edit] | Asked) -> None:
        """Make a new revision of the labels, and note what the annotator says of it."""
        author = self._author(index)
        edits = self.rounds.edits(changes.number) if isinstance(changes, Asked) else changes
        revision = self.data.annotations.apply(edits, step=step, stage=index, author=author)
        edited = any(change["revision"] == revision for change in self.data.annotations.history())
        did = f"made revision {revision} of the labels" if edited else "left all labels as they are"
        self.log.say(f"stage {index}, step {step}: {author} {did}")
        if annotator.said:
            self.log.say(f"stage {index}, step {step}: {author}: {annotator.said}")
        noted = changes.noted if isinstance(changes, Asked) else annotator.describe(self._progress(index, step))
        self._describe(index, step, noted)

    def _author(self, index: int) -> str:
        annotator = self.recipe.stages[index].annotator
        return annotator.name if annotator is not None else ""

    def _end_curves(self, index: int, annotator: Annotator) -> None:
        """Note and draw curves as the stage leaves them: the last revision comes before its end."""
        steps = self.recipe.stages[index].steps
        annotator.gather()
        described = annotator.describe(Progress(steps, steps, index, self.recipe.seed))
        # what is said of a revision was said then, and need not survive a restart
        if not process_rank() and has_curves(described):
            self._describe(index, steps, described)

    def _describe(self, index: int, step: int, described: Mapping[str, float | list[float | None]]) -> None:
        """Note what an annotator says; curves go into TensorBoard, and in place of those before into ``pictures/``."""
        self.log.revision(index, step, described)
        if has_curves(described) and self.recipe.evaluation.pictures:
            history = (entry for entry in self.data.annotations.history() if entry["stage"] == index)
            windows = corrected_windows(history, described, steps=self.recipe.stages[index].steps)
            png = draw_curves(described, self.data.task.classes, windows)
            write_atomically(self.directory.folder / "pictures" / f"curves_stage_{index}.png", png)
            self.log.image(index, step, "annotator/curves", png_array(png))


def _trainer(**options: Any) -> lightning.Trainer:
    """Return Lightning's trainer.

    Raises:
        RunError: This machine cannot do what ``trainer`` asks for.
    """
    try:
        return lightning.Trainer(**options)
    except (MisconfigurationException, ValueError) as error:
        raise RunError(f"trainer: this machine cannot run it as asked: {one_line(error, None)}") from error


def _state_of(optimiser: Any) -> dict[str, Any]:
    """Return the optimiser's state as plain containers of tensors and numbers."""
    state: dict[str, Any] = optimiser.state_dict()
    return state
