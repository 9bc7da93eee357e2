"""The run directory, what may and may not reach training, and data-parallel runs."""

import csv
import json
import pathlib
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from labeleff import __version__, registry
from labeleff.batch import IGNORE, StepOutput
from labeleff.data.formats.phantom import Phantom
from labeleff.errors import RecipeError, RunError, StoreError
from labeleff.evaluating import evaluate
from labeleff.plugins import load_plugins
from labeleff.predict import predict
from labeleff.prepare import prepare
from labeleff.prepared import Prepared
from labeleff.recipe_io import load_recipe
from labeleff.rundir import environment
from labeleff.runner import run
from labeleff.strategies.base import Strategy

from .conftest import command_line, tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("run")
    values = tiny(evaluation={"every": 3, "oracle": True}, data=tiny()["data"] | {"labelled": 3, "validation": 1})
    return load_recipe(values), folder, run(load_recipe(values), folder, cache=cache)


def test_everything_is_in_the_run_directory(finished):
    recipe, folder, summary = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "recipe.yaml", "environment.json", "split.json", "audit.json", "metrics.jsonl", "cases.csv", "tensorboard",
        "checkpoints", "predictor.safetensors", "pictures", "predictions", "summary.json", "test_openings.jsonl", "annotations",
    }  # fmt: skip
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert summary == json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in lines] == [(s, t) for s in (0, 1) for t in range(1, 7)]
    assert all(np.isfinite(row["lr"]) for row in lines)
    versions = json.loads((folder / "environment.json").read_text())["packages"]
    assert versions["torch"].startswith(torch.__version__.split("+")[0])


def test_the_version_is_that_of_the_code_that_ran(monkeypatch):
    """What an editable install says of itself is as old as the install."""
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0")
    packages = environment()["packages"]
    assert packages["labeleff"] == __version__
    assert packages["torch"] == "0.0"


def test_what_a_strategy_warns_of_is_kept_once_however_often_the_run_stops(tmp_path, cache, own_registry, capsys):
    crashes = [RuntimeError("gone")]

    @registry.register("strategy", "worried")
    class Worried(Strategy):
        """L = CE, with a bad feeling."""

        def step(self, backbone, batch, progress):
            if progress.step == 4 and crashes:
                raise crashes.pop()
            for what in ["loss"] if progress.step < 5 else ["loss", "end"]:
                if progress.step >= 2:
                    self.warn(what, f"{what} is bad", progress)
            logits = backbone(batch["labelled"].image)
            return StepOutput({"ce": cross_entropy(logits, batch["labelled"].label, ignore_index=IGNORE)}, {})

    recipe = load_recipe(tiny(stages=[{"strategy": "worried", "steps": 6}] * 2))
    with pytest.raises(RuntimeError, match="gone"):  # between the checkpoint at step 4 and the next
        run(recipe, tmp_path, cache=cache)
    summary = run(recipe, tmp_path, cache=cache)
    assert summary["warnings"] == [
        {"stage": stage, "step": step, "words": words}
        for stage in (0, 1)
        for step, words in ((3, "loss is bad"), (6, "end is bad"))
    ]
    said = capsys.readouterr().out
    assert said.count("stage 0, step 3: loss is bad") == 2  # as it happens, and at the end
    assert "warning: stage 1, step 6: end is bad" in said


def test_cases_and_summary_agree(finished):
    _, folder, summary = finished
    with (folder / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["selection"] for row in rows} == {"last", "val_best", "oracle"}
    assert {row["predictor"] for row in rows} == {"student", "teacher"}
    own = [
        float(r["dice"]) for r in rows if (r["predictor"], r["selection"], r["class"]) == ("student", "last", "large")
    ]
    entry = next(
        r for r in summary["results"] if (r["predictor"], r["selection"], r["class"]) == ("student", "last", "large")
    )
    assert entry["dice"] == pytest.approx(np.nanmean(own), abs=1e-6)
    assert entry["cases"] == 6


def test_test_labels_are_opened_at_the_end_and_counted(finished):
    _, folder, summary = finished
    openings = [json.loads(line) for line in (folder / "test_openings.jsonl").read_text().splitlines()]
    assert [o["selection"] for o in openings] == ["last", "val_best", *["oracle"] * 2]
    assert all(o["cases"] == 6 and o["split"] == summary["split"] for o in openings)


def test_predictor_travels_with_what_it_needs(finished):
    _, folder, summary = finished
    with safe_open(folder / "predictor.safetensors", "pt") as file:
        header = json.loads(file.metadata()["labeleff"])
    assert header["classes"] == ["background", "large", "paired", "small"]
    assert header["split"] == summary["split"]
    assert load_recipe(header["recipe"]).name == "tiny"


def test_prediction_of_a_file_is_that_of_evaluation(finished, tmp_path):
    recipe, folder, _ = finished
    dataset = registry.build("dataset", recipe.data.dataset.name, **recipe.data.dataset.options)
    kept = sorted((folder / "predictions").glob("*.npz"))[0]
    case = dataset.manifest().case(kept.stem)
    Image.fromarray(dataset.read_image(case)[0].astype(np.float32)).save(tmp_path / "image.tif")
    predict([folder], tmp_path / "image.tif", tmp_path / "label.png")
    with np.load(kept) as content:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "label.png")), content["prediction"])
        assert len(np.unique(content["prediction"])) > 1


def test_pictures_can_be_opened(finished):
    _, folder, _ = finished
    pictures = sorted((folder / "pictures").glob("*.png"))
    assert [p.name.split("-")[0] for p in pictures] == ["best", "median", "worst"]
    assert Image.open(pictures[0]).size[0] > 300


def test_tensorboard_holds_losses_rates_validation_and_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished[1] / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"train/mixed", "train/inward", "train/lr", "validation/dice"} <= set(tags["scalars"])
    assert {"test/best", "test/median", "test/worst"} <= set(tags["images"])
    assert [event.step for event in board.Scalars("train/lr")] == list(range(1, 13))


def test_running_again_returns_what_is_there(finished, cache):
    recipe, folder, summary = finished
    before = (folder / "summary.json").stat().st_mtime_ns
    assert run(recipe, folder, cache=cache) == summary
    assert (folder / "summary.json").stat().st_mtime_ns == before


def digests(folder):
    kept = ("*.csv", "*.json", "*.safetensors", "predictions/*", "annotations/**/*")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in kept
        for path in sorted(folder.glob(pattern))
        if path.is_file() and path.name != "environment.json"
    }


def test_evaluating_again_gives_every_bit_and_logs_the_opening(finished, tmp_path, cache):
    _, folder, summary = finished
    shutil.copytree(folder, tmp_path / "run")
    for lost in ("summary.json", "cases.csv", "predictions", "predictor.safetensors"):  # stopped while it was evaluated
        found = tmp_path / "run" / lost
        shutil.rmtree(found) if found.is_dir() else found.unlink()
    assert evaluate(tmp_path / "run", cache=cache) == summary
    assert digests(tmp_path / "run") == digests(folder)
    assert len(digests(folder)) > 15
    lines = (tmp_path / "run" / "test_openings.jsonl").read_text().splitlines()
    assert [json.loads(line)["selection"] for line in lines] == ["last", "val_best", *["oracle"] * 2] * 2
    assert json.loads(lines[-1])["so_far"] > json.loads(lines[3])["so_far"]


def test_evaluating_on_cases_that_are_no_tests_opens_no_test_label(finished, tmp_path, cache, monkeypatch):
    recipe, folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    before, opened, plain = digests(tmp_path / "run"), set(), Phantom.read_label
    monkeypatch.setattr(Phantom, "read_label", lambda self, case: opened.add(case.id) or plain(self, case))
    found = evaluate(tmp_path / "run", on="development", cache=cache)
    monkeypatch.undo()
    split = json.loads((folder / "split.json").read_text())
    parts = {part: set(split[part]) for part in ("labelled", "validation", "unlabelled")}
    assert opened == set.union(*parts.values())
    with (tmp_path / "run" / "development.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["selection"]: {r["case"] for r in rows if r["selection"] == row["selection"]} for row in rows} == parts
    assert {entry["selection"] for entry in found["results"]} == set(parts)
    after = digests(tmp_path / "run")
    assert after.keys() - before.keys() == {"development.csv", "development.json"}
    assert {name: after[name] for name in before} == before
    line = json.loads((tmp_path / "run" / "test_openings.jsonl").read_text().splitlines()[-1])
    assert (line["evaluated_on"], line["selection"], line["cases"]) == ("development", "unlabelled", 10)
    # one score by hand
    dataset = registry.build("dataset", recipe.data.dataset.name, **recipe.data.dataset.options)
    row = next(r for r in rows if (r["selection"], r["predictor"], r["class"]) == ("labelled", "student", "large"))
    case = dataset.manifest().case(row["case"])
    Image.fromarray(dataset.read_image(case)[0].astype(np.float32)).save(tmp_path / "image.tif")
    predict([folder], tmp_path / "image.tif", tmp_path / "label.png")
    said, true = np.asarray(Image.open(tmp_path / "label.png")) == 1, dataset.read_label(case) == 1
    assert float(row["dice"]) == pytest.approx(2 * (said & true).sum() / (said.sum() + true.sum()), abs=1e-6)


def test_what_cannot_be_evaluated_is_refused_in_one_line(finished, tmp_path, cache):
    _, folder, _ = finished
    with pytest.raises(RunError, match=r"no run here \(no recipe\.yaml\)"):
        evaluate(tmp_path, cache=cache)
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "stage-01-step-00000006.ckpt").unlink()
    with pytest.raises(RunError, match="its last checkpoint is gone"):
        evaluate(tmp_path / "run", cache=cache)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(RunError, match=r"not finished \(stage 1 of 0 … 1, step 4 of 6\); labeleff run goes on with it"):
        evaluate(tmp_path / "run", cache=cache)


def test_a_changed_recipe_is_refused_with_the_difference(finished, cache):
    recipe, folder, _ = finished
    with pytest.raises(RunError, match=r"another recipe(.|\n)*seed: 0 -> 1"):
        run(replace(recipe, seed=1), folder, cache=cache)


def test_fresh_starts_over_but_keeps_the_log_of_openings(tmp_path, cache):
    recipe = load_recipe(tiny(stages=[{"strategy": "supervised", "steps": 2}]))
    run(recipe, tmp_path, cache=cache)
    (tmp_path / "notes.txt").write_text("mine")
    run(replace(recipe, seed=1), tmp_path, fresh=True, cache=cache)
    assert len((tmp_path / "test_openings.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "notes.txt").exists()


def test_extend_lengthens_the_last_stage_and_records_it(tmp_path, cache):
    short, long = (load_recipe(tiny(stages=[{"strategy": "supervised", "steps": n}])) for n in (3, 5))
    run(short, tmp_path, cache=cache)
    with pytest.raises(RunError, match=r"stages\.0\.steps: 3 -> 5"):
        run(long, tmp_path, cache=cache)
    summary = run(long, tmp_path, extend=True, cache=cache)
    assert summary["extensions"] == [{"stage": 0, "from": 3, "to": 5}]
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5]
    with pytest.raises(RunError, match="only a longer last stage"):
        run(short, tmp_path, extend=True, cache=cache)


def test_one_process_per_folder(tmp_path, cache):
    from labeleff.rundir import RunDirectory

    with RunDirectory(tmp_path).locked(), pytest.raises(RunError, match="another process is running"):
        run(load_recipe(tiny()), tmp_path, cache=cache)


# -- who sees which labels ----------------------------------------------------------------------------------------------


def test_labels_outside_the_budget_are_out_of_reach(tmp_path, cache):
    data = prepare(load_recipe(tiny()), tmp_path, cache=cache)
    hidden, tested = data.split.unlabelled[0], data.split.test[0]
    assert set(np.unique(data.annotations.read(hidden, revision=0))) == {255}
    with pytest.raises(StoreError, match="out of reach"):
        data.annotations.read(tested, revision=0)
    assert not [name for name in dir(data.store) if "label" in name]
    files = {path.name.split(".")[0] for path in (tmp_path / "annotations" / "labels").iterdir()}
    assert files == set(data.split.labelled)


def test_hidden_and_test_labels_of_noise_change_no_weight(tmp_path, cache, monkeypatch):
    recipe = load_recipe(tiny())
    run(recipe, tmp_path / "true", cache=cache)
    split = json.loads((tmp_path / "true" / "split.json").read_text())
    plain, opened = Phantom.read_label, []

    def read_label(self, case):
        opened.append(case.id)
        label = plain(self, case)
        if case.id not in split["labelled"]:
            label = np.random.default_rng(0).integers(0, 4, label.shape).astype(np.uint8)
        return label

    monkeypatch.setattr(Phantom, "read_label", read_label)
    run(recipe, tmp_path / "noise", cache=cache)
    assert set(opened) == {*split["labelled"], *split["test"]}
    one, two = (load_file(tmp_path / name / "predictor.safetensors") for name in ("true", "noise"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "true" / "cases.csv").read_text() != (tmp_path / "noise" / "cases.csv").read_text()


# -- stages -------------------------------------------------------------------------------------------------------------


def test_a_stage_of_no_steps_hands_on_what_it_was_given(tmp_path, cache):
    one = {"strategy": "supervised", "steps": 3}
    run(load_recipe(tiny(stages=[one])), tmp_path / "a", cache=cache)
    run(load_recipe(tiny(stages=[one, {"strategy": "mean_teacher", "steps": 0}])), tmp_path / "b", cache=cache)
    first, second = (load_file(tmp_path / name / "predictor.safetensors") for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_stage_can_start_from_a_file_or_afresh(tmp_path, cache):
    run(load_recipe(tiny(stages=[{"strategy": "supervised", "steps": 2}])), tmp_path / "a", cache=cache)
    weights = tmp_path / "a" / "predictor.safetensors"
    zero = {"strategy": "supervised", "steps": 0}
    run(load_recipe(tiny(stages=[zero | {"start": str(weights)}])), tmp_path / "b", cache=cache)
    run(load_recipe(tiny(stages=[zero])), tmp_path / "c", cache=cache)
    run(
        load_recipe(tiny(stages=[{"strategy": "supervised", "steps": 2}, zero | {"start": "fresh"}])),
        tmp_path / "d",
        cache=cache,
    )
    a, b, c, d = (load_file(tmp_path / name / "predictor.safetensors") for name in "abcd")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(torch.equal(c[key], d[key]) for key in c)
    assert any(not torch.equal(a[key], c[key]) for key in a)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not weights")
    with pytest.raises(RunError, match="these weights cannot be read"):
        run(load_recipe(tiny(stages=[zero | {"start": str(bad)}])), tmp_path / "e", cache=cache)
    part = {f"module.{key}": value for key, value in a.items() if not key.startswith("model.2.")}
    torch.save({"state_dict": part}, tmp_path / "part.pt")
    half = zero | {"start": str(tmp_path / "part.pt")}
    with pytest.raises(RunError, match=r"part\.pt: these weights do not load into unet: only \d+\.\d%.* at least 100%"):
        run(load_recipe(tiny(stages=[half])), tmp_path / "f", cache=cache)
    run(load_recipe(tiny(stages=[half | {"start_share": 0.5}])), tmp_path / "g", cache=cache)
    g = load_file(tmp_path / "g" / "predictor.safetensors")
    assert all(torch.equal(g[key], (c if key.startswith("model.2.") else a)[key]) for key in g)


def test_val_best_is_the_best_validation(finished, tmp_path, cache):
    values = tiny(evaluation={"every": 2, "pictures": False}, data=tiny()["data"] | {"labelled": 3, "validation": 1})
    values["stages"] = [{"strategy": "supervised", "steps": 6, "take": "val_best", "optimiser": {"lr": 0.05}}]
    summary = run(load_recipe(values), tmp_path, cache=cache)
    assert [entry["step"] for entry in summary["validation"]] == [2, 4, 6]
    assert summary["selection"] == "val_best"
    values["evaluation"] = {"every": 0}
    with pytest.raises(RecipeError, match="nothing was validated"):
        run(load_recipe(values), tmp_path / "none", cache=cache)


def test_pseudo_labels_change_what_the_next_steps_learn_from(tmp_path, cache):
    stage = {"strategy": "supervised", "steps": 4, "annotator": "pseudo_labels", "revise_every": 2,
             "streams": {"labelled": {"role": "all"}}}  # fmt: skip
    run(load_recipe(tiny(stages=[stage])), tmp_path, cache=cache)
    from labeleff.data.annotations import AnnotationStore

    store = AnnotationStore.open(tmp_path / "annotations")
    split = json.loads((tmp_path / "split.json").read_text())
    assert store.revision == 1
    store.verify()
    assert {change["case"] for change in store.history()} == set(split["unlabelled"])
    for case in split["labelled"]:
        assert not store.edited(case, 1)
    assert 255 not in store.read(split["unlabelled"][0], revision=1)


def test_wrong_streams_are_named(tmp_path, cache):
    stage = {"strategy": "supervised", "steps": 1, "streams": {"labeled": {"batch": 2}}}
    with pytest.raises(RecipeError, match=r"no stream 'labeled'\. Did you mean 'labelled'"):
        run(load_recipe(tiny(stages=[stage])), tmp_path, cache=cache)


def test_baseline_is_run_beside(tmp_path, cache):
    values = tiny(stages=[{"strategy": "bcp", "steps": 2}], baseline=[{"strategy": "supervised", "steps": 2}])
    values["evaluation"] = {"pictures": True}
    compared = run(load_recipe(values), tmp_path, fresh=True, cache=cache)
    assert len(list((tmp_path / "comparison").glob("*.png"))) == 3
    assert set(compared["runs"]) == {"baseline", "tiny"}
    assert evaluate(tmp_path, cache=cache) == compared
    one, two = (json.loads((tmp_path / f / "split.json").read_text())["hash"] for f in ("", "baseline"))
    assert one == two


def test_custom_strategy_in_a_script(tmp_path, cache):
    from labeleff.batch import StepOutput
    from labeleff.functional.losses import segmentation_loss
    from labeleff.strategies.base import Strategy

    @registry.register("strategy", "squared_logits")
    class SquaredLogits(Strategy):
        """A supervised loss and a small penalty.

        Args:
            penalty: Weight of the penalty.
        """

        def __init__(self, *, penalty: float = 0.1) -> None:
            super().__init__()
            self.penalty = penalty

        def step(self, backbone, batch, progress):
            logits = backbone(batch["labelled"].image)
            loss = segmentation_loss(logits, batch["labelled"].label)
            return StepOutput({"supervised": loss, "penalty": self.penalty * logits.square().mean()})

    try:
        summary = run(load_recipe(tiny(stages=[{"strategy": "squared_logits", "steps": 2}])), tmp_path, cache=cache)
    finally:
        registry._registered["strategy"].pop("squared_logits")
    assert summary["steps"] == [2]


def test_mixed_precision_runs_and_what_the_machine_cannot_do_is_one_line(tmp_path, cache):
    values = tiny(stages=[{"strategy": "bcp", "steps": 2, "batch": 4}])
    values["trainer"] |= {"precision": "bf16", "clip": 1.0}
    assert run(load_recipe(values), tmp_path / "bf16", cache=cache)["steps"] == [2]
    values["trainer"] |= {"accelerator": "gpu"}
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="this machine cannot run it as asked"):
            run(load_recipe(values), tmp_path / "gpu", cache=cache)


def test_any_module_can_be_a_backbone(tmp_path, cache):
    from labeleff.testing import ToyNet

    @registry.register("backbone", "toy")
    def toy(task, *, width: int = 6):
        return ToyNet(task, width)

    try:
        run(load_recipe(tiny(backbone={"name": "toy", "width": 4})), tmp_path, cache=cache)
    finally:
        registry._registered["backbone"].pop("toy")
    assert load_file(tmp_path / "predictor.safetensors")["first.weight"].shape[0] == 4


# -- several processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory, cache):
    """One recipe by this process, by two, and by this one in two micro-batches.

    Instance norm, no dropout, a loss per sample, no unknown voxels: the promise of data-parallel training. The first stage is
    watched by an annotator that reads curves and changes nothing; the second starts afresh, and the third changes labels.
    """
    folder = tmp_path_factory.mktemp("processes")
    stage = {
        "strategy": {"name": "supervised", "dice": "linear"},
        "batch": 4,
        "optimiser": {"name": "sgd", "lr": 0.1},
    }
    curves = {"name": "label_correction", "windows": 4, "patches": 1, "start": "none", "points": 2, "threshold": 1.0}
    pseudo = {
        "annotator": "pseudo_labels",
        "revise_every": 3,
        "streams": {"labelled": {"role": "all"}},
        "revise_at_start": True,
    }
    stages = [
        stage | {"steps": 8, "annotator": curves, "revise_every": 4},
        stage | {"steps": 5, "start": "fresh"},
        stage | {"steps": 5} | pseudo,
    ]
    values = tiny(stages=stages, backbone={"name": "unet", "channels": [4, 8, 16]})
    values["trainer"] |= {"accelerator": "cpu"}
    recipe = folder / "ddp.yaml"
    recipe.write_text(json.dumps(values))
    run(load_recipe(recipe), folder / "one", cache=cache)
    run(load_recipe(recipe, ["trainer.accumulate=2"]), folder / "split", cache=cache)
    command_line(recipe, folder / "two", cache, "trainer.devices=2")
    return folder


def test_two_processes_equal_one_with_the_same_global_batch(side_by_side):
    one, two, split = (load_file(side_by_side / n / "predictor.safetensors") for n in ("one", "two", "split"))
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-5), key
        assert torch.allclose(one[key], split[key], atol=2e-5), key
    revisions = [
        sorted(p.name for p in (side_by_side / n / "annotations" / "revisions").iterdir()) for n in ("one", "two")
    ]
    assert revisions[0] == revisions[1] == ["000000.json", "000001.json", "000002.json", "000003.json"]


def test_curves_are_those_of_all_processes(side_by_side):
    """Two processes and one with the same global batch judge the same curves, a checkpoint in between or not."""
    said = []
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (side_by_side / name / "metrics.jsonl").read_text().splitlines()]
        seen = [line["annotator"] for line in lines if "annotator" in line and line["stage"] == 0]
        first, last = seen  # the revision, the end of the stage
        said.append([first[f"iou/{c}"] + last[f"iou/{c}"] for c in (1, 2, 3)])
    np.testing.assert_allclose(*(np.array(s, float) for s in said), atol=2e-3)
    assert np.array(said[0]).shape == (3, 2 + 4)
    assert np.nanmax(np.array(said[0], float)) > 0


WITNESS = pathlib.Path(__file__).parent / "witness.py"


WATCHED = {"strategy": "watching", "annotator": "rewriting", "steps": 10, "batch": 4, "revise_every": 3}


def watched(**trainer):
    values = tiny(stages=[WATCHED], backbone={"name": "unet", "channels": [4, 8, 16]})
    values["trainer"] |= {"accelerator": "cpu", **trainer}
    return values


def test_nobody_sees_labels_of_an_earlier_revision(tmp_path, cache, own_registry):
    load_plugins([WITNESS])
    run(load_recipe(watched(workers=2)), tmp_path, cache=cache)
    assert len(list((tmp_path / "annotations" / "revisions").iterdir())) == 4


def test_no_process_sees_labels_of_an_earlier_revision(tmp_path, cache):
    recipe = tmp_path / "witness.json.yaml"
    recipe.write_text(json.dumps(watched(devices=2, workers=1)))
    command_line(recipe, tmp_path / "run", cache, "--plugin", str(WITNESS))
    assert len(list((tmp_path / "run" / "annotations" / "revisions").iterdir())) == 4


def test_stale_labels_would_be_seen(tmp_path, cache, monkeypatch, own_registry):
    """The witness is worth something: it stops a run whose reader stays at the first revision."""
    load_plugins([WITNESS])
    plain = Prepared.loader
    monkeypatch.setattr(Prepared, "loader", lambda *args, revision, **how: plain(*args, revision=0, **how))
    with pytest.raises(RuntimeError, match="stale"):
        run(load_recipe(tiny(stages=[WATCHED])), tmp_path, cache=cache)
