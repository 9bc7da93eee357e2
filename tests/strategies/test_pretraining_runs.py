"""Stages before labels in two processes: each contrasts its own share of a batch, as one process does share after share."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import command_line, tiny

STAGES = [
    {"strategy": {"name": "glcl_global", "partitions": 2, "hidden": 16, "projection": 8}, "batch": 8},
    {"strategy": {"name": "glcl_local", "projection": 8}, "batch": 4},
    {"strategy": {"name": "voco", "width": 8, "grid": [2], "row_dropout": 0.2}, "batch": 4},
    {"strategy": {"name": "voco", "form": "v2", "grid": [2], "width": 8, "supervised": 1.0, "pseudo": 1.0}, "batch": 4},
    {"strategy": {"name": "masked_autoencoder"}, "batch": 4},
    {"strategy": {"name": "supervised", "mixup": 1.0, "dice": "linear"}, "batch": 4},
]


@pytest.mark.slow
def test_two_processes_are_one_that_takes_the_shares_in_turn(tmp_path, cache):
    """Gradients of both, teachers, frozen copies, and whatever is drawn for a sample; DDP finds no parameter left waiting."""
    values = tiny(stages=[{"steps": 3, "optimiser": {"name": "sgd", "lr": 0.02}, **stage} for stage in STAGES])
    values["data"] = {
        "dataset": {"name": "phantom", "patients": 7, "test": 1, "ndim": 3, "size": [8, 32, 32]},
        "labelled": 3,
        "dimensions": 2,
        "patch": [32, 32],
    }
    values["backbone"] = {"name": "unet", "channels": [4, 8, 8], "res_units": 1}  # without dropout and batch statistics
    values["trainer"] |= {"accelerator": "cpu"}
    file = tmp_path / "ddp.yaml"
    file.write_text(json.dumps(values))
    command_line(file, tmp_path / "turns", cache, "trainer.accumulate=2")
    command_line(file, tmp_path / "two", cache, "trainer.devices=2")
    one, two = (load_file(tmp_path / name / "predictor.safetensors") for name in ("turns", "two"))
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-5), key
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines if "lr" in line} == set(range(len(STAGES)))
    assert any("pseudo" in line for line in lines)
