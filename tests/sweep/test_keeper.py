"""A run directory that is copied while the run goes on, and a copy that is cut off anywhere."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from labeleff.learner import Learner
from labeleff.recipe_io import load_recipe
from labeleff.rundir import RunDirectory
from labeleff.runner import run
from labeleff.sweep.keeper import Keeper, install, landmarks, pack, unpack

from ..conftest import tiny
from ..test_resume import RECIPES, outcome


class AbandonedError(Exception):
    pass


def names(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as content:
        return content.getnames()


def abandoned(recipe, folder, cache, monkeypatch, step):
    """Run a recipe and give up after a step."""
    plain, count = Learner.optimizer_step, [0]

    def optimizer_step(self, *args, **options):
        plain(self, *args, **options)
        count[0] += 1
        if count[0] == step:
            raise AbandonedError

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "optimizer_step", optimizer_step)
        with pytest.raises(AbandonedError):
            run(recipe, folder, cache=cache)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The undisturbed run, in which labels are revised on the way."""
    folder = tmp_path_factory.mktemp("whole")
    run(load_recipe(RECIPES["pseudo_labels"]), folder, cache=cache)
    return folder


@pytest.fixture(scope="module")
def pushes(tmp_path_factory, cache):
    """What a run sends that is given up after six steps, and again after five more."""
    node, recipe = tmp_path_factory.mktemp("pushes") / "node", load_recipe(RECIPES["pseudo_labels"])
    with pytest.MonkeyPatch.context() as patch:
        abandoned(recipe, node, cache, patch, 6)
        first = pack(node, {})
        abandoned(recipe, node, cache, patch, 5)
    return first, pack(node, first.marks)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.99])
def test_a_push_that_is_cut_off_anywhere_resumes_like_the_run_itself(
    share, pushes, whole, tmp_path, cache, monkeypatch
):
    recipe, kept = load_recipe(RECIPES["pseudo_labels"]), tmp_path / "kept"
    first, second = pushes
    install(first, kept)
    assert 0 < len(names(second.archive)) < len(second.marks)
    left = [int(share * len(names(second.archive)))]
    replace = Path.replace

    def cut_off(self, target):
        left[0] -= 1
        if left[0] < 0:
            raise AbandonedError
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut_off)
        with pytest.raises(AbandonedError):
            install(second, kept)
    assert (kept / ".incoming").exists()
    unpack(pack(kept, {}).archive, tmp_path / "another")
    run(recipe, tmp_path / "another", cache=cache)
    assert outcome(tmp_path / "another") == outcome(whole)
    install(pack(tmp_path / "another", {}), kept)
    assert outcome(kept) == outcome(whole)
    assert not (kept / ".incoming").exists()
    assert {p.name for p in kept.rglob("*.ckpt")} == {p.name for p in (tmp_path / "another").rglob("*.ckpt")}


def test_what_relies_on_others_is_read_first_and_put_in_place_last(whole):
    order = names(pack(whole, {}).archive)
    place = {name: order.index(name) for name in order}
    assert order[0] == "summary.json"
    newest, older = sorted((n for n in order if n.endswith(".ckpt")), reverse=True)
    assert place[newest] < place[older] < place[newest.replace(".ckpt", ".sha256")] < place["annotations/current"]
    revision = min(place[n] for n in order if n.startswith("annotations/revisions"))
    label = min(place[n] for n in order if n.startswith("annotations/labels"))
    assert place["annotations/current"] < revision < label
    assert place[newest] < place["metrics.jsonl"]
    assert not any(part.startswith(".") for name in order for part in Path(name).parts)


def test_only_what_has_changed_is_sent(tmp_path):
    (tmp_path / "split.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    first = pack(tmp_path, {})
    assert not names(pack(tmp_path, first.marks).archive)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n{"st')
    parcel = pack(tmp_path, first.marks)
    assert names(parcel.archive) == ["metrics.jsonl"]
    unpack(parcel.archive, tmp_path / "there")
    assert (tmp_path / "there" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_no_line_about_an_opening_is_lost(tmp_path):
    node, kept = tmp_path / "node", tmp_path / "kept"
    node.mkdir()
    line = [json.dumps({"time": number}) + "\n" for number in range(3)]
    for here, there in (((0,), (0,)), ((0, 1), (0, 1)), ((2,), (0, 1, 2)), ((2, 2), (0, 1, 2, 2))):
        (node / "test_openings.jsonl").write_text("".join(line[i] for i in here))
        install(pack(node, {}), kept)
        assert (kept / "test_openings.jsonl").read_text() == "".join(line[i] for i in there)
    (node / "test_openings.jsonl").unlink()
    install(pack(node, {}), kept)
    assert (kept / "test_openings.jsonl").exists()


def test_an_attempt_that_was_taken_for_dead_is_not_listened_to(tmp_path):
    node = tmp_path / "node"
    node.mkdir()
    (node / "split.json").write_text("new")
    keeper = Keeper({"a": (tmp_path / "kept", tmp_path / "logs" / "a.log")})
    assert keeper.begin("a", "first")[1] == b""
    assert keeper.push("a", "first", pack(node, {}), b"said\n")
    archive, log = keeper.begin("a", "second")
    assert names(archive) == ["split.json"]
    assert log == b"said\n"
    (node / "split.json").write_text("newer")
    assert not keeper.push("a", "first", pack(node, {}), b"")
    assert (tmp_path / "kept" / "split.json").read_text() == "new"
    assert (tmp_path / "logs" / "a.log").read_bytes() == b"said\n"


def test_nothing_is_written_outside(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    with pytest.raises(tarfile.FilterError):
        unpack(buffer.getvalue(), tmp_path / "inside")
    assert not (tmp_path / "outside").exists()


def test_a_checkpoint_or_an_opening_is_worth_a_push(tmp_path):
    import torch

    before = landmarks(tmp_path)
    RunDirectory(tmp_path / "baseline").save_checkpoint({"stage": 0, "step": 1, "value": torch.tensor(1)})
    middle = landmarks(tmp_path)
    (tmp_path / "test_openings.jsonl").write_text("{}\n")
    assert before < middle < landmarks(tmp_path)


def test_a_run_of_its_baseline_and_itself_travels(tmp_path, cache):
    recipe = load_recipe(tiny(baseline=[{"strategy": "supervised", "steps": 4, "batch": 4}]))
    run(recipe, tmp_path / "node", cache=cache)
    order = names(pack(tmp_path / "node", {}).archive)
    assert order[:3] == ["comparison.json", "summary.json", "baseline/summary.json"]
    install(pack(tmp_path / "node", {}), tmp_path / "kept")
    assert outcome(tmp_path / "kept" / "baseline") == outcome(tmp_path / "node" / "baseline")
