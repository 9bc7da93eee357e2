"""Co-training in whole runs: stages hand views on, later stages resume, and other runs start from what was exported."""

import json

import pytest
import torch
from safetensors.torch import load_file

from labeleff.recipe_io import load_recipe
from labeleff.runner import run

from ..conftest import command_line, tiny

ALONE = {"unlabelled": {"batch": 0}}
NO_SOURCE = {"labelled": {"batch": 0}}


def recipe(*stages):
    values = tiny(stages=[{"batch": 2, **stage} for stage in stages])
    values["backbone"] = {"name": "unet", "channels": [4, 8], "res_units": 1}  # without dropout
    return load_recipe(values)


def umct(**stage):
    return {"strategy": {"name": "umct", "views": 3, "samples": 2}, "steps": 2, **stage}


def test_stages_hand_views_on_and_a_file_starts_another_run(tmp_path, cache, capsys):
    summary = run(recipe(umct(streams=ALONE), umct()), tmp_path / "one", cache=cache)
    said = " ".join(capsys.readouterr().out.split())
    assert "stage 1: umct: view_1, view_2 taken over" in said
    assert "dropout of 0.5 put before the head" in said
    assert summary["predictor"] == "ensemble"
    assert {row["predictor"] for row in summary["results"]} == {"ensemble", "view_0", "view_1", "view_2"}
    file = str(tmp_path / "one" / "predictor.safetensors")
    exported = load_file(file)
    run(recipe(umct(start=file, steps=0, streams=NO_SOURCE)), tmp_path / "two", cache=cache)
    assert "stage 0: umct: view_1, view_2 taken over" in " ".join(capsys.readouterr().out.split())
    again = load_file(tmp_path / "two" / "predictor.safetensors")
    assert all(torch.equal(exported[key], again[key]) for key in exported)
    run(recipe({"strategy": "supervised", "start": file, "steps": 0}), tmp_path / "three", cache=cache)
    alone = load_file(tmp_path / "three" / "predictor.safetensors")
    assert all(torch.equal(exported[f"networks.0.{key}"], value) for key, value in alone.items())


def test_a_later_stage_resumes_on_the_network_that_co_training_has_changed(tmp_path, cache):
    """Dropout that the first stage put in is there after a restart in the second one, too."""
    short, long = (recipe(umct(), {"strategy": "supervised", "steps": steps}) for steps in (2, 4))
    run(short, tmp_path / "broken", cache=cache)
    run(long, tmp_path / "broken", cache=cache, extend=True)
    run(long, tmp_path / "whole", cache=cache)
    one, two = (load_file(tmp_path / name / "predictor.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, cache):
    """Every view's gradients and every view's targets: both stages, losses per sample, nothing drawn."""
    how = {"name": "umct", "views": 3, "weighting": "equal", "dice": "linear", "weight": 1.0}
    stage = {"strategy": how, "steps": 3, "batch": 4, "optimiser": {"name": "sgd", "lr": 0.1}}
    values = tiny(stages=[stage | {"streams": ALONE}, stage | {"streams": {"unlabelled": {"batch": 2}}}])
    values["backbone"] = {"name": "unet", "channels": [4, 8], "res_units": 1}
    values["trainer"] |= {"accelerator": "cpu"}
    file = tmp_path / "ddp.yaml"
    file.write_text(json.dumps(values))
    command_line(file, tmp_path / "one", cache)
    command_line(file, tmp_path / "two", cache, "trainer.devices=2")
    one, two = (load_file(tmp_path / name / "predictor.safetensors") for name in ("one", "two"))
    assert {key.split(".")[1] for key in one} == {"0", "1", "2"}
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-5), key


@pytest.mark.slow
def test_two_processes_draw_their_own_samples(tmp_path, cache):
    """The default, with predictions under dropout, runs in two processes and leaves one network."""
    values = tiny(stages=[{"strategy": {"name": "umct", "samples": 2}, "steps": 3, "batch": 4}])
    values["trainer"] |= {"accelerator": "cpu"}
    file = tmp_path / "ddp.yaml"
    file.write_text(json.dumps(values))
    command_line(file, tmp_path / "two", cache, "trainer.devices=2")
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["predictor"] == "ensemble"
