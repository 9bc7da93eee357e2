"""What weights have learnt from travels with them, and stops a run that would test on it."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from labeleff import registry
from labeleff.data import provenance
from labeleff.data.provenance import Provenance, provenance_from, provenance_in
from labeleff.errors import RunError
from labeleff.export import export
from labeleff.predictor import open_predictor
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe
from labeleff.runner import run

from .conftest import tiny

OTHER_TEST = {"name": "phantom", "patients": 4, "test": 7, "size": [32, 32], "slices": 2}
"""A data set whose test patients 4 … 7 are training patients of the tiny recipe."""


def recipe(*stages, dataset=None, evaluation=None, **data):
    values = tiny(stages=[{"strategy": "supervised", "steps": 1, "batch": 2, **stage} for stage in stages])
    values["data"] |= {"dataset": dataset or values["data"]["dataset"], **data}
    values["evaluation"] |= evaluation or {}
    return load_recipe(values)


def digests(dataset, keep):
    """Return digests of images as they came, computed from what their bytes are."""
    found = set()
    for case in dataset.manifest().cases:
        if keep(case):
            image = dataset.read_image(case)
            text = f"{image.dtype}{image.shape}".encode() + image.tobytes()
            found.add(hashlib.sha256(text).hexdigest()[:16])
    return found


def header_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["labeleff"])


@pytest.fixture(scope="module")
def first(tmp_path_factory, cache):
    """A run that learns from all training patients, seen at another size of voxels than later runs."""
    folder = tmp_path_factory.mktemp("first")
    stage = {"strategy": "mean_teacher", "streams": {"unlabelled": {"batch": 1}}}
    run(recipe(stage, spacing=[4.0, 4.0], patch=[40, 40]), folder, cache=cache)
    return folder / "predictor.safetensors"


@pytest.fixture(scope="module")
def stranger(first, tmp_path_factory):
    """The same weights without a word about where they come from."""
    path = tmp_path_factory.mktemp("stranger") / "theirs.pt"
    torch.save(load_file(first), path)
    return path


def test_a_file_says_what_was_seen_and_how(first, tmp_path):
    dataset = registry.build("dataset", "phantom", patients=8, test=3, size=(32, 32), slices=2)
    header = header_of(first)
    assert provenance_in(first) == Provenance(frozenset(digests(dataset, lambda c: c.role == "train")), ("phantom",))
    assert load_recipe(header["recipe"]).seed == 0
    assert header["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    export(first, "safetensors", tmp_path / "out")
    assert header_of(tmp_path / "out" / "model.safetensors") == header
    assert open_predictor(tmp_path / "out" / "model.safetensors").header == header


@pytest.mark.parametrize(
    ("stage", "changes", "seen"),
    [
        ({}, {}, {"labelled"}),  # what no stream is bound to was not seen
        ({"strategy": "mean_teacher"}, {"labelled": 3, "validation": 1}, {"labelled", "unlabelled"}),
        ({}, {"labelled": 3, "validation": 1, "evaluation": {"every": 1}}, {"labelled", "validation"}),
        ({}, {"evaluate_on": "development", "development": 2}, {"labelled", "test"}),
        ({"steps": 0}, {}, set()),
    ],
    ids=["bound", "unlabelled", "validation", "development", "no steps"],
)
def test_what_counts_as_seen(stage, changes, seen, tmp_path, cache):
    data = prepare(recipe(stage, **changes), tmp_path, cache=cache)
    ids = {case for role in seen for case in getattr(data.split, role)}
    assert data.provenance.cases == digests(data.dataset, lambda c: c.id in ids)


def test_test_cases_that_weights_have_seen_stop_a_run_or_mark_it(first, tmp_path, cache):
    start = {"start": str(first)}
    for stages in ([start], [{}, start]):
        with pytest.raises(RunError) as error:
            run(recipe(*stages, dataset=OTHER_TEST), tmp_path / f"refused-{len(stages)}", cache=cache)
        words = f"stages.{len(stages) - 1}.start: {first} has learnt from 8 test cases ('p0004_s0', 'p0004_s1', "
        assert str(error.value).startswith(words)
        assert "and 3 more" in str(error.value)
        assert "\n" not in str(error.value)
    allowed = recipe(start | {"start_overlap": "allow", "steps": 0}, dataset=OTHER_TEST)
    summary = run(allowed, tmp_path / "marked", cache=cache)
    assert [note for note in summary["notes"] if note.endswith("of this run: not a result")]
    after = provenance_in(tmp_path / "marked" / "predictor.safetensors")
    assert after == provenance_in(first)  # nothing more was seen, and nothing is forgotten


def test_weights_that_say_nothing_are_warned_of_and_remembered(first, stranger, tmp_path, cache, capsys):
    words = f"{stranger} does not say what it has learnt from"
    summary = run(recipe({"start": str(stranger)}), tmp_path / "one", cache=cache)
    assert any(words in note for note in summary["notes"])
    assert (
        "".join(capsys.readouterr().out.split()).count("".join(words.split())) == 2
    )  # as it starts, and with the result
    mine = tmp_path / "one" / "predictor.safetensors"
    assert provenance_in(mine).unknown == (str(stranger),)
    later = prepare(recipe({"start": str(mine)}, {"start": str(first)}), tmp_path / "two", cache=cache)
    assert [start.note.split(" (")[0] for start in later.starts] == [
        f"stages.0.start: {mine} goes back to weights that do not say what they have learnt from",
        "",
    ]
    assert later.provenance.unknown == (str(stranger),)
    assert later.provenance.cases == provenance_in(first).cases


def test_a_resumed_run_needs_the_file_no_more_and_another_file_is_not_taken_for_it(first, tmp_path, cache):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(first.read_bytes())
    given = recipe({"start": str(copy)})
    before = prepare(given, tmp_path / "run", cache=cache)
    save_file(load_file(first), copy)
    with pytest.raises(RunError, match="the file has changed since the run began"):
        before.start(before.backbone(0), given.stages[0], 0)
    copy.unlink()
    assert prepare(given, tmp_path / "run", cache=cache).starts == before.starts
    with pytest.raises(RunError, match=r"copy\.safetensors: these weights cannot be read \(there is no such file\)"):
        prepare(given, tmp_path / "other", cache=cache)
    (tmp_path / "run" / "starts.json").write_text('[{"stage": 0}]')
    with pytest.raises(RunError, match=r"starts\.json: damaged .* --fresh"):
        prepare(given, tmp_path / "run", cache=cache)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", DEEP, "[]", "3", '{"provenance": 3}', '{"provenance": {"cases": ["00"]}}',
     '{"provenance": {"cases": "12345678"}}', '{"provenance": {"cases": "000000000000000G"}}',
     '{"provenance": {"cases": "", "datasets": {"a": 1}}}', '{"provenance": {"cases": "", "unknown": [1]}}', "9" * 5000],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_headers_by_strangers_are_text(text, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"labeleff": text})
    assert provenance_in(path) is None


def test_a_header_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"labeleff": json.dumps({"provenance": {"cases": ""}})})
    assert provenance_in(path) == Provenance()
    monkeypatch.setattr(provenance, "LARGEST", 20)
    assert provenance_in(path) is None
    names = ["\x1b[2J\nname" + "x" * 1000] * 1000
    found = provenance_from({"cases": "", "datasets": names})
    assert len(found.datasets) == 100
    assert found.datasets[0].startswith("[2Jname")
    assert len(found.datasets[0]) < 300
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="these weights cannot be read"):
        provenance_in(path)
