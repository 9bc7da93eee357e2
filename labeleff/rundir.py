"""The run directory: what is written while training, atomically, and how much of it still counts on resume.

recipe.yaml  environment.json  split.json  audit.json       what the run is
raters.json                                                 how far several raters of the labelled cases agree
priors.json                                                 expected sizes of organs in unlabelled cases
starts.json                                                 files that stages start from, and what these have learnt from
metrics.jsonl  tensorboard/                                 what was seen on the way
annotations/                                                labels and their revisions
rounds/  ledger.jsonl  bundles/                             what people or an oracle were asked, and answered
hidden/  noise.json                                         where labels were made wrong: the clean ones, and how wrong
checkpoints/stage-S-step-N.ckpt (+ .sha256)                 where to go on from
predictor.safetensors  cases.csv  pictures/  summary.json   what came out
development.csv  development.json                           the same on cases that are not tests, where that was asked for
test_openings.jsonl                                         every time test labels were opened
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import pickle  # for the name of an error only; nothing is unpickled
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from labeleff import __version__
from labeleff.data.rounds import Rounds
from labeleff.errors import RunError
from labeleff.files import append_line, write_atomically, write_json
from labeleff.recipe import Recipe
from labeleff.recipe_io import diff, load_recipe, to_yaml

CHECKPOINT_FORMAT = 2
KEPT_CHECKPOINTS = 2


NOT_TAKEN_OVER = ("recipe.yaml", "environment.json", "priors.json", "starts.json", ".lock")
"""What a run has of its own where it starts from another one's stages."""
TAKEN_OF_OTHER_LABELS = ("checkpoints", "metrics.jsonl", "tensorboard")
"""What a run takes over from stages that saw no label, trained beside other labelled patients."""


def checkpoint_file(folder: Path, stage: int, step: int) -> Path:
    """Return where the checkpoint of a step is kept."""
    return folder / "checkpoints" / f"stage-{stage:02d}-step-{step:08d}.ckpt"


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe of a run directory.

    Raises:
        RunError: There is no run there.
        RecipeError: Its recipe is damaged.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise RunError(f"{folder}: there is no run here (no recipe.yaml); give the folder of one")
    return load_recipe(path)


def has_begun(folder: Path) -> bool:
    """Return whether a run directory holds a checkpoint to go on from."""
    return any((folder / "checkpoints").glob("*.ckpt"))


def is_trained(recipe: Recipe, state: Mapping[str, Any] | None) -> bool:
    """Return whether no step of a resolved recipe is left after a checkpoint (None: there is none)."""
    stage = state["stage"] if state is not None else -1
    done = state is None or (state["step"] == recipe.stages[stage].steps and not state["pending"])
    return done and not any(later.steps for later in recipe.stages[stage + 1 :])


def ended(folder: Path, recipe: Recipe) -> bool:
    """Return whether a run directory holds the checkpoint of the last step of a recipe."""
    return checkpoint_file(folder, len(recipe.stages) - 1, recipe.stages[-1].steps).exists()


class RunDirectory:
    """A folder that one run owns.

    Args:
        folder: Made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.metrics = folder / "metrics.jsonl"
        self.summary = folder / "summary.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            RunError: Another process is at work in it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{self.folder}: cannot be a run directory ({error.strerror}); give another --folder"
            ) from error
        with (self.folder / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(
                    f"{self.folder}: another process is running in this folder; give another --folder"
                ) from error
            yield

    def claim(self, recipe: Recipe, *, extend: bool = False) -> dict[str, Any] | None:
        """Take the folder for a recipe, and return the summary where this very recipe has already run to its end.

        Args:
            recipe: The resolved recipe.
            extend: Accept that the last stage has become longer; the change is noted in ``extensions.jsonl``.

        Raises:
            RunError: The folder holds another recipe; the message shows the difference.
        """
        path = self.folder / "recipe.yaml"
        if path.exists():
            earlier = load_recipe(path)
            changes = diff(earlier, recipe)
            if changes and extend and _only_longer(earlier, recipe):
                old, new = earlier.stages[-1].steps, recipe.stages[-1].steps
                append_line(self.folder / "extensions.jsonl", {"stage": len(recipe.stages) - 1, "from": old, "to": new})
                self.summary.unlink(missing_ok=True)
            elif changes:
                hint = "only a longer last stage can be added with --extend" if extend else "start over with --fresh"
                raise RunError(
                    f"{self.folder}: this folder holds a run of another recipe; give another --folder, or {hint}. "
                    "The difference:\n  " + "\n  ".join(changes)
                )
            elif self.summary.exists():
                finished: dict[str, Any] = json.loads(self.summary.read_text())
                return finished
        elif self.checkpoints.exists():
            raise RunError(f"{self.folder}: there are checkpoints but no recipe.yaml; start over with --fresh")
        write_atomically(path, to_yaml(recipe))
        write_json(self.folder / "environment.json", environment())
        return None

    def save_checkpoint(self, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and its digest, then drop all but the last two. A crash leaves the one before whole."""
        buffer = io.BytesIO()
        torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
        content = buffer.getvalue()
        path = checkpoint_file(self.folder, state["stage"], state["step"])
        write_atomically(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest())
        write_atomically(path, content)
        for old in self._checkpoint_files()[:-KEPT_CHECKPOINTS]:
            old.unlink(missing_ok=True)
            old.with_suffix(".sha256").unlink(missing_ok=True)
        return path

    def load_checkpoint(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the newest whole checkpoint, or None, and one line for each torn one that was passed over."""
        notes: list[str] = []
        for path in reversed(self._checkpoint_files()):
            try:
                content = path.read_bytes()
                digest = path.with_suffix(".sha256").read_text()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise ValueError("its digest does not match")
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                if state["format"] != CHECKPOINT_FORMAT:
                    raise RunError(
                        f"{path}: written by another version of labeleff (format {state['format']}); use --fresh"
                    )
            except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                notes.append(f"checkpoint {path.name} is damaged ({reason}); going on from the one before")
                path.unlink(missing_ok=True)
                continue
            return state, notes
        return None, notes

    def _checkpoint_files(self) -> list[Path]:
        return sorted(self.checkpoints.glob("stage-*-step-*.ckpt"))

    def take_over(self, start: Path) -> None:
        """Copy what a run of this one's first stages left, as if they had been trained here; nothing once this run has begun.

        Checkpoints come last: whoever is killed before has not begun, and starts again.
        """
        if has_begun(self.folder):
            return
        own, other = (load_recipe(folder / "recipe.yaml").data for folder in (self.folder, start))
        same = (own.labelled, own.draw) == (other.labelled, other.draw)
        for path in sorted(start.iterdir(), key=lambda path: path.name == self.checkpoints.name):
            if path.name in NOT_TAKEN_OVER or not (same or path.name in TAKEN_OF_OTHER_LABELS):
                continue
            if path.is_dir():
                shutil.copytree(path, self.folder / path.name, dirs_exist_ok=True)
            else:
                write_atomically(self.folder / path.name, path.read_bytes())

    def cut_metrics(self, stage: int, step: int) -> None:
        """Drop lines of metrics.jsonl after a step, and a torn last line."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if (row["stage"], row["step"]) <= (stage, step):
                kept.append(line)
        write_atomically(self.metrics, "".join(line + "\n" for line in kept))

    def clear(self) -> None:
        """Remove what a run wrote (``--fresh``), but not the log of test openings, the baseline, or anybody's other files."""
        self._keep_answers()
        owned = re.compile(
            r"recipe\.yaml|environment\.json|split\.json|audit\.json|raters\.json|priors\.json|starts\.json|metrics\.jsonl|tensorboard|annotations|checkpoints"
            r"|rounds|ledger\.jsonl|bundles|hidden|noise\.json|snapshots|predictor\.safetensors|cases\.csv|corrections\.csv|development\.(csv|json)|predictions|pictures|summary\.json|extensions\.jsonl|comparison(\.json)?"
        )
        for path in self.folder.iterdir():
            if owned.fullmatch(path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _keep_answers(self) -> None:
        """Refuse to remove what people have labelled.

        Raises:
            RunError: Somebody has.
        """
        rounds = Rounds(self.folder)
        given = [len(a.regions) for n in rounds.numbers() for a in rounds.answers(n) if a.author == "person"]
        if given:
            raise RunError(
                f"{self.folder}: people have labelled {sum(given)} regions of this run, which --fresh would remove; give "
                f"another --folder, or move {rounds.folder} away yourself"
            )


def _only_longer(earlier: Recipe, later: Recipe) -> bool:
    """Return whether nothing but the last stage's length differs, and that upwards."""
    if len(earlier.stages) != len(later.stages) or later.stages[-1].steps <= earlier.stages[-1].steps:
        return False
    if later.stages[-1].folds:  # the networks of the parts before the last one are done
        return False
    last = replace(earlier.stages[-1], steps=later.stages[-1].steps)
    return not diff(replace(earlier, stages=(*earlier.stages[:-1], last)), later)


def environment() -> dict[str, Any]:
    """Return versions and hardware: what a reader of the result needs to judge it, and nothing about the person."""
    packages = (
        "torch",
        "pytorch-lightning",
        "monai",
        "kornia",
        "numpy",
        "scipy",
        "scikit-learn",
        "omegaconf",
    )
    return {
        "python": platform.python_version(),
        "packages": {"labeleff": __version__} | {name: metadata.version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "byte_order": sys.byteorder,
    }


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
