"""Weights from files: what fits, what is adapted, what is refused, and that nothing runs."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from labeleff import registry
from labeleff.backbones.outputs import Unwrapped
from labeleff.backbones.weights import load_weights, read_weights, state_of
from labeleff.batch import Task
from labeleff.errors import RunError


class Net(nn.Module):
    """Two layers that see the image, one that does not, and a statistic."""

    def __init__(self, ndim=2, channels=1, classes=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        conv = nn.Conv2d if ndim == 2 else nn.Conv3d
        norm = nn.BatchNorm2d if ndim == 2 else nn.BatchNorm3d
        self.first, self.norm = conv(channels, 4, 3, padding=1), norm(4)
        self.aside = conv(channels, 4, 1)
        self.head = conv(4, classes, 1)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).relu() + self.aside(x))


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_same_network_under_any_prefix(prefix, wrapped):
    given, network = Net(seed=1), Net(seed=2)
    state = {prefix + name: value for name, value in given.state_dict().items()}
    target = Unwrapped(network, 2) if wrapped else network
    report = load_weights(target, state, channels=1)
    assert equal(given, network)
    assert (report.share, report.used, report.left, report.unused) == (1, 1, (), ())
    assert len(report.matched) == len(state)
    assert report.summary == f"100% of the network filled by 100% of the file: {len(state)} entries match"


def test_colour_weights_on_grey_images_are_the_network_on_grey_in_colour():
    given, network = Net(channels=3, seed=1).eval(), Net(channels=1, seed=2).eval()
    report = load_weights(network, given.state_dict(), channels=1)
    image = torch.randn(1, 1, 8, 8)
    assert torch.allclose(network(image), given(image.expand(-1, 3, -1, -1)), atol=1e-6)
    assert dict(report.adapted) == dict.fromkeys(("first.weight", "aside.weight"), "3 input channels averaged to 1")
    # and the other way round: on images whose channels are alike
    back = Net(channels=2, seed=3).eval()
    load_weights(back, network.state_dict(), channels=2)
    assert torch.allclose(back(image.expand(-1, 2, -1, -1)), network(image), atol=1e-6)


def test_only_convolutions_that_see_the_image_are_adapted():
    given, network = nn.ConvTranspose2d(4, 3, 2), nn.ConvTranspose2d(4, 1, 2)  # its second axis is what comes out
    with pytest.raises(RunError, match=r"weight is left \(\[4, 3, 2, 2\] does not fit"):
        load_weights(network, given.state_dict(), channels=1)


@pytest.mark.parametrize("axis", [0, 2])
def test_flat_weights_in_a_volume_are_the_flat_network_on_what_is_constant_along_the_axis(axis):
    given, network = Net(channels=3, seed=1).eval(), Net(3, seed=2).eval()
    report = load_weights(network, given.state_dict(), channels=1, axis=axis)
    assert ("first.weight", "3 input channels averaged to 1; repeated 3 times, divided by 3") in report.adapted
    plane = torch.randn(1, 1, 8, 8)
    volume = plane.unsqueeze(axis + 2).repeat_interleave(7, axis + 2)
    middle = network(volume).select(axis + 2, 3)
    assert torch.allclose(middle, given(plane.expand(-1, 3, -1, -1)), atol=1e-5)


def test_what_does_not_fit_is_named_and_below_the_share_nothing_is_written():
    given, network, before = Net(classes=5, seed=1), Net(seed=2), Net(seed=2)
    state = given.state_dict() | {"extra.weight": torch.zeros(7)}
    numbers = {name: value.numel() for name, value in network.state_dict().items()}
    share = 1 - (numbers["head.weight"] + numbers["head.bias"]) / sum(numbers.values())
    with pytest.raises(
        RunError, match=rf"^here: only {share:.1%} .*head\.weight is left \(\[5, 4, 1, 1\] does not fit"
    ):
        load_weights(network, state, channels=1, what="here")
    assert equal(network, before)
    report = load_weights(network, state, channels=1, minimum=0.5)
    assert report.share == pytest.approx(share)
    assert torch.equal(network.first.weight, given.first.weight)
    assert torch.equal(network.head.weight, before.head.weight)
    assert [name for name, _ in report.left] == ["head.weight", "head.bias"]
    assert set(report.unused) == {"head.weight", "head.bias", "extra.weight"}
    del state["norm.running_mean"]
    with pytest.raises(RunError, match=r"norm\.running_mean is left \(not in the file\)"):
        load_weights(network, state, channels=1)


@pytest.mark.parametrize("where", [(), ("state_dict",), ("network_weights",), ("model", "state_dict")])
def test_torch_files_with_the_state_where_others_put_it(tmp_path, where):
    state = content = Net().state_dict()
    for key in reversed(where):
        content = {"epoch": 3, key: content}
    torch.save(content, tmp_path / "weights.pth")
    read = read_weights(tmp_path / "weights.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["LABELEFF_TRAP"],)


def test_files_that_are_no_weights_get_one_line_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LABELEFF_TRAP", str(tmp_path / "trap"))
    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pt")
    torch.save({"epoch": 3, "model": [1, 2]}, tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(Net().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "empty.pt").write_bytes(b"")
    save_file(Net().state_dict(), tmp_path / "whole.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:500])
    save_file({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.safetensors")
    (tmp_path / "weights.npz").write_bytes(b"")
    said = {
        "hostile.pt": "could run code",
        "none.pt": "holds no weights by name; found epoch, model",
        "list.pt": "found list",
        "torn.pt": "cannot be read",
        "empty.pt": "cannot be read",
        "torn.safetensors": "cannot be read",
        "nan.safetensors": "w holds NaN",
        "weights.npz": r"weights are \.safetensors or torch files",
        "missing.safetensors": "cannot be read",
    }
    for name, words in said.items():
        with pytest.raises(RunError, match=words) as error:
            read_weights(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "trap").exists()


# -- the table of docs/networks.md ----------------------------------------------------------------------------------------


def saved(state, path):
    torch.save(state, path)
    return path


def torn(path):
    saved(Net(seed=1).state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def renamed(state):
    return {name.replace("norm.", "batch_norm."): value for name, value in state.items()}


def dynunet(**options):
    torch.manual_seed(4)
    return registry.get("backbone", "dynunet")(Task(("a", "b"), 2, 1), filters=(4, 8, 8), **options)


NAN = {**Net(seed=1).state_dict(), "head.bias": torch.full((2,), float("nan"))}
ENCODER = {name: value for name, value in Net(seed=1).state_dict().items() if not name.startswith("head")}
TABLE = {
    # case: what makes the file, the network, and words of the report (or, with a cross, of the refusal)
    "the same network": (lambda p: saved(Net(seed=1).state_dict(), p), Net, "100% of the network filled by 100% of the file"),
    "prefixes of wrappers": (
        lambda p: saved({"module.backbone." + k: v for k, v in Net(seed=1).state_dict().items()}, p), Net, "100% of the network",
    ),
    "other input channels": (
        lambda p: saved(Net(channels=3, seed=1).state_dict(), p), Net,
        "9 entries match; adapted: 2 (3 input channels averaged to 1)",
    ),
    "2-D into 3-D": (lambda p: saved(Net(seed=1).state_dict(), p), lambda: Net(3), "repeated 3 times, divided by 3"),
    "deep supervision in the file": (
        lambda p: saved(dynunet(deep_supervision=True).state_dict(), p), dynunet, "100% of the network.* unused, such as '.*heads",
    ),
    "deep supervision in the network": (
        lambda p: saved(state_of(dynunet()), p), lambda: dynunet(deep_supervision=True), "× heads.* is left (not in the file)",
    ),
    "other classes": (
        lambda p: saved(Net(classes=5, seed=1).state_dict(), p), Net, "× head.weight is left ([5, 4, 1, 1] does not fit",
    ),
    "an encoder alone": (lambda p: saved(ENCODER, p), Net, "× head.weight is left (not in the file)"),
    "partly renamed": (lambda p: saved(renamed(Net(seed=1).state_dict()), p), Net, "× norm.weight is left (not in the file)"),
    "another width": (
        lambda p: saved({k: torch.cat((v, v)) if v.ndim else v for k, v in Net(seed=1).state_dict().items()}, p), Net,
        "× first.weight is left ([8, 1, 3, 3] does not fit [4, 1, 3, 3])",
    ),
    "another backbone": (lambda p: saved(state_of(dynunet()), p), Net, "× only 0.0% of the network's numbers are filled"),
    "truncated": (torn, Net, "× these weights cannot be read"),
    "a pickle that runs code": (
        lambda p: saved({"state_dict": Hostile()}, p), Net, "× holds more than tensors and plain values, which could run code",
    ),
    "more than tensors": (
        lambda p: saved({"epoch": np.float64(3), "state_dict": Net().state_dict()}, p), Net, "× save its state as safetensors",
    ),
    "no weights": (lambda p: saved({"epoch": 3, "loss": [0.5]}, p), Net, "× holds no weights by name; found epoch, loss"),
    "numbers that are not finite": (lambda p: saved(NAN, p), Net, "× head.bias holds NaN or infinite values"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_every_case_has_its_report_or_its_refusal(case, tmp_path, monkeypatch):
    make, target, words = TABLE[case]
    monkeypatch.setenv("LABELEFF_TRAP", str(tmp_path / "trap"))
    path, network = make(tmp_path / "weights.pt"), target()
    before = state_of(network)
    pattern = re.escape(words.removeprefix("× ")).replace(r"\.\*", ".*")
    try:
        said, refused = load_weights(network, read_weights(path), channels=1).summary, False
    except RunError as error:
        said, refused = str(error), True
    assert refused == words.startswith("× "), said
    assert re.search(pattern, said), said
    assert "\n" not in said
    changed = any(not torch.equal(before[name], value) for name, value in state_of(network).items())
    assert changed != refused
    assert not (tmp_path / "trap").exists()


def test_the_table_in_the_docs_is_this_one():
    page = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (report|refused)\b", page, re.MULTILINE)
    assert dict(rows) == {
        name: "refused" if words.startswith("× ") else "report" for name, (_, _, words) in TABLE.items()
    }
