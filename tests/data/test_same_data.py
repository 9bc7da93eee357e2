"""One data set in three layouts is one data set: the same rows, the same split, and bit for bit the same training."""

import json

import nibabel as nib
import numpy as np
from safetensors.numpy import load_file

from labeleff import registry
from labeleff.data.formats.base import lines_of
from labeleff.data.recognise import Choices, index_folder
from labeleff.predictor import FILE
from labeleff.recipe_io import load_recipe
from labeleff.runner import run


def as_compact(source, folder, train, test):
    """Link some cases of a compact set into a set of their own."""
    folder.mkdir(parents=True)
    for name in (*train, *test):
        (folder / f"{name}.npz").symlink_to(source / f"{name}.npz")
    (folder / "train.list").write_text("\n".join(train))
    (folder / "test.list").write_text("\n".join(test))


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.25, 1.25, 1.25, 1])), path)


def as_nnunet(source, folder, train, test):
    """Write a compact set of volumes as nnU-Net's raw layout; its own list keeps the order of training cases."""
    listed = {}
    for part, names in (("Tr", train), ("Ts", test)):
        for name in names:
            with np.load(source / f"{name}.npz") as case:
                save(case["image"], folder / f"images{part}" / f"{name}_0000.nii.gz")
                save(case["label"], folder / f"labels{part}" / f"{name}.nii.gz")
    for name in train:
        listed[name] = {"images": [f"imagesTr/{name}_0000.nii.gz"], "label": f"labelsTr/{name}.nii.gz"}
    spec = {
        "name": "la",
        "channel_names": {"0": "LGE"},
        "labels": {"background": 0, "left atrium": 1},
        "numTraining": len(train),
        "file_ending": ".nii.gz",
        "dataset": listed,
    }
    (folder / "dataset.json").write_text(json.dumps(spec))


def as_decathlon(source, folder, train, test):
    """Write a compact set of volumes as a Decathlon task; its test has labels, which the public ones lack."""
    lists = {"training": [], "test": []}
    for key, place, names in (("training", "Tr", train), ("test", "Ts", test)):
        for name in names:
            with np.load(source / f"{name}.npz") as case:
                save(case["image"], folder / f"images{place}" / f"{name}.nii.gz")
                save(case["label"], folder / f"labels{place}" / f"{name}.nii.gz")
            lists[key].append({"image": f"./images{place}/{name}.nii.gz", "label": f"./labels{place}/{name}.nii.gz"})
    spec = {"name": "la", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "left atrium"}, **lists}
    (folder / "dataset.json").write_text(json.dumps(spec))


LAYOUTS = {"compact": as_compact, "nnunet": as_nnunet, "decathlon": as_decathlon}


def written(source, folder, train, test):
    """Write a set in every layout, each under the same name, and return the data sets."""
    sets = {}
    for kind, write in LAYOUTS.items():
        write(source, folder / kind / "la", train, test)
        sets[kind] = registry.build("dataset", kind, path=str(folder / kind / "la"))
    return sets


def rows(manifest):
    cases = [(case.id, case.patient, case.domain, case.role, case.spacing, case.has_label) for case in manifest.cases]
    head = ("name", "classes", "axes", "channels", "slice_axis", "official", "overlapping")
    return [*(getattr(manifest, key) for key in head), *cases]


def trained(kind, folder, place, cache, steps, **data):
    recipe = {
        "name": "same",
        "data": {"dataset": {"name": kind, "path": str(folder / kind / "la")}, "patch": [32, 32, 16], **data},
        "backbone": {"name": "unet", "channels": [4, 8, 16], "res_units": 0, "dropout": 0.1},
        "stages": [
            {
                "strategy": "mean_teacher",
                "steps": steps,
                "batch": 2,
                "augment": {"rotate": 20.0, "noise": 0.1, "gain": 0.2},
            }
        ],
        "evaluation": {"pictures": False, "overlap": 0.0, "predictors": "first"},
        "trainer": {"log_every": 1},
    }
    summary = run(load_recipe(recipe), place, cache=cache / kind)
    lines = [
        {key: value for key, value in json.loads(line).items() if "second" not in key}
        for line in (place / "metrics.jsonl").read_text().splitlines()
    ]
    return summary["split"], lines, load_file(place / FILE), (place / "cases.csv").read_text()


def compare(folder, cache, steps, **data):
    """Assert that training is the same from all layouts, and return what the first one gave."""
    first, *others = (trained(kind, folder, folder / f"run_{kind}", cache, steps, **data) for kind in LAYOUTS)
    split, lines, weights, cases = first
    assert lines
    for other in others:
        assert other[0] == split
        assert other[1] == lines
        assert other[2].keys() == weights.keys()
        assert all(np.array_equal(other[2][name], value) for name, value in weights.items())
        assert other[3] == cases
    return first


def test_left_atrium_in_three_layouts(real_data, tmp_path):
    source = real_data / "left_atrium_half"
    train, test = lines_of(source / "train.list")[3::-1], lines_of(source / "test.list")[:1]
    assert train != sorted(train)  # an order that only lists can tell
    sets = written(source, tmp_path, train, test)
    manifests = {kind: data.manifest() for kind, data in sets.items()}
    assert rows(manifests["nnunet"]) == rows(manifests["compact"])
    assert rows(manifests["decathlon"]) == rows(manifests["compact"])
    for kind in ("nnunet", "decathlon"):
        assert rows(index_folder(tmp_path / kind / "la", Choices()).manifest) == rows(manifests["compact"])
        for case in manifests["compact"].cases:
            for read in ("read_image", "read_label"):
                one, two = (getattr(sets[name], read)(manifests[name].case(case.id)) for name in (kind, "compact"))
                assert one.dtype == two.dtype
                assert np.array_equal(one, two)
    split, lines, weights, _ = compare(tmp_path, tmp_path, 3, labelled="first:2", evaluate_on="test")
    assert len(lines) == 3
    other = trained("nnunet", tmp_path, tmp_path / "other", tmp_path, 3, labelled=2, draw=1, evaluate_on="none")
    assert other[0] != split  # what is the same above need not be
    assert any(not np.array_equal(other[2][name], value) for name, value in weights.items())
