# ruff: noqa: E501  rows of a table
"""What is wrong with what was given is said in one line; nothing is left half-written, and no code of a stranger runs.

``python -m tests.test_bad_inputs`` writes ``docs/bad_inputs.md``: every input of this table, and the line that it gets.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import save
from typer.testing import CliRunner

from labeleff.cli import app
from labeleff.data.formats import base
from labeleff.data.formats.nifti import Nifti
from labeleff.data.manifest import Source
from labeleff.errors import DataError
from labeleff.predictor import FILE, HEADER
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe

from .test_predict import write_run

PAGE = Path(__file__).parent.parent / "docs" / "bad_inputs.md"
BEGUN = {"recipe.yaml", "environment.json", ".lock"}
"""What a run writes before it looks at its data: what was asked for, and where."""
LABELS = BEGUN | {"split.json", "annotations"}
"""What it has written before it has read the labels of its budget; nothing points at them yet."""
PREPARED = BEGUN | {"split.json", "audit.json", "starts.json", "annotations", "tensorboard"}
"""What it has written before it looks at weights."""


@dataclass(frozen=True)
class Bad:
    """An input.

    Args:
        what: In words, for the page.
        arguments: Makes the input in a folder, and returns the command line.
        says: What the line must match: the file, key or case, and what helps.
        leaves: Names that may be in the run directory afterwards.
    """

    what: str
    arguments: Callable[[Path], list]
    says: str
    leaves: frozenset = frozenset()


# -- what is good, and is then made bad ----------------------------------------------------------------------------------------


def volume(seed, shape=(16, 16, 16)):
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def scans(folder):
    """Write four patients with labels, the last one a test."""
    for place in ("images", "labels"):
        (folder / place).mkdir(parents=True)
    for number in range(1, 5):
        nib.save(nib.Nifti1Image(volume(number), np.eye(4)), folder / "images" / f"p{number}.nii.gz")
        label = (volume(number) > 110).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labels" / f"p{number}.nii.gz")
    (folder / "test.list").write_text("p4\n")


def pictures(folder):
    for place in ("images", "labels"):
        (folder / place).mkdir(parents=True)
    for number in range(1, 5):
        grey = np.random.default_rng(number).integers(0, 255, (16, 16), dtype=np.uint8)
        Image.fromarray(grey).save(folder / "images" / f"p{number}.png")
        Image.fromarray((grey > 128).astype(np.uint8)).save(folder / "labels" / f"p{number}.png")
    (folder / "test.list").write_text("p4\n")


def plain(dataset="nifti", path="scans", **changes):
    axes = 2 if dataset == "pictures" else 3
    values = {
        "name": "bad",
        "data": {"dataset": {"name": dataset, "path": str(path)}, "labelled": 2, "patch": [16] * axes},
        "backbone": {"name": "unet", "channels": [4, 8], "res_units": 0},
        "stages": [{"strategy": "supervised", "steps": 1, "batch": 1}],
        "evaluation": {"pictures": False},
    }
    return values | changes


def run(folder, recipe, *more):
    """Return the command that runs a recipe: plain values, or the text of its file."""
    text = recipe if isinstance(recipe, str | bytes) else json.dumps(recipe)
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["run", path, *more, "--folder", folder / "run", "--cache", folder / "cache"]


def recipe(text):
    return lambda folder: run(folder, text)


def overridden(*overrides, **changes):
    def arguments(folder):
        scans(folder / "scans")
        return run(folder, plain(path=folder / "scans", **changes), *overrides)

    return arguments


def data(spoil, *overrides, kind="nifti"):
    """Return a run on a folder in which something has been spoilt."""

    def arguments(folder):
        (pictures if kind == "pictures" else scans)(folder / "scans")
        spoil(folder / "scans")
        return run(folder, plain(kind, folder / "scans"), *overrides)

    return arguments


def manifest(change, *, text=None):
    """Return a run on a manifest whose values have been changed."""

    def arguments(folder):
        scans(folder / "scans")
        rows = [
            {
                "id": f"p{n}",
                "patient": f"p{n}",
                "image": [{"path": f"scans/images/p{n}.nii.gz"}],
                "label": {"path": f"scans/labels/p{n}.nii.gz"},
                "domain": "",
                "role": "test" if n == 4 else "train",
                "spacing": [1, 1, 1],
            }
            for n in range(1, 5)
        ]
        values = {
            "name": "m",
            "classes": ["background", "a"],
            "axes": 3,
            "channels": 1,
            "slice_axis": 2,
            "official": [],
        }
        values["cases"] = rows
        change(values, rows)
        (folder / "m.json").write_text(json.dumps(values) if text is None else text)
        return run(folder, plain("manifest", folder / "m.json"))

    return arguments


def described(text, kind="nnunet"):
    """Return a run on a folder with a dataset.json."""

    def arguments(folder):
        place = folder / "Dataset001"
        scans(place / "scans")
        (place / "imagesTr").mkdir()
        (place / "labelsTr").mkdir()
        for n in range(1, 5):
            shutil.copy(place / "scans" / "images" / f"p{n}.nii.gz", place / "imagesTr" / f"p{n}_0000.nii.gz")
            shutil.copy(place / "scans" / "labels" / f"p{n}.nii.gz", place / "labelsTr" / f"p{n}.nii.gz")
        (place / "dataset.json").write_text(text if isinstance(text, str) else json.dumps(text))
        return run(folder, plain(kind, place), "data.evaluate_on=development", "data.development=1")

    return arguments


def save_nifti(path, array, affine=None):
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def image(array, affine=None):
    return data(lambda folder: save_nifti(folder / "images" / "p1.nii.gz", array(), affine))


def label(array, affine=None):
    return data(lambda folder: save_nifti(folder / "labels" / "p1.nii.gz", array(), affine), "data.labelled=3")


def content(name, make):
    """Return a run on a folder in which a file holds other bytes."""

    def spoil(folder):
        path = folder / name
        path.write_bytes(make(path.read_bytes()) if callable(make) else make)

    return data(spoil, kind="pictures" if name.endswith(".png") else "nifti")


def header(**changes):
    """Return a NIfTI file whose header says what its voxels do not."""

    def make(folder):
        path = folder / "images" / "p1.nii.gz"
        raw = bytearray(gzip.decompress(path.read_bytes()))
        for offset, layout, values in changes.values():
            struct.pack_into(layout, raw, offset, *values)
        path.write_bytes(gzip.compress(bytes(raw)))

    return data(make)


class Touch:
    """What a pickle of a stranger may be: a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def compact(make):
    """Return a run on a compact set of which one file has been written by ``make``."""

    def arguments(folder):
        place = folder / "set"
        place.mkdir()
        for n in range(1, 5):
            np.savez(place / f"p{n}.npz", image=volume(n), label=(volume(n) > 110).astype(np.uint8))
        (place / "train.list").write_text("p1\np2\np3\n")
        (place / "test.list").write_text("p4\n")
        make(place / "p1.npz", folder)
        return run(folder, plain("compact", place))

    return arguments


def bomb(path, folder):
    """Write an array of 8 TB in a file of some bytes."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (20000, 20000, 20000)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("image.npy", head.getvalue() + bytes(1 << 20))


def array_of_objects(path, folder):
    objects = np.array([Touch(folder / "marker")], dtype=object)
    np.savez(path, image=objects, label=np.zeros((16, 16, 16), np.uint8))


def hdf(folder):
    """Return a run on a manifest whose first image claims 8 TB in a file of some bytes."""
    command = manifest(lambda values, rows: rows[0].update(image=[{"path": "big.h5", "key": "image"}]))(folder)
    with h5py.File(folder / "big.h5", "w") as file:
        file.create_dataset("image", (20000, 20000, 20000), "u1", chunks=(100, 100, 100))
    return command


def weights(name, make, **more):
    """Return a run whose first stage starts from a file."""

    def arguments(folder):
        if make is not None:
            made = make(folder)
            if isinstance(made, bytes):
                (folder / name).write_bytes(made)
            elif made is not None:
                torch.save(made, folder / name)
        stage = {"strategy": "supervised", "steps": 1, "batch": 1, "start": str(folder / name), **more}
        return overridden(stages=[stage])(folder)

    return arguments


def predicting(spoil=None, *more, target="out"):
    """Return the prediction of an image by what a run has left, after something has been spoilt."""

    def arguments(folder):
        write_run(folder / "done")
        (folder / "in").mkdir()
        save_nifti(folder / "in" / "scan.nii.gz", volume(1))
        if spoil is not None:
            spoil(folder)
        return ["predict", folder / "done", folder / "in", folder / target, *more]

    return arguments


def spoilt_header(change):
    def spoil(folder):
        from safetensors import safe_open
        from safetensors.torch import load_file

        path = folder / "done" / FILE
        with safe_open(path, "pt") as file:
            head = json.loads(file.metadata()[HEADER])
        change(head)
        path.write_bytes(save(load_file(path), metadata={HEADER: json.dumps(head)}))

    return predicting(spoil)


def nested(open_, close, depth=5000):
    return open_ * depth + close * depth


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


def claimed(folder):
    """Return a run in the folder of another run."""
    write(folder / "run", "recipe.yaml", "name: other")
    (folder / "run" / "checkpoints").mkdir()
    return overridden()(folder)


def linked(target, place="images/p1.nii.gz"):
    def spoil(folder):
        (folder / place).unlink()
        (folder / place).symlink_to(target(folder))

    return data(spoil)


def outside(folder):
    return write(folder.parent, "elsewhere/secret.nii.gz", "the words of somebody else\n")


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=False)
)

TABLE = {
    "Recipes": [
        Bad("a file that is not there", lambda f: ["run", f / "nowhere.yaml"], r"nowhere\.yaml: no such recipe file"),
        Bad("a name that is nearly one", lambda f: ["run", "quickstat"], r"unknown recipe 'quickstat'. Did you mean"),
        Bad("an empty file", recipe(""), r"recipe\.yaml: .*(data|name)"),
        Bad("a list in place of keys", recipe("- a\n- b\n"), r"recipe\.yaml: .*mapping"),
        Bad("YAML that does not end", recipe("stages: [\n"), r"recipe\.yaml: not valid YAML at line 2"),
        Bad("bytes that are no text", recipe(b"name: \xff\xfe\x00"), r"recipe\.yaml: not a readable recipe"),
        Bad("more than a megabyte", recipe("# " + "x" * (1 << 20)), r"recipe\.yaml: larger than 1 MiB"),
        Bad("5,000 lists within one another", recipe(nested("[", "]")), r"recipe\.yaml: "),
        Bad(
            "hostile YAML: a Python object",
            lambda f: run(f, f'!!python/object/apply:os.system ["touch {f / "marker"}"]'),
            r"recipe\.yaml: not valid YAML at line 1, column 1",
        ),
        Bad("hostile YAML: a billion by references", recipe(ALIASES), r"recipe\.yaml: .*references stand for more than 10,000"),
        Bad("a key twice", recipe("name: a\nname: b\n"), r"recipe\.yaml: not valid YAML at line 2.*name"),
        Bad("a variable of the environment", overridden("name=${oc.env:HOME}"), r"name: '\$\{oc\.env:HOME\}' is refused"),
        Bad("a reference to nothing", overridden("seed=${data.nothing}"), r"reference cannot be resolved: .*nothing"),
        Bad("a reference to itself", overridden("seed=${seed}"), r"reference cannot be resolved"),
        Bad("a key that is nearly one", overridden("stags=[]"), r"stags: .*Did you mean 'stages'"),
        Bad("words in place of a number", overridden("stages.0.steps=many"), r"stages\.0\.steps: .*many"),
        Bad("a number that is none", overridden("stages.0.optimiser.lr=.nan"), r"stages\.0\.optimiser\.lr: nan"),
        Bad("a patch of no size", overridden("data.patch=[0,16,16]"), r"data\.patch: \[0, 16, 16\] is out of range"),
        Bad("a patch of two axes for volumes", overridden("data.patch=[16,16]"), r"data\.patch is \[16, 16\] for a 3-D", BEGUN),
        Bad("a patch that the network cannot take", overridden("data.patch=[15,16,16]"), r"15.*16", BEGUN),
        Bad("a window the wrong way round", overridden("data.window=[240,-160]"), r"data\.window: \[240\.0, -160\.0\] is out of range"),
        Bad("a window in other units", overridden("data.window=[1000,2000]"), r"data\.window: .*'p1' has values from .*: give", BEGUN),
        Bad("no stages", overridden("stages=[]"), r"stages: at least one stage is needed"),
        Bad("a list of stages from elsewhere", overridden("stages=../../etc/passwd"), r"no reference to a list of stages"),
        Bad("a strategy that is nearly one", overridden("stages.0.strategy=suprvised"), r"Did you mean 'supervised'"),
        Bad("a Python path as a component", overridden("data.dataset.name=os.system"), r"data\.dataset: .*'os\.system'"),
        Bad("an option that there is not", overridden("backbone.depth=3"), r"backbone\.depth: unet has no such option"),
        Bad("an option out of range", overridden("stages.0.strategy={name: bcp, ratio: 2}"), r"stages\.0\.strategy: .*ratio"),
        Bad("a name that leads elsewhere", overridden("name=../../evil"), r"name: '\.\./\.\./evil' becomes a folder"),
    ],
    "Arguments": [
        Bad("an override without a value", overridden("seed"), r"override 'seed': write key=value"),
        Bad("an override that is no YAML", overridden("seed=["), r"override 'seed=\[': the value is not valid YAML"),
        Bad("a position beyond the list", overridden("stages.7.steps=1"), r"stages\.7: the list has the positions 0 … 0"),
        Bad("a list that there is not", lambda f: ["list", "strategis"], r"'strategis'. Did you mean 'strategies'"),
        Bad("a component that there is not", lambda f: ["list", "strategies", "bpc"], r"'bpc'. Did you mean 'bcp'"),
        Bad("axes that are no numbers", predicting(None, "--flips", "x"), r"--flips x: give axes as numbers"),
        Bad("an axis that there is not", predicting(None, "--flips", "3"), r"--flips 3: this network has the axes 0 to 2"),
        Bad("a device that there is not", predicting(None, "--device", "abacus"), r"--device abacus: "),
        Bad("a target beyond 1", lambda f: ["forecast", f, "--target", "2"], r"--target 2\.0: .*between 0 and 1"),
        Bad("an export to nothing known", lambda f: ["export", f, "--to", "bundel"], r"Did you mean 'bundle'"),
        Bad("a plug-in that is not there", lambda f: ["show", "quickstart", "--plugin", f / "no.py"], r"--plugin .*no\.py"),
        Bad(
            "a plug-in that fails",
            lambda f: ["show", "quickstart", "--plugin", write(f, "p.py", "import nothing_of_this_name")],
            r"--plugin .*p\.py: .*nothing_of_this_name",
        ),
        Bad("a run that is none", lambda f: ["export", f / "none"], r"none: there is no predictor; a run writes it"),
        Bad("questions of a run that is none", lambda f: ["query", f / "none"], r"none"),
        Bad("the budget of a run that is none", lambda f: ["budget", f / "none"], r"none"),
        Bad("runs to compare that are none", lambda f: ["compare", f / "none"], r"none"),
        Bad("a sweep that is none", lambda f: ["report", f / "none"], r"none"),
        Bad("a run to measure again that is none", lambda f: ["evaluate", f / "none"], r"none"),
        Bad("labels of a run that is none", lambda f: ["export-labels", f / "none", f / "labels"], r"none"),
        Bad("a proposal for no data", lambda f: ["init", f / "none.json", "--output", f / "o.yaml"], r"none"),
        Bad("a new strategy whose name is no name", lambda f: ["new", "strategy", "../evil"], r"\.\./evil"),
        Bad("a benchmark that is nearly one", lambda f: ["sweep", "smok"], r"'smok'.*Did you mean 'smoke'"),
        Bad("an audit of what is no data", lambda f: ["audit", write(f, "m.json", "[]")], r"m\.json: "),
        Bad("a folder without images", lambda f: ["index", write(f, "in/notes.txt", "x").parent, "--out", f / "o.json"], r"in"),
        Bad("a table without its column", lambda f: ["index", write(f, "t.csv", "a,b\n1,2\n"), "--out", f / "o.json"], r"t\.csv"),
        Bad("cases added to no manifest", lambda f: ["add", write(f, "m.json", "{}"), f], r"m\.json: not a manifest"),
        Bad(
            "a run directory that is a file",
            lambda f: (write(f, "run", "x"), overridden()(f))[1],
            r"run: cannot be a run directory .*--folder",
        ),
        Bad(
            "a cache that is a file",
            lambda f: (write(f, "cache", "x"), overridden()(f))[1],
            r"cache: .*--cache",
            BEGUN,
        ),
        Bad("the directory of a damaged run", claimed, r"recipe\.yaml", BEGUN | {"checkpoints"}),
    ],
    "Manifests and lists": [
        Bad("a manifest that is no JSON", manifest(lambda v, r: None, text="{"), r"m\.json: not a manifest", BEGUN),
        Bad("5,000 lists within one another", manifest(lambda v, r: None, text=nested("[", "]", 50000)), r"m\.json: not a", BEGUN),
        Bad("no classes", manifest(lambda v, r: v.pop("classes")), r"m\.json: not a manifest .*classes", BEGUN),
        Bad("no cases", manifest(lambda v, r: r.clear()), r"the data set has no cases", BEGUN),
        Bad("channels in words", manifest(lambda v, r: v.update(channels="one")), r"m\.json: channels is 'one'", BEGUN),
        Bad("seven axes", manifest(lambda v, r: v.update(axes=7)), r"axes must be 2 or 3", BEGUN),
        Bad("a case without a name", manifest(lambda v, r: r[0].pop("id")), r"m\.json: cases\.0 .*id is missing", BEGUN),
        Bad("a name twice", manifest(lambda v, r: r[0].update(id="p2")), r"the case 'p2' occurs twice", BEGUN),
        Bad("a name that leads elsewhere", manifest(lambda v, r: r[0].update(id="../p")), r"'\.\./p' cannot name a case", BEGUN),
        Bad("a role that there is not", manifest(lambda v, r: r[0].update(role="tset")), r"cases\.0 \(p1\): role is 'tset'", BEGUN),
        Bad("a spacing below zero", manifest(lambda v, r: r[0].update(spacing=[1, -1, 1])), r"case 'p1' has spacing", BEGUN),
        Bad("a spacing that is no number", manifest(lambda v, r: r[0].update(spacing=[1, float("nan"), 1])), r"'p1' has spacing", BEGUN),
        Bad("a patient in two roles", manifest(lambda v, r: r[0].update(patient="p4")), r"patient 'p4' is in train .* and in test", BEGUN),
        Bad("an image that is not there", manifest(lambda v, r: r[0].update(image=[{"path": "no.nii.gz"}])), r"case 'p1': .*no\.nii\.gz: cannot be read .*data\.leave_out=\[p1\]", BEGUN),
        Bad("an image of a kind that is not read", manifest(lambda v, r: r[0].update(image=[{"path": "a.pkl"}])), r"case 'p1': a\.pkl is none of", BEGUN),
        Bad("a mask of a class that there is not", manifest(lambda v, r: r[0]["label"].update(mask_of=9)), r"case 'p1': a label names class 9", BEGUN),
        Bad("a test list that names nobody", data(lambda f: write(f, "test.list", "p9\n")), r"test\.list: test case 'p9' has no image", BEGUN),
        Bad("a table of patients without its column", data(lambda f: write(f, "patients.csv", "a,b\np1,x\n")), r"patients\.csv: needs the columns case and patient", BEGUN),
        Bad("a table of patients without a case", data(lambda f: write(f, "patients.csv", "case,patient\np1,x\n")), r"patients\.csv: case 'p2' has no row", BEGUN),
        Bad("a dataset.json that is cut off", described('{"labels": {'), r"dataset\.json: .* cannot be read", BEGUN),
        Bad("a dataset.json without labels", described({"channel_names": {"0": "T1"}, "file_ending": ".nii.gz"}), r"dataset\.json: labels is missing", BEGUN),
        Bad("labels without a background", described({"channel_names": {"0": "T1"}, "labels": {"liver": 1}}), r"dataset\.json: labels has no value 0", BEGUN),
        Bad("files that are programs", described({"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1}, "file_ending": ".exe"}), r"file_ending is '\.exe'", BEGUN),
        Bad("a list of cases that are not there", described({"labels": {"0": "background", "1": "a"}, "training": [{"image": "./imagesTr/no.nii.gz"}]}, "decathlon"), r"case 'no': .*no such file", BEGUN),
    ],
    "Images and labels": [
        Bad("a truncated file", content("images/p1.nii.gz", lambda b: b[: len(b) // 2]), r"case 'p1': .*p1\.nii\.gz: .*data\.leave_out=\[p1\]", BEGUN),
        Bad("an empty file", content("images/p1.nii.gz", b""), r"case 'p1': .*p1\.nii\.gz: .*data\.leave_out=\[p1\]", BEGUN),
        Bad("something else under the name of an image", content("images/p1.nii.gz", b"GIF89a" * 90), r"case 'p1': .*p1\.nii\.gz", BEGUN),
        Bad("a folder under the name of an image", data(lambda f: ((f / "images" / "p1.nii.gz").unlink(), (f / "images" / "p1.nii.gz").mkdir())), r"labels/p1\.nii\.gz: a label without an image", BEGUN),
        Bad("a link to nowhere", linked(lambda f: f / "nothing"), r"case 'p1': .*p1\.nii\.gz: ", BEGUN),
        Bad("a link out of the folder", linked(outside), r"case 'p1': .*p1\.nii\.gz: not a readable NIfTI file", BEGUN),
        Bad("NaN among the voxels", image(lambda: np.full((16, 16, 16), np.nan, np.float32)), r"case 'p1': .*NaN or infinite values; repair", BEGUN),
        Bad("complex numbers", image(lambda: volume(1).astype(np.complex64)), r"case 'p1': .*complex64; whole or real numbers are read", BEGUN),
        Bad("two axes", image(lambda: volume(1)[0]), r"case 'p1': .*has 2 axes \(16, 16\)", BEGUN),
        Bad("four axes in one file", image(lambda: volume(1, (16, 16, 16, 3))), r"case 'p1' has 3 channels, most cases have 1", BEGUN),
        Bad("five axes", image(lambda: volume(1, (8, 8, 8, 2, 2))), r"case 'p1': .*has 5 axes", BEGUN),
        Bad("an axis of length 0", header(dim=(40, "<8h", (3, 16, 0, 16, 1, 1, 1, 1))), r"case 'p1': .*p1\.nii\.gz: has an axis of length 0", BEGUN),
        Bad("a header that claims 70 TB", header(dim=(40, "<8h", (3, 32767, 32767, 32767, 1, 1, 1, 1))), r"case 'p1': .*TiB in memory", BEGUN),
        Bad("a type of voxels that there is not", header(kind=(70, "<h", (999,))), r"case 'p1': .*p1\.nii\.gz: (not a readable NIfTI file|has .*type)", BEGUN),
        Bad("an affine that is no map", header(sform=(280, "<12f", (0,) * 12), code=(252, "<2h", (0, 1))), r"case 'p1': .*affine is no map to millimetres", BEGUN),
        Bad("no images at all", data(lambda f: shutil.rmtree(f / "images")), r"images: no \.nii or \.nii\.gz files", BEGUN),
        Bad("a zip bomb: 8 TB in 1 KB (.npz)", compact(bomb), r"case 'p1': .*p1\.npz: .*TiB in memory", BEGUN),
        Bad("a zip bomb: 8 TB in 1 KB (.h5)", hdf, r"case 'p1': .*big\.h5: .*TiB in memory", BEGUN),
        Bad("a hostile pickle in an .npz", compact(array_of_objects), r"case 'p1': .*p1\.npz: no readable array 'image'", BEGUN),
        Bad("words in an .npz", compact(lambda p, f: np.savez(p, image=np.array([[["a"] * 9] * 9] * 9), label=volume(1))), r"case 'p1': .*p1\.npz: .*type <U1", BEGUN),
        Bad("an .npz without its array", compact(lambda p, f: np.savez(p, picture=volume(1))), r"case 'p1': .*p1\.npz: no readable array 'image'", BEGUN),
        Bad("a truncated picture", content("images/p1.png", lambda b: b[:60]), r"case 'p1': .*p1\.png", BEGUN),
        Bad("a picture that claims 3.6 gigapixels", content("images/p1.png", lambda b: b[:16] + struct.pack(">2I", 60000, 60000) + b[24:]), r"case 'p1': .*p1\.png", BEGUN),
        Bad("a label of another shape", label(lambda: np.zeros((8, 16, 16), np.uint8)), r"case 'p1': .*labels/p1\.nii\.gz: .*shape \(8, 16, 16\)", LABELS),
        Bad("a label that lies elsewhere", label(lambda: np.zeros((16, 16, 16), np.uint8), np.diag([2, 1, 1, 1])), r"case 'p1': .*geometry \(affine\) is not the image's; resample", LABELS),
        Bad("a value that is no class", label(lambda: np.full((16, 16, 16), 7, np.uint8)), r"case 'p1': .*label value 7 is no class", LABELS),
        Bad("halves in a label", label(lambda: np.full((16, 16, 16), 0.5, np.float32)), r"case 'p1': .*whole numbers", LABELS),
        Bad("NaN in a label", label(lambda: np.full((16, 16, 16), np.nan, np.float32)), r"case 'p1': .*whole numbers", LABELS),
        Bad("a label in colour", data(lambda f: Image.fromarray(np.random.default_rng(0).integers(0, 9, (16, 16, 3), dtype=np.uint8)).save(f / "labels" / "p1.png"), "data.labelled=3", kind="pictures"), r"case 'p1': .*p1\.png: .*channels", LABELS),
        Bad("a label without an image", data(lambda f: (f / "images" / "p1.nii.gz").unlink()), r"labels/p1\.nii\.gz: a label without an image", BEGUN),
    ],
    "Splits": [
        Bad("more labelled patients than there are", overridden("data.labelled=9"), r"data\.labelled.*9.*3", BEGUN),
        Bad("the first of a list that there is not", overridden("data.labelled=first:2"), r"data\.labelled is first:2, but .* no official order", BEGUN),
        Bad("a validation of all that is labelled", overridden("data.validation=2"), r"data\.validation takes 2 patients out of a budget of 2", BEGUN),
        Bad("more folds than patients", overridden("evaluation.folds=7", "evaluation.fold=0"), r"evaluation\.folds", BEGUN),
        Bad("a domain that there is not", overridden("data.source=[mars]"), r"data\.source.*mars", BEGUN),
        Bad("a case to leave out that there is not", overridden("data.leave_out=[p8]"), r"data\.leave_out: .*no case 'p8'. Did you mean", BEGUN),
        Bad("an image in training and test", data(lambda f: shutil.copy(f / "images" / "p1.nii.gz", f / "images" / "p4.nii.gz")), r"p1.*p4|p4.*p1", BEGUN),
        Bad("nobody to learn from", data(lambda f: write(f, "test.list", "p1\np2\np3\np4\n")), r"train", BEGUN),
    ],
    "Weights": [
        Bad("a file that is not there", weights("no.safetensors", None), r"no\.safetensors: these weights cannot be read", PREPARED),
        Bad("a truncated file", weights("w.safetensors", lambda f: save({"a": torch.ones(9)})[:-9]), r"w\.safetensors: these weights cannot be read", PREPARED),
        Bad("a header of 2^60 bytes", weights("w.safetensors", lambda f: struct.pack("<Q", 1 << 60) + b"{}"), r"w\.safetensors: these weights cannot be read", PREPARED),
        Bad("a hostile pickle", weights("w.pt", lambda f: {"a": Touch(f / "marker")}), r"w\.pt: holds more than tensors .* save its state as safetensors", PREPARED),
        Bad("a hostile pickle of the old kind", weights("w.pth", lambda f: pickle.dumps(Touch(f / "marker"))), r"w\.pth: holds more than tensors", PREPARED),
        Bad("an empty torch file", weights("w.pt", lambda f: b""), r"w\.pt: these weights cannot be read", PREPARED),
        Bad("a file of another kind", weights("w.pkl", lambda f: b"x"), r"w\.pkl: weights are \.safetensors or torch files", PREPARED),
        Bad("a folder", weights("w.pt", lambda f: (f / "w.pt").mkdir()), r"w\.pt: these weights cannot be read", PREPARED),
        Bad("NaN among the weights", weights("w.pt", lambda f: {"a": torch.tensor([float("nan")])}), r"w\.pt: a holds NaN", PREPARED),
        Bad("weights of another network", weights("w.pt", lambda f: {"state_dict": {"a": torch.ones(9)}}), r"w\.pt: these weights do not load into unet", PREPARED),
    ],
    "Prediction": [
        Bad("an image that is not there", predicting(lambda f: shutil.rmtree(f / "in")), r"in: not a file of the kinds"),
        Bad("a folder without images", predicting(lambda f: (f / "in" / "scan.nii.gz").unlink()), r"in: no files of the kinds"),
        Bad("a truncated image", predicting(lambda f: write(f, "in/scan.nii.gz", (f / "in/scan.nii.gz").read_bytes()[:400])), r"scan\.nii\.gz: not a readable NIfTI"),
        Bad("an image of another kind of voxels", predicting(lambda f: save_nifti(f / "in/scan.nii.gz", volume(1).astype(np.complex64))), r"scan\.nii\.gz: .*complex"),
        Bad("an image with NaN", predicting(lambda f: save_nifti(f / "in/scan.nii.gz", volume(1) * np.nan)), r"scan\.nii\.gz: the image holds NaN"),
        Bad("an image of four channels", predicting(lambda f: save_nifti(f / "in/scan.nii.gz", volume(1, (8, 8, 8, 4)))), r"scan\.nii\.gz: has the shape \(8, 8, 8, 4\)"),
        Bad("a header that claims 70 TB", predicting(lambda f: (scans(f / "s"), header(dim=(40, "<8h", (3, 32767, 32767, 32767, 1, 1, 1, 1)))(f / "t"), shutil.copy(f / "t/scans/images/p1.nii.gz", f / "in/scan.nii.gz"))), r"scan\.nii\.gz: .*TiB in memory"),
        Bad("an output that is there", predicting(lambda f: write(f, "out/scan.nii.gz", "mine")), r"scan\.nii\.gz: is there already; .*--overwrite"),
        Bad("the folder of the images as output", predicting(target="in"), r"in: is the folder of the images"),
        Bad("an output folder that is a file", predicting(lambda f: write(f, "out", "mine")), r"out: .*file"),
        Bad("a damaged predictor", predicting(lambda f: write(f, f"done/{FILE}", b"x" * 99)), r"predictor\.safetensors: not a predictor that labeleff wrote"),
        Bad("a predictor that names a Python path", spoilt_header(lambda h: h["recipe"]["stages"][0]["strategy"].update(name="os.system")), r"predictor\.safetensors: .*os\.system"),
        Bad("a predictor that prepares images in unknown ways", spoilt_header(lambda h: h["processing"].update(magic=1)), r"predictor\.safetensors: not a predictor"),
        Bad("a predictor of another size", spoilt_header(lambda h: h["recipe"]["backbone"].update(channels=[8, 16])), r"predictor\.safetensors: its weights are not those"),
    ],
}  # fmt: skip
THEIRS = (
    "cannot be read|not a readable NIfTI file|no readable array 'image'|not a readable recipe|or damaged|not a readable image"
    "|cannot be decoded|no readable plan of a sweep|network that its recipe names|cannot be used here"
)
ROWS = [(section, bad) for section, inputs in TABLE.items() for bad in inputs]


# -- trying them ----------------------------------------------------------------------------------------------------------------


def tried(bad, folder):
    """Return the end of a command: exit code, lines on stderr, what is new in the folder."""
    arguments = bad.arguments(folder)
    before = set(folder.rglob("*"))
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    new = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path not in before}
    return done, [line for line in done.stderr.splitlines() if line.strip()], new


def told(line, folder):
    """Return a line as it stands on the page: without what differs from machine to machine."""
    text = line.removeprefix("error: ").replace(str(folder), "…")
    text = re.sub(r"Shipped: .*; or give", "Shipped: …; or give", text)
    text = re.sub(r"(Known|Strategies|It has|There are): .*", r"\1: …", text)
    text = re.sub(r"\d+\.\d [KMG]iB are free", "N GiB are free", text)
    # words of other libraries differ from version to version
    text = re.sub(rf"({THEIRS}) \([^;]*\)(?=;|$)", r"\1 (…)", text)
    text = re.sub(r"(line \d+, column \d+): (?!its references|could not determine).*", r"\1: …", text)
    text = re.sub(r"\((JSONDecodeError|RecursionError): .*\)", r"(\1: …)", text)
    return text.replace("|", "\\|")


def complaints(bad, folder):
    """Return what is wrong with how an input is met, and the line."""
    done, lines, new = tried(bad, folder)
    found = []
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        found.append(f"raised {done.exception!r}")
    if done.exit_code != 2:
        found.append(f"exit code {done.exit_code}")
    if len(lines) != 1 or not lines[0].startswith("error: "):
        found.append(f"{len(lines)} lines: {lines}")
    elif not re.search(bad.says, lines[0]):
        found.append(f"says {lines[0]!r}, not {bad.says!r}")
    if "Traceback" in done.output:
        found.append("a traceback")
    if (folder / "marker").exists():
        found.append("ran code")
    left = {name.split("/")[1] for name in new if name.startswith("run/")} - set(bad.leaves)
    left |= {name for name in new if name.split("/")[0] not in ("run", "cache")}
    half = [
        name
        for name in new
        if ".tmp" in name
        or (name.startswith("cache/") and name.endswith("/image.b2nd") and f"{name[:-10]}entry.json" not in new)
    ]
    half += [name for name in new if name == "run/annotations/current" and "audit.json" not in bad.leaves]
    if left or half:
        found.append(f"left {sorted(left) + half}")
    return found, told(lines[0], folder) if lines else ""


def row(bad, line):
    return f"| {bad.what} | {line} |"


@pytest.mark.parametrize(("section", "bad"), ROWS, ids=[f"{section}: {bad.what}" for section, bad in ROWS])
def test_one_line_and_nothing_else(section, bad, tmp_path):
    found, line = complaints(bad, tmp_path)
    assert not found
    assert row(bad, line) in PAGE.read_text().splitlines(), "python -m tests.test_bad_inputs writes the page anew"


def test_the_page_lists_these_and_no_others():
    listed = [
        line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")
    ]
    assert [name for name in listed if name != "given"] == [bad.what for _, bad in ROWS]
    assert len(ROWS) >= 60


def test_what_the_line_says_helps(tmp_path):
    scans(tmp_path / "scans")
    for name, keep in (("p2", 0), ("p3", 400)):  # not even a header, and half of the voxels
        path = tmp_path / "scans" / "images" / f"{name}.nii.gz"
        path.write_bytes(path.read_bytes()[:keep])
    values = plain(path=tmp_path / "scans")
    values["data"]["labelled"] = 1
    with pytest.raises(DataError, match=r"data\.leave_out=\[p2\]"):
        prepare(load_recipe(values), tmp_path / "run", cache=tmp_path / "cache")
    found = prepare(load_recipe(values, ["data.leave_out=[p2,p3]"]), tmp_path / "run", cache=tmp_path / "cache")
    assert (found.split.labelled, found.split.test) == (("p1",), ("p4",))


def test_a_small_file_that_unpacks_to_more_than_there_is(tmp_path, monkeypatch):
    scans(tmp_path / "nifti")
    zeros = np.zeros((128, 128, 64), np.float32)  # 4 MiB
    save_nifti(tmp_path / "nifti" / "images" / "p1.nii.gz", zeros)
    np.savez_compressed(tmp_path / "z.npz", image=zeros)
    tifffile.imwrite(
        tmp_path / "z.tif", np.zeros((4, 512, 1024), np.uint16), compression="zlib", photometric="minisblack"
    )
    with h5py.File(tmp_path / "z.h5", "w") as file:
        file.create_dataset("image", data=zeros, compression="gzip")
    assert max(path.stat().st_size for path in tmp_path.glob("z.*")) < 50_000
    monkeypatch.setattr(base, "free_memory", lambda: 4 << 20)
    data = Nifti(path=str(tmp_path / "nifti"))
    manifest = data.manifest()

    def read_all():
        data.read_image(manifest.case("p1"))
        for name in ("z.npz", "z.h5", "z.tif"):
            data.read_image(replace(manifest.case("p1"), image=(Source(tmp_path / name, "image"),)))

    read_all()
    monkeypatch.setattr(base, "free_memory", lambda: (4 << 20) - 1)
    for name in ("p1.nii.gz", "z.npz", "z.h5", "z.tif"):
        path = tmp_path / name if name.startswith("z") else tmp_path / "nifti" / "images" / name
        with pytest.raises(
            DataError, match=rf"case 'p1': .*{name}: says that it takes 4\.0 MiB in memory, and 4\.0 MiB are free"
        ):
            data.read_image(replace(manifest.case("p1"), image=(Source(path, "image"),)))
    monkeypatch.setattr(base, "free_memory", lambda: None)  # where the system does not tell
    read_all()


def page():
    """Return the page, and print what is wrong."""
    lines = [
        "# Bad inputs",
        "",
        f"What one gets for {len(ROWS)} inputs that are wrong: one line on stderr, exit code 2, nothing half-written, and no code",
        "that came with them has run. Folders are written …; `python -m tests.test_bad_inputs` makes this page, and a test keeps it true.",
    ]
    for section, inputs in TABLE.items():
        lines += ["", f"## {section}", "", "| given | the line |", "|---|---|"]
        for bad in inputs:
            with tempfile.TemporaryDirectory() as folder:
                found, line = complaints(bad, Path(folder).resolve())
            for complaint in found:
                print(f"{section}: {bad.what}: {complaint}", file=sys.stderr)
            lines.append(row(bad, line))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page())
