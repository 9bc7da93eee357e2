"""Planted leaks are found and named; what only looks usual is left alone."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from labeleff.cli import app
from labeleff.data import lookalikes
from labeleff.data.audit import audit, classes_in, confounded, label_warnings
from labeleff.data.checkup import Checkup, check_up, spacing_outliers
from labeleff.data.formats.compact import Compact
from labeleff.data.formats.manifest_file import ManifestFile
from labeleff.data.lookalikes import factors_for, matches, reduced
from labeleff.data.manifest import Case, Manifest, Source, write_manifest
from labeleff.data.split import make_split
from labeleff.errors import SplitError
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe

from ..conftest import tiny
from .layouts import AFFINES, picture, save

FLAT, SOLID = (96, 110), (44, 40, 30)


def tissue(number, shape, *, sigma=2.0):
    """Return an image [1, *S] of its own, uint8, with a bright body that all images share."""
    random = np.random.default_rng(number)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    body = ndimage.gaussian_filter(90.0 * ((grid**2).sum(0) < 0.8), 6)
    texture = ndimage.gaussian_filter(random.normal(size=shape), sigma)
    return np.clip(body + 60 + 35 * texture / texture.std(), 0, 255).astype(np.uint8)[None]


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image[0]).save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(io.BytesIO(buffer.getvalue())))[None]


COPIES = {
    "mirrored": ("mirrored", FLAT, lambda x: x[:, :, ::-1]),
    "upside down": ("mirrored", FLAT, lambda x: x[:, ::-1]),
    "turned": ("turned", FLAT, lambda x: np.swapaxes(x, 1, 2)),
    "saved again with losses": ("", FLAT, jpeg),
    "brighter": ("", FLAT, lambda x: np.clip(x.astype(float) * 0.8 + 30, 0, 255).astype(np.uint8)),
    "another size": ("", FLAT, lambda x: ndimage.zoom(x, (1, 0.7, 0.7), order=1)),
    "a crop": ("a crop of", FLAT, lambda x: x[:, 5:-6, 7:-14]),
    "a small crop": ("a crop of", FLAT, lambda x: x[:, 31:81, 13:75]),
    "a few rows less": ("a crop of", FLAT, lambda x: x[:, 1:-1, 2:]),
    "a crop with losses": ("a crop of", FLAT, lambda x: jpeg(x[:, 9:-9, 3:-20])),
    "a mirrored volume": ("mirrored", SOLID, lambda x: x[:, ::-1]),
    "a volume mirrored twice": ("mirrored", SOLID, lambda x: x[:, ::-1, ::-1]),
    "a cropped volume": ("a crop of", SOLID, lambda x: x[:, 3:-4, 5:-2, 2:-3]),
    "slices left out": ("a crop of", SOLID, lambda x: x[..., 6:]),
}


def looked_for(images):
    factors = factors_for([image.shape[1:] for image in images.values()])
    small = {name: reduced(image, factors) for name, image in images.items()}
    return matches(small, factors=factors, full=images.__getitem__, apart=lambda one, two: True)[0]


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found(name):
    how, shape, change = COPIES[name]
    images = {f"i{n}": tissue(n, shape) for n in range(6)}
    images["copy"] = np.ascontiguousarray(change(images["i3"]))
    found = [match for match in looked_for(images) if match.is_copy]
    assert [(match.one, match.two, match.how) for match in found] == [("i3", "copy", how)]


def test_images_of_one_kind_are_no_copies():
    for shape in (FLAT, SOLID):
        assert looked_for({f"i{n}": tissue(n, shape) for n in range(12)}) == []
    blank = {f"b{n}": np.full((1, 40, 40), n, np.uint8) for n in range(3)}
    assert looked_for(blank) == []


def test_a_frame_that_all_images_share_is_no_sign_of_copies():
    """Fans of ultrasound: the same bright edge everywhere, noise of their own inside."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    fan = (np.hypot(x, y + 1) < 1.6) & (np.abs(x) < 0.6 * (y + 1))
    images = {f"i{n}": (fan * (150 + 0.2 * tissue(n, (64, 64))[0]))[None].astype(np.float32) for n in range(10)}
    assert looked_for(images) == []
    images["copy"] = images["i3"][:, :, ::-1].copy()
    assert [(m.one, m.two) for m in looked_for(images) if m.is_copy] == [("i3", "copy")]
    few = {name: images[name] for name in ("i0", "i1", "i2")}
    assert not any(match.is_copy for match in looked_for(few))


def test_too_many_images_are_not_compared_and_that_is_said(monkeypatch):
    images = {f"i{n}": reduced(tissue(n // 2, FLAT), (2, 2)) for n in range(4)}
    monkeypatch.setattr(lookalikes, "MOST", 3)
    found, unsaid = matches(images, factors=(2, 2), full=images.__getitem__, apart=lambda one, two: True)
    assert (found, unsaid) == ([], "copies whose files differ were not looked for: 4 images, more than 3")


def test_neighbours_look_alike():
    """Two slices that share half of what they show are a warning, not the same image."""
    one, two, new = (tissue(n, FLAT).astype(float) for n in range(3))
    images = {"a": one, "b": 0.6 * one + 0.4 * new, "c": two}
    (match,) = looked_for(images)
    assert (match.one, match.two, match.is_copy) == ("a", "b", False)


def test_reduced_is_the_mean_of_blocks():
    image = np.random.default_rng(0).normal(size=(2, 7, 9)).astype(np.float32)
    found = reduced(image, (3, 4))
    grey = image.mean(0)[0:6, 0:8]
    for y in range(2):
        for x in range(2):
            assert found[y, x] == pytest.approx(grey[3 * y : 3 * y + 3, 4 * x : 4 * x + 4].mean(), abs=1e-6)


# -- in a run -----------------------------------------------------------------------------------------------------------


def data_set(folder, images, *, roles=None, domains=None, labels=None):
    """Write pictures with labels and a manifest that names them; return its path."""
    cases = []
    for name, image in images.items():
        path = picture(folder / "images" / f"{name}.png", image[0])
        label = (labels or {}).get(name, (image[0] > 120).astype(np.uint8))
        source = Source(picture(folder / "labels" / f"{name}.png", label)) if label is not None else None
        role = (roles or {}).get(name, "train")
        cases.append(Case(name, name, (Source(path),), source, (domains or {}).get(name, ""), role))
    write_manifest(Manifest("tiles", tuple(cases), ("background", "cell"), 2), folder / "m.json")
    return folder / "m.json"


def recipe_of(path):
    spec = {"dataset": {"name": "manifest", "path": str(path)}, "labelled": 2, "patch": [32, 32]}
    return load_recipe(tiny(data=spec, stages=[{"strategy": "supervised", "steps": 1, "batch": 1}]))


def test_a_leak_stops_a_run_before_it_starts(tmp_path):
    images = {f"i{n}": tissue(n, FLAT) for n in range(6)}
    path = data_set(tmp_path, images | {"copy": images["i3"][:, ::-1]}, roles={"copy": "test", "i5": "test"})
    with pytest.raises(SplitError, match=r"'i3' \((un)?labelled\) and 'copy' \(test\) are the same image, mirrored"):
        prepare(recipe_of(path), tmp_path / "run", cache=tmp_path / "cache")
    assert not (tmp_path / "run" / "annotations").exists()


def test_the_verdict_stays_with_the_run(tmp_path):
    images = {f"i{n}": tissue(n, FLAT) for n in range(6)}
    silent = dict.fromkeys(images, np.zeros(FLAT, np.uint8))
    domains = {"i5": "there"} | dict.fromkeys([f"i{n}" for n in range(5)], "here")
    path = data_set(tmp_path, images, roles={"i5": "test"}, domains=domains, labels=silent)
    found = prepare(recipe_of(path), tmp_path / "run", cache=tmp_path / "cache")
    written = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert written["verdict"] == found.audit.verdict
    assert written["verdict"].startswith(
        "no leaks, 4 warnings; checked: patients, same images, images that look the same, sites"
    )
    text = " ".join(written["warnings"])
    assert "labels of 2 of 2 cases hold background only" in text
    assert "the class 'cell' is in none of 2 labels" in text
    assert "labelled cases are of here, test cases of there (1 cases): no site is in both" in text
    assert list((tmp_path / "cache").glob("*/reduced-zscore-2x2.npy"))
    again = prepare(recipe_of(path), tmp_path / "run", cache=tmp_path / "cache")
    assert again.audit == found.audit


def test_pairs_of_one_patient_and_of_training_are_no_leaks():
    cases = tuple(
        Case(f"c{n}", f"p{n}", (Source("x"),), Source("x"), "", "test" if n > 3 else "train") for n in range(6)
    )
    manifest = Manifest("m", cases, ("background", "cell"), 2)
    split = make_split(manifest, labelled=2)
    images = {f"c{n}": tissue(n, FLAT) for n in range(6)}
    images["c1"] = images["c0"][:, ::-1]

    class Store:
        shape = staticmethod(lambda name: images[name].shape[1:])
        reduced = staticmethod(lambda name, factors: reduced(images[name], factors))
        read = staticmethod(lambda name: images[name])
        kept = staticmethod(lambda name, make: make())

    contents = {name: name for name in images}
    assert audit(manifest, split, contents=contents, images=Store()).leaks == ()
    images["c5"] = images["c0"][:, :, ::-1]
    assert len(audit(manifest, split, contents=contents, images=Store()).leaks) == 2  # of c0, and of its copy c1


def test_sites_and_classes_that_cannot_be_told_apart():
    cases = tuple(Case(f"c{n}", f"p{n}", (Source("x"),), Source("x"), "ab"[n % 2]) for n in range(8))
    manifest = Manifest("m", cases, ("background", "liver", "spleen"), 2)
    assert confounded(manifest, {"labelled": ["c0", "c1"], "test": ["c2", "c3"]}) == []
    assert confounded(manifest, {"labelled": ["c0"], "test": ["c2", "c3"]}) == [
        "test cases of b (1 cases): no labelled case is of there"
    ]
    only = label_warnings(manifest, {f"c{n}": frozenset({0, 1, 2} if n % 2 else {0, 1}) for n in range(8)})
    assert only == ["the class 'spleen' is in labels of b only: site and class cannot be told apart"]


def test_bits_are_the_regions_they_stand_for():
    manifest = Manifest("m", (Case("c", "p", (Source("x"),)),), ("background", "a", "b", "c"), 2, overlapping=True)
    assert classes_in(np.array([[0, 5], [4, 255]], np.uint8), manifest) == {0, 1, 3, 255}
    assert label_warnings(manifest, {"c": frozenset({0, 1, 3})}) == ["the class 'b' is in none of 1 labels"]


# -- on its own -----------------------------------------------------------------------------------------------------------


def test_what_is_broken_is_named_case_by_case(tmp_path):
    images = {f"i{n}": tissue(n, FLAT) for n in range(5)}
    path = data_set(tmp_path, images, roles={"i4": "test"}, labels={"i1": np.full(FLAT, 7, np.uint8)})
    (tmp_path / "images" / "i0.png").write_bytes(b"torn")
    picture(tmp_path / "images" / "i2.png", np.zeros((*FLAT,), np.uint8))
    picture(tmp_path / "labels" / "i3.png", np.zeros((9, 9), np.uint8))
    picture(tmp_path / "labels" / "i4.png", np.full(FLAT, 7, np.uint8))
    done = CliRunner().invoke(app, ["audit", str(path), "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 2
    for said in (
        "broken: case 'i0':",
        "broken: case 'i1': ",
        "label value 7 is no class",
        "warning: case 'i2':",
        "the image is 0 everywhere",
        "broken: case 'i3':",
        "the label has shape (9, 9)",
        "test labels were not opened",
    ):
        assert said in done.output, done.output
    assert "case 'i4'" not in done.output
    kinds = [finding["kind"] for finding in json.loads((tmp_path / "found.json").read_text())["findings"]]
    assert kinds.count("broken") == 4  # the torn image has a label that cannot be compared with it either
    opened = check_up(ManifestFile(path=str(path)), test_labels=True)
    assert any("case 'i4'" in finding.text for finding in opened.findings)


def test_a_sound_data_set(tmp_path):
    path = data_set(tmp_path, {f"i{n}": tissue(n, FLAT) for n in range(4)}, roles={"i3": "test"})
    done = CliRunner().invoke(app, ["audit", str(path)])
    assert (done.exit_code, done.output.splitlines()[-1][:31]) == (0, "0 leaks, 0 broken, 0 warnings; "), done.output


def test_spacing_and_orientation_that_stand_out(tmp_path):
    cases = [Case(f"c{n}", f"p{n}", (Source("x"),), spacing=(1.0, 1.0, 3.0 + n / 50)) for n in range(9)]
    assert spacing_outliers(cases) == []
    cases.append(Case("odd", "p", (Source("x"),), spacing=(1.0, 1.0, 0.3)))
    (text,) = spacing_outliers(cases)
    assert text.startswith("case 'odd': spacing 1 × 1 × 0.3 mm, the usual one is 1 × 1 × 3.07 mm")
    rows = []
    for number in range(6):
        matrix = AFFINES["oblique" if number == 4 else "left-handed" if number == 5 else "plain"]
        image = save(tmp_path / f"v{number}.nii.gz", tissue(number, (12, 12, 12))[0], matrix)
        rows.append(Case(f"v{number}", f"v{number}", (Source(image),), spacing=(1.0, 1.0, 1.0)))
    write_manifest(Manifest("v", tuple(rows), ("background", "a"), 3), tmp_path / "m.json")
    found = [finding.text for finding in check_up(ManifestFile(path=str(tmp_path / "m.json"))).findings]
    assert "stored LAS, where most are RAS: v5" in found
    assert any(text.startswith("case 'v4': tilted by") for text in found)


def test_many_of_a_kind_are_counted_in_the_terminal_and_named_in_the_file():
    found = Checkup()
    found.add("leak", *"abc")
    found.add("warning", *"defg", group="letters")
    assert list(found.lines(shown=2)) == [
        "leak: a", "leak: b", "leak: c", "warning: d", "warning: e", "warning: 2 more letters (--json names all)",
    ]  # fmt: skip
    assert [f["text"] for f in found.to_dict()["findings"]] == list("abcdefg")


def test_a_compressed_file_that_was_overwritten_is_found(tmp_path):
    """Readers stop before the checksum at the end of the file, and return wrong voxels."""
    path = save(tmp_path / "v.nii.gz", tissue(0, (30, 30, 30))[0])
    case = Case("v", "v", (Source(path),))
    write_manifest(Manifest("v", (case,), ("background", "a"), 3), tmp_path / "m.json")
    assert check_up(ManifestFile(path=str(tmp_path / "m.json"))).is_sound
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    (finding,) = check_up(ManifestFile(path=str(tmp_path / "m.json"))).findings
    assert (finding.kind, "case 'v'" in finding.text, "damaged since" in finding.text) == ("broken", True, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "copies", "leaks"), [("left_atrium_half", 1, 0), ("acdc_128", 4, 0), ("nuclei_128", 0, 0)]
)
def test_false_alarms_on_real_sets(real_data, name, copies, leaks):
    """Patients 74 and 76 of ACDC are the same person, two frames each; of the left atria, one scan is there twice."""
    found = check_up(Compact(path=str(real_data / name)))
    assert sum("same image" in finding.text or "crop" in finding.text for finding in found.findings) == copies
    assert sum(finding.kind == "leak" for finding in found.findings) == leaks
