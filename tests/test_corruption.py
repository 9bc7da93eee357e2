"""``labeleff corrupt`` makes a data set that runs use, wrong where it should be and nowhere else."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from labeleff import registry
from labeleff.cli import app
from labeleff.corruption import corrupt, open_data
from labeleff.data.manifest import read_manifest
from labeleff.errors import RunError
from labeleff.prepare import prepare
from labeleff.recipe_io import load_component, load_recipe
from tests.conftest import tiny

CLI = CliRunner()


@pytest.fixture
def clean(tmp_path):
    path = tmp_path / "clean.yaml"
    import yaml

    path.write_text(yaml.safe_dump(tiny()))
    return path


def test_a_noisy_copy_is_a_data_set(clean, tmp_path, cache):
    done = CLI.invoke(app, ["corrupt", str(clean), "distance", "target_dice=0.7", "--folder", str(tmp_path / "noisy")])
    assert done.exit_code == 0, done.output
    original, noisy = open_data(str(clean)), open_data(str(tmp_path / "noisy" / "manifest.json"))
    model, manifest = registry.build("noise", "distance", target_dice=0.7), original.manifest()
    assert [c.id for c in noisy.manifest().cases] == [c.id for c in manifest.cases]
    for case, found in zip(manifest.cases, noisy.manifest().cases, strict=True):
        expected = original.read_label(case)
        if case.role == "train":
            expected = model.corrupt(expected, case=case.id, names=manifest.classes, spacing=case.spacing).label
        np.testing.assert_array_equal(noisy.read_label(found), expected)
        np.testing.assert_array_equal(noisy.read_image(found), original.read_image(case))
    assert json.loads((tmp_path / "noisy" / "noise.json").read_text())["classes"]["large"]["dice"] < 0.8
    assert {p.name for p in (tmp_path / "noisy" / "pictures").iterdir()} == {"best.png", "median.png", "worst.png"}
    recipe = tiny(
        data=tiny()["data"] | {"dataset": {"name": "manifest", "path": str(tmp_path / "noisy" / "manifest.json")}}
    )
    data = prepare(load_recipe(recipe), tmp_path / "run", cache=cache)
    assert data.task.classes == manifest.classes


def test_files_that_are_there_are_named_not_copied(tmp_path):
    generator = np.random.default_rng(0)
    for part, patients in (("train", (1, 2, 3)), ("val", (4,)), ("test", (5,))):
        names = [f"patient00{number}_frame01" for number in patients]
        (tmp_path / f"{part}.list").write_text("\n".join(names))
        for name in names:
            label = np.zeros((3, 32, 32), np.uint8)
            label[:, 8:24, 8:20] = generator.integers(1, 4)
            image = (60 * label + generator.integers(0, 40, label.shape)).astype(np.uint8)
            np.savez_compressed(tmp_path / f"{name}.npz", image=image, label=label)
    (tmp_path / "acdc.yaml").write_text(
        f"name: a\ndata: {{dataset: {{name: compact, path: {tmp_path}}}, dimensions: 2, patch: [32, 32]}}\n"
        "backbone: unet\nstages: [{strategy: supervised}]\n"
    )
    corrupt(str(tmp_path / "acdc.yaml"), load_component("noise", "missing"), tmp_path / "noisy")
    manifest = read_manifest(tmp_path / "noisy" / "manifest.json")
    assert not (tmp_path / "noisy" / "images").exists()
    assert len(list((tmp_path / "noisy" / "labels").iterdir())) == len(manifest.of_role("train"))
    dataset = open_data(str(tmp_path / "noisy" / "manifest.json"))
    case = dataset.manifest().of_role("train")[0]
    assert dataset.read_image(case).shape[1:] == dataset.read_label(case).shape
    assert dataset.read_image(case).dtype == np.uint8


def test_nothing_is_overwritten(clean, tmp_path):
    (tmp_path / "noisy").mkdir()
    (tmp_path / "noisy" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        corrupt(str(clean), load_component("noise", "distance"), tmp_path / "noisy")
    done = CLI.invoke(app, ["corrupt", str(clean), "distance", "level=3", "--folder", str(tmp_path / "other")])
    assert done.exit_code == 2
    assert "level" in done.output
    assert not (tmp_path / "other").exists()


def test_a_manifest_names_readable_files(tmp_path):
    (tmp_path / "m.json").write_text(
        json.dumps(
            {"name": "m", "classes": ["b", "f"], "axes": 2, "channels": 1, "slice_axis": 0, "official": [],
             "cases": [{"id": "a", "patient": "a", "image": [{"path": "a.doc"}], "label": None, "domain": "",
                        "role": "train", "spacing": None}]}
        )
    )  # fmt: skip
    from labeleff.errors import DataError

    with pytest.raises(DataError, match=r"a\.doc is none of"):
        open_data(str(tmp_path / "m.json")).manifest()
