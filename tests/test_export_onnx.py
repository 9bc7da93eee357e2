"""ONNX: what the file computes, what it says, what it keeps to itself, and what is refused."""

import itertools
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from labeleff import export_onnx, registry
from labeleff.backbones.views import Ensemble, ViewNetwork, standard_views
from labeleff.cli import app
from labeleff.data.store import as_stored
from labeleff.errors import RunError
from labeleff.export import export
from labeleff.functional.norms import OnBatchStatistics
from labeleff.parity import cut, windows_of
from labeleff.predictor import FILE, open_predictor

from .backbones.networks import SIDE, SMALL, sorted_out
from .test_predict import write_run

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in export_onnx.PACKAGES), reason="needs labeleff[onnx]"
)
ROOT = Path(__file__).parent.parent
FLAT = {"name": "phantom", "patients": 3, "test": 1, "size": [24, 20], "slices": 1}
DEEP = {"name": "phantom", "patients": 3, "test": 1, "ndim": 3, "size": [24, 20, 18]}


def written(folder, ndim, size=None, **changes):
    """Write a run whose data are at hand, and return its predictor."""
    dataset = (FLAT if ndim == 2 else DEEP) | ({"size": list(size)} if size else {})
    write_run(folder, ndim=ndim, axes=ndim, dataset=dataset, orientation=None, **changes)
    return open_predictor(folder)


def computed(file, image):
    """Return what onnxruntime computes, as somebody does who has no labeleff."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: image})[0]


def texts(message):
    """Yield everything in a protocol buffer that is text, wherever it stands."""
    for field, value in message.ListFields():
        for part in [value] if isinstance(value, (str, bytes, int, float)) or hasattr(value, "ListFields") else value:
            if hasattr(part, "ListFields"):
                yield from texts(part)
            elif isinstance(part, str) or (isinstance(part, bytes) and field.name != "raw_data"):
                yield part.encode() if isinstance(part, str) else part


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_file_computes_what_the_run_predicts_for_any_batch_and_size(tmp_path, cache, ndim):
    import onnx

    network = written(tmp_path / "run", ndim).network
    command = ["export", str(tmp_path / "run"), "--to", "onnx", "--out", str(tmp_path / "out"), "--cache", str(cache)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (said,) = done.output.splitlines()  # and nothing of what the exporter tells developers
    assert said.endswith("in a logit at most, on windows of an image of the run")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "processing.json"]
    file = tmp_path / "out" / "model.onnx"
    for shape in ((1, 1, *[16] * ndim), (3, 1, 32, *[16] * (ndim - 1))):
        image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert np.abs(network(image).numpy() - computed(file, image.numpy())).max() < 1e-5

    plain = json.loads((tmp_path / "out" / "processing.json").read_text())
    sizes = [f"16*size_{axis}" for axis in range(ndim)]
    assert plain["onnx"] == {
        "file": "model.onnx",
        "opset": 18,
        "input": {"name": "image", "type": "float32", "shape": ["batch", 1, *sizes]},
        "output": {"name": "logits", "type": "float32", "shape": ["batch", 3, *sizes]},
    }
    assert plain["processing"]["normalise"] == "zscore"
    parity = plain["parity"]
    assert parity["of"] == "windows of an image of the run"
    assert parity["windows"] == [3, 1, *[16] * ndim]
    assert parity["largest_difference"] <= parity["tolerance"]

    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == plain["onnx"]["opset"]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["image", "logits"]
    # neither where code lies on this machine nor a line of it; no pickle either: all weights are plain arrays of the graph
    assert not [text for text in (b"/", b".py", b"\\", b"forward") if text in b"".join(texts(model))]
    assert all(
        weights.data_location == onnx.TensorProto.DEFAULT and not weights.external_data
        for weights in model.graph.initializer
    )


def test_what_is_compared_are_windows_of_a_training_image_as_it_is_stored(tmp_path, cache, monkeypatch):
    predictor = written(tmp_path / "run", 2)
    seen = []
    monkeypatch.setattr(
        predictor.network, "forward", lambda image: seen.append(image) or torch.zeros(len(image), 3, 16, 16)
    )
    monkeypatch.setattr("labeleff.export.open_predictor", lambda run: predictor)
    monkeypatch.setattr("labeleff.export._write_weights", lambda predictor, place: predictor.network)
    found = export(tmp_path / "run", "safetensors", tmp_path / "out", cache=cache)
    assert (found["of"], found["why"]) == ("windows of an image of the run", "")
    dataset = registry.made("dataset", predictor.recipe.data.dataset)
    case = next(case for case in dataset.manifest().cases if case.role == "train")
    image = as_stored(dataset.read_image(case), "zscore")
    # a quarter, a half and three quarters of the 8 and 4 voxels that the image is longer than the patch
    for window, (row, column) in zip(seen[0], [(2, 1), (4, 2), (6, 3)], strict=True):
        assert np.allclose(window, image[:, row : row + 16, column : column + 16], atol=1e-6)


def test_what_is_compared_is_clipped_where_the_run_clips(tmp_path, cache):
    predictor = written(tmp_path / "run", 2)
    dataset = registry.made("dataset", predictor.recipe.data.dataset)
    image = dataset.read_image(next(case for case in dataset.manifest().cases if case.role == "train"))
    ends = tuple(float(end) for end in np.percentile(image, (20, 80)))
    recipe = replace(predictor.recipe, data=replace(predictor.recipe.data, window=ends))
    found = windows_of(replace(predictor, recipe=recipe), tmp_path / "run", cache)
    assert (found.of, found.why) == ("windows of an image of the run", "")
    expected = as_stored(np.clip(image.astype(np.float32), *ends), "zscore")
    assert np.allclose(found.image[1], expected[:, 4:20, 2:18], atol=1e-4)


def test_windows_of_slices_and_of_cases_smaller_than_the_patch():
    volume = np.arange(8 * 3 * 10, dtype=np.float32).reshape(1, 8, 3, 10)

    def read(box):
        return volume[(slice(None), *box)]

    processing = SimpleNamespace(patch=(4, 5), dimensions=2, axes=3, slice_axis=2)
    found = cut(read, (8, 3, 10), processing)
    assert found.shape == (3, 1, 4, 5)
    for window, row, place in zip(found, (1, 2, 3), (2, 4, 7), strict=True):
        expected = np.zeros((4, 5), np.float32)
        expected[:, 1:4] = volume[0, row : row + 4, :, place]
        assert np.array_equal(window[0], expected)


def test_without_the_data_it_is_noise_and_the_file_does_not_say_where_they_were(tmp_path, cache):
    dataset = {"name": "nifti", "path": str(tmp_path / "gone")}
    write_run(tmp_path / "run", ndim=2, axes=2, dataset=dataset, orientation=None)
    found = export(tmp_path / "run", "safetensors", tmp_path / "out", cache=cache)
    assert found["of"] == "noise"
    assert str(tmp_path / "gone") in found["why"]
    assert str(tmp_path) not in (tmp_path / "out" / "processing.json").read_text()
    found = export(tmp_path / "run" / FILE, "safetensors", tmp_path / "file", cache=cache)
    assert found["why"].startswith("a file alone has no images")


class Shifted(nn.Module):
    """A network that is wrong by a number."""

    def __init__(self, network, by):
        super().__init__()
        self.network, self.by = network, by

    def forward(self, image):
        return self.network(image) + self.by


@pytest.mark.parametrize(("by", "said"), [(2e-3, "by 0.002 in a logit"), (float("nan"), "by nan in a logit")])
def test_what_does_not_agree_with_the_run_is_not_written(tmp_path, cache, monkeypatch, by, said):
    written(tmp_path / "run", 2)

    def wrong(predictor, place):
        place.mkdir()
        (place / "model.onnx").write_bytes(b"")
        return Shifted(predictor.network, by), {}

    monkeypatch.setattr(export_onnx, "write_onnx", wrong)
    with pytest.raises(RunError, match=rf"out: not written: .* differs from the run {said}, and 0\.000\d+ is allowed"):
        export(tmp_path / "run", "onnx", tmp_path / "out", cache=cache)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    written(tmp_path / "run", 2)
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--to", "onnx"])
    said = " ".join(done.output.split())
    assert (done.exit_code, said) == (
        2,
        "error: --to onnx needs onnxscript, which is not installed: pip install 'labeleff[onnx]'",
    )
    assert not (tmp_path / "run" / "export").exists()


class Undecided(nn.Module):
    """What it computes depends on what it sees, which no graph can say."""

    def forward(self, image):
        return image.repeat(1, 3, 1, 1) if image.sum() > 0 else image.new_zeros(len(image), 3, *image.shape[2:])


class OfOneSize(nn.Module):
    """It weighs every pixel by its place in an image of 16 × 16."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 16, 16))

    def forward(self, image):
        return image * self.weight


def test_networks_of_one_size_and_those_that_cannot_be_exported(tmp_path, monkeypatch):
    predictor = written(tmp_path / "run", 2)
    again, described = export_onnx.write_onnx(replace(predictor, network=OfOneSize()), tmp_path / "fixed")
    assert described["input"]["shape"] == ["batch", 1, 16, 16]
    with pytest.raises(RuntimeError, match="invalid dimensions"):
        again(torch.zeros(1, 1, 32, 16))
    odd = replace(predictor.processing, patch=(15, 15))  # nothing halves it, so that other sizes are not tried
    with pytest.raises(
        RunError, match=r"^unet cannot be exported to ONNX by torch [\d.]+ \(.+\); use --to safetensors"
    ):
        export_onnx.write_onnx(replace(predictor, network=Undecided(), processing=odd), tmp_path / "undecided")
    with pytest.raises(RunError, match=r"unet predicts with the statistics of each batch .*use --to safetensors"):
        export_onnx.write_onnx(replace(predictor, network=OnBatchStatistics(predictor.network)), tmp_path / "batch")
    monkeypatch.setattr(export_onnx, "LIMIT", 100)
    with pytest.raises(RunError, match=r"unet: .* GiB of weights, and a file of ONNX holds 2; use --to safetensors"):
        export_onnx.write_onnx(predictor, tmp_path / "large")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed", "run"]


@pytest.mark.slow
def test_an_ensemble_of_views_is_one_file(tmp_path):
    predictor = written(tmp_path / "run", 3)
    views = [ViewNetwork(predictor.network, view) for view in standard_views(3, 3)]
    for regions in (False, True):
        ensemble = Ensemble(views, regions=regions).eval()
        again, described = export_onnx.write_onnx(replace(predictor, network=ensemble), tmp_path / f"views {regions}")
        assert described["input"]["shape"][2:] == ["16*size_0", "16*size_1", "16*size_2"]
        image = torch.randn(2, 1, 16, 32, 16)
        with torch.no_grad():
            assert (again(image) - ensemble(image)).abs().max() < 1e-4


# -- every network ------------------------------------------------------------------------------------------------------


def table():
    """Return the table of the page: backbone, axes, sizes."""
    page = (ROOT / "docs" / "networks.md").read_text()
    rows = page.split("| backbone | axes in ONNX | sizes of an image |\n|---|---|---|\n")[1].split("\n\n")[0]
    return [tuple(cell.strip() for cell in row.strip("| ").split("|")) for row in rows.splitlines()]


def test_the_page_says_what_is_exported_of_every_network():
    sizes = {name: "that of the patch" if name in export_onnx.FIXED else "any multiple" for name in SMALL}
    assert table() == [(f"`{name}`", "2, 3", sizes[name]) for name in registry.names("backbone")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ndim"),
    sorted_out(
        itertools.product([*SMALL, "deep supervision", "another size"], (2, 3)),
        # in 3-D one of convolutions, and one that looks all around
        lambda name, ndim: ndim == 3 and name not in ("unet", "unetr"),
    ),
)
def test_every_network_can_be_exported(tmp_path, cache, name, ndim):
    import onnx

    patch = (SIDE.get(name, 32),) * ndim
    more = {}
    if name == "deep supervision":
        name, more = "dynunet", {"deep_supervision": True}
    elif name == "another size":  # than positions are laid out for
        name, patch = "unetr", (48, *patch[1:])
    backbone = {"name": name} | {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL[name].items()} | more
    written(tmp_path / "run", ndim, size=patch, backbone=backbone, patch=patch)
    found = export(tmp_path / "run", "onnx", tmp_path / "out", cache=cache)
    assert found["labels_equal"] > 0.999
    plain = json.loads((tmp_path / "out" / "processing.json").read_text())
    read = b" ".join(texts(onnx.load(tmp_path / "out" / "model.onnx")))
    assert not [place for place in (sys.prefix, str(ROOT), str(tmp_path), "site-packages") if place.encode() in read]
    fixed = plain["onnx"]["input"]["shape"][2:] == list(patch)
    assert (f"`{name}`", "2, 3", "that of the patch" if fixed else "any multiple") in table()
