"""Label correction: curves counted by hand, triggers, repetition, what is written, and a task where labels get better."""

import io
import json

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from labeleff.annotators.label_correction import LabelCorrection
from labeleff.batch import IGNORE, Batch, Progress, Task
from labeleff.data.annotations import AnnotationStore
from labeleff.edits import Reviewed
from labeleff.errors import RecipeError
from labeleff.functional.adele import correct_labels, correction_epoch
from labeleff.recipe_io import load_recipe
from labeleff.registry import build
from labeleff.runner import run
from labeleff.strategies.adele import Adele
from labeleff.testing import ToyNet, toy_geometry

from ..test_resume import RECIPES

WINDOW = np.arange(1, 101)
FAST = 0.8 * (1 - np.exp(-WINDOW / 1.5))
SLOW = 0.8 * WINDOW / 100
AUTHORS = {"start": "reference", "points": 2, "least": 0.0, "patches": 1}


def batch_of(label, given=None):
    label = torch.as_tensor(label)
    shape = tuple(label.shape[1:])
    image, valid = torch.zeros(len(label), 1, *shape), torch.ones(len(label), 1, *shape, dtype=torch.bool)
    given = label if given is None else torch.as_tensor(given)
    return {"labelled": Batch(image, label, given, valid, toy_geometry(len(label), shape))}


def logits_of(label, classes=3):
    return {"labelled": torch.nn.functional.one_hot(torch.as_tensor(label), classes).movedim(-1, 1).float()}


def observe(annotator, curves, window, *, total=200):
    """Show one window, of two steps, whose IoU of class c is that of the curve: 1000 voxels of which a share is found."""
    label = np.zeros((1, 3, 1000), np.int64)
    found = label.copy()
    for c, curve in enumerate(curves, start=1):
        label[0, c] = c
        found[0, c, : round(1000 * curve[window])] = c
    for step in (2 * window, 2 * window + 1):
        annotator.observe(batch_of(label), logits_of(found), Progress(step, total))


def revised(annotator, steps, cases=(), total=200):
    return list(annotator.revise(cases, Progress(steps, total)))


# -- curves and triggers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [AUTHORS, {}, {"start": "none"}, {"r": 0.5, **AUTHORS}], ids=str)
def test_a_class_is_due_from_the_window_its_curve_says(options):
    annotator = LabelCorrection(**{"patches": 1, **options})
    for window in range(20):
        observe(annotator, (FAST, SLOW), window)
        revised(annotator, 2 * window + 2)
    steps = np.round(1000 * FAST) / 1000
    settings = {"total": 100, "r": options.get("r", 0.9), "skip_flat_start": options.get("start") != "none"}
    settings["start"] = "reference" if options.get("start") == "reference" else "relative"
    least = options.get("points", 4)
    first = next(n for n in range(least, 101) if n - 1 >= correction_epoch(steps[:n], **settings))
    assert annotator.since.tolist() == [-1, first, -1]
    if options == AUTHORS:
        assert first == 6
    assert np.allclose(annotator.curves(20)[1], steps[:20])
    described = annotator.describe(Progress(40, 200))
    assert described["iou/1"] == pytest.approx(steps[:20].tolist())
    assert described["due_since/1"] == first
    assert described["window/2"] == 100


@pytest.mark.parametrize("latest", [0, 6])
def test_a_curve_may_be_judged_by_epochs_of_several_windows(latest):
    annotator = LabelCorrection(**AUTHORS | {"start": "none", "epoch": 5.0, "latest": latest})
    root = 0.7 * (1 - np.exp(-np.sqrt(WINDOW / 5)))
    for window in range(60):
        observe(annotator, (root, SLOW), window)
        revised(annotator, 2 * window + 2)
    steps, total = np.round(1000 * root) / 1000, latest or 20
    options = {"total": total, "skip_flat_start": False, "unit": 0.2}
    first = next(n for n in range(1, 20) if n - 1 >= correction_epoch(steps[: 5 * n], **options))
    assert first == (7 if latest else 8)
    assert annotator.since.tolist() == [-1, 5 * first, 35 if latest else -1]
    assert annotator.describe(Progress(120, 200))["window/2"] == (34 if latest else 100)


def test_an_epoch_of_voc_ends_at_its_last_whole_window():
    """1058 of 20000 steps are an epoch, 100 a window: they look after 10, 21, 31 … windows, and from the 17th on all are due."""
    voc = AUTHORS | {"start": "none", "windows": 200, "epoch": 10.58, "latest": 16, "points": 2}
    annotator, label = LabelCorrection(**voc), np.zeros((1, 2, 8), np.int64)
    label[0, 1] = 1
    due = []
    for step in range(0, 20000, 100):
        found = label * ((step // 100) % 2)  # a curve that is never learnt
        annotator.observe(batch_of(label), logits_of(found), Progress(step, 20000))
    for epoch in range(1, 19):
        list(annotator.revise((), Progress(1058 * epoch, 20000)))
        due.append(annotator.need.tolist()[1:])
    assert [epoch for epoch, classes in enumerate(due, start=1) if all(classes)] == [17, 18]
    ends = [count for count in range(1, 200) if annotator._ends_epoch(count)]
    assert ends == [1058 * epoch // 100 for epoch in range(1, 19)]


def test_epochs_that_the_stage_does_not_have_are_refused():
    with pytest.raises(ValueError, match="end before epoch 17"):
        LabelCorrection(windows=100, epoch=10.0, latest=16)
    label = np.ones((1, 2, 4), np.int64)
    with pytest.raises(RecipeError, match="the stage has 10 windows, and latest = 16 asks for 170"):
        LabelCorrection(windows=200, epoch=10.0, latest=16, patches=1).observe(
            batch_of(label), logits_of(label), Progress(0, 10)
        )


def test_what_a_curve_says_at_the_end_of_an_epoch_holds_until_the_next():
    annotator = LabelCorrection(**AUTHORS | {"start": "none", "epoch": 5.0, "repeat": "present"})
    for window in range(60):
        observe(annotator, (FAST, SLOW), window)
    due = []
    for window in range(20, 60):
        revised(annotator, 2 * window)
        due.append(annotator.need.tolist())
    assert due == [[False, True, False]] * 40


def test_windows_between_two_revisions_are_judged_one_by_one():
    annotator = LabelCorrection(**AUTHORS)
    for window in range(20):
        observe(annotator, (FAST, SLOW), window)
    assert revised(annotator, 39) == []  # the twentieth window is not whole
    assert int(annotator.checked) == 19
    assert annotator.since.tolist() == [-1, 6, -1]


@pytest.mark.parametrize("total", [7, 50, 333])
def test_windows_follow_the_length_of_the_stage(total):
    annotator, label = LabelCorrection(windows=50, patches=1), np.ones((1, 2, 4), np.int64)
    for step in range(total):
        annotator.observe(batch_of(label), logits_of(label), Progress(step, total))
    annotator.gather()
    windows = min(50, total)
    expected = np.bincount([step * windows // total for step in range(total)], minlength=windows) * 8
    assert annotator.counts[:, 2, 1].tolist() == expected.tolist()
    annotator.observe(batch_of(label), logits_of(label), Progress(total, 2 * total))  # the stage was made longer
    assert annotator.counts[:, 2, 1].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("steps", "images", "windows"), [(800, 16, 100), (400, 2, 12), (400, 4, 25), (50, 2, 2), (1, 2, 2)]
)
def test_a_window_holds_as_many_patches_as_it_takes(steps, images, windows):
    annotator, label = LabelCorrection(), np.ones((images, 2, 4), np.int64)
    annotator.observe(batch_of(label), logits_of(label), Progress(0, steps))
    assert len(annotator.counts) == windows


def test_micro_batches_are_patches_of_a_step_too():
    annotator, label = LabelCorrection(), np.ones((4, 2, 4), np.int64)
    annotator.observe(batch_of(label), logits_of(label), Progress(0, 200, micro_batches=4))
    assert len(annotator.counts) == 50  # as of 16 at once


def test_counts_leave_out_what_nobody_labelled_and_can_be_against_either_label():
    given = np.array([[[1, 1, 2, 0, IGNORE, IGNORE]]])
    current = np.array([[[1, 0, 2, 0, 1, IGNORE]]])
    found = np.array([[[1, 1, 0, 2, 1, 1]]])
    expected = {"given": ([2, 0], [2, 1], [2, 1]), "current": ([2, 0], [3, 1], [2, 1])}
    for against, values in expected.items():
        annotator = LabelCorrection(against=against, patches=1)
        annotator.observe(batch_of(current, given), logits_of(found), Progress(0, 10))
        annotator.gather()
        assert tuple(map(list, annotator.counts[0, :, 1:].tolist())) == values
    curve = annotator.curves(1)[1:, 0]
    assert curve.tolist() == pytest.approx([2 / 3, 0])
    annotator.observe(batch_of(current * 0), logits_of(found), Progress(1, 10))
    assert np.isnan(annotator.curves(2)[1:, 1]).all()


def test_it_survives_being_saved_inside_a_window():
    whole, broken = LabelCorrection(**AUTHORS), LabelCorrection(**AUTHORS)
    for window in range(12):
        observe(whole, (FAST, SLOW), window)
        observe(broken, (FAST, SLOW), window)
        if window == 5:
            broken.counts[6:] += 1  # half a window
            whole.counts[6:] += 1
            for annotator in (whole, broken):
                annotator.gather()  # as before every checkpoint
            buffer = io.BytesIO()
            torch.save(broken.state_dict(), buffer)
            buffer.seek(0)
            broken = LabelCorrection(**AUTHORS)
            broken.load_state_dict(torch.load(buffer, weights_only=True))
        for annotator in (whole, broken):
            revised(annotator, 2 * window + 2)
    assert whole.since.tolist() == [-1, 6, -1]
    assert whole.state_dict().keys() == broken.state_dict().keys()
    assert all(torch.equal(v, broken.state_dict()[k]) for k, v in whole.state_dict().items())
    untouched = LabelCorrection()
    untouched.load_state_dict(LabelCorrection().state_dict())
    assert revised(untouched, 100) == []


# -- repetition -------------------------------------------------------------------------------------------------------------


def authors_rounds(trigger, every, windows):
    """The authors' outer loop over epochs, of which ``trigger[c][E]`` says whether the curve is due."""
    need, done, rounds = dict.fromkeys(trigger, False), dict.fromkeys(trigger, False), {}
    for epoch in range(1, windows + 1):
        for c in trigger:
            if not need[c]:
                need[c] = trigger[c][epoch]
        if every == 0 or (every > 0 and epoch % every == 0):
            done = dict.fromkeys(trigger, False)
        for c in trigger:
            if done[c]:
                need[c] = False
        if any(need.values()):
            rounds[epoch] = [c for c in trigger if need[c]]
        for c in trigger:
            if not done[c]:
                done[c] = need[c]
    return rounds


@pytest.mark.parametrize("every", [10, 4, 0, -1])
def test_repetition_is_the_authors_loop(every, monkeypatch):
    generator = np.random.default_rng(3)
    trigger = {c: np.concatenate([np.zeros(5, bool), generator.random(40) < 0.4]) for c in (1, 2)}
    annotator = LabelCorrection(repeat="segthor", every=every, windows=44, patches=1)
    observe(annotator, (FAST, SLOW), 0, total=88)
    rounds = {}
    for window in range(1, 45):
        due = iter([trigger[c][window] for c in (1, 2) if not annotator.need[c]])
        monkeypatch.setattr(annotator, "_from", lambda curve, due=due: 0 if next(due) else 44)
        classes = annotator._due(Progress(2 * window, 88))
        assert annotator._due(Progress(2 * window, 88)) == []  # nothing new
        if classes:
            rounds[window] = classes
    assert rounds == authors_rounds(trigger, every, 44)


def test_a_latched_class_stays_due():
    annotator = LabelCorrection(**AUTHORS)
    for window in range(10):
        observe(annotator, (FAST, SLOW), window)
    assert [annotator._due(Progress(s, 200)) for s in (10, 12, 20, 20)] == [[], [1], [1], [1]]


def test_a_plateau_before_a_class_is_learned_fires_for_good_or_for_a_while():
    late = 0.2 * (1 - np.exp(-WINDOW / 1.5)) + 0.7 / (1 + np.exp(-(WINDOW - 30) / 3))
    due = {}
    for repeat in ("latch", "present"):
        annotator = LabelCorrection(repeat=repeat, least=0.0, patches=1)
        for window in range(70):
            observe(annotator, (late, SLOW), window)
        due[repeat] = [annotator._due(Progress(s, 200)) for s in (20, 70, 140)]
        assert annotator.since[1] <= 10
    assert due == {"latch": [[1], [1], [1]], "present": [[1], [], [1]]}
    annotator = LabelCorrection(patches=1)  # by default no class is due before it has reached an IoU of 0.3
    for window in range(70):
        observe(annotator, (late, SLOW), window)
    assert [annotator._due(Progress(s, 200)) for s in (20, 50, 140)] == [[], [], [1]]
    assert late[int(annotator.since[1]) - 1] > 0.3


# -- what is written --------------------------------------------------------------------------------------------------------


def due_for(classes, **options):
    """Return an annotator that has found some classes due."""
    annotator = LabelCorrection(**options)
    observe(annotator, (FAST, FAST), 0)
    annotator.need[list(classes)] = True
    annotator.since[list(classes)] = 6
    return annotator


LOOSE = {"threshold": 0.7, "agreement": 0.1}
"""Random predictions are never sure of all they say, nor right more often than once in three times."""


def example(shape=(9, 8), seed=0):
    generator = np.random.default_rng(seed)
    given = generator.integers(0, 3, shape).astype(np.uint8)
    given[0] = IGNORE
    probs = torch.as_tensor(2 * generator.normal(size=(1, 3, *shape)), dtype=torch.float32).softmax(1)
    return given, probs


@pytest.mark.parametrize("classes", [(1,), (1, 2)])
def test_corrections_go_through_the_store_with_their_confidence(tmp_path, classes):
    given, probs = example()
    lacking = np.where(given == 1, 0, given).astype(np.uint8)
    store = AnnotationStore.create(tmp_path, {"a": (9, 8), "b": (9, 8)}, [("a", given), ("b", lacking)])
    cases = [Reviewed(n, probs, store.read(n, revision=0), store.read_given(n), (1.0, 1.0)) for n in "ab"]
    edits = revised(due_for(classes, **LOOSE), 2, cases)
    store.apply(edits, step=2, stage=0, author="label_correction")
    for case in cases:
        expected = correct_labels(torch.from_numpy(case.given)[None], probs, classes, **LOOSE)[0].numpy()
        assert np.array_equal(store.read(case.case, revision=1), expected)
        changed = case.given != expected
        found = {k: v for e in store.history() if e["case"] == case.case for k, v in e["voxels"].items()}
        pairs = zip(case.given[changed], expected[changed], strict=True)
        names, counts = np.unique([f"{a}->{b}" for a, b in pairs], return_counts=True) if changed.any() else ((), ())
        assert found == dict(zip(names, counts, strict=True))
        for entry in (e for e in store.history() if e["case"] == case.case):
            (before, after), *rest = (map(int, k.split("->")) for k in entry["voxels"])
            assert not rest
            where = (case.given == before) & (expected == after)
            assert entry["confidence"] == pytest.approx(float(probs[0, after].numpy()[where].mean()))
            assert entry["author"] == "corrected"
            assert entry["note"].startswith("due since window 6 (class 1)")
    assert {e["case"] for e in store.history()} == ({"a"} if classes == (1,) else {"a", "b"})


@pytest.mark.parametrize("source", ["given", "current"])
def test_what_is_corrected(source):
    given, probs = example()
    current = given.copy()
    current[1:4] = 1
    current[0] = 2  # said by a pseudo-label: nobody gave it
    case = Reviewed("a", probs, current, given, (1.0, 1.0))
    label = current.copy()
    for edit in revised(due_for((1, 2), source=source, **LOOSE), 2, [case]):
        box = tuple(slice(o, o + n) for o, n in zip(edit.origin, edit.label.shape, strict=True))
        label[box][edit.mask] = edit.label[edit.mask]
    base = np.where(given == IGNORE, current, given) if source == "given" else current
    assert np.array_equal(label, correct_labels(torch.from_numpy(base)[None], probs, (1, 2), **LOOSE)[0].numpy())


@pytest.mark.parametrize("axis", [0, 2])
def test_slices_as_images(axis):
    given, probs = example((5, 6, 4))
    given[(slice(None),) * axis + (1,)] = 0  # a slice without foreground
    case = Reviewed("a", probs, given, given, (1.0,) * 3)
    label = given.copy()
    for edit in revised(due_for((1, 2), slice_axis=axis, **LOOSE), 2, [case]):
        box = tuple(slice(o, o + n) for o, n in zip(edit.origin, edit.label.shape, strict=True))
        label[box][edit.mask] = edit.label[edit.mask]
    for number in range(given.shape[axis]):
        cut = np.take(given, number, axis), probs[0].numpy().take(number, axis + 1)
        expected = correct_labels(*(torch.from_numpy(a)[None] for a in cut), (1, 2), **LOOSE)[0].numpy()
        assert np.array_equal(np.take(label, number, axis), expected)


def test_while_nothing_is_due_nothing_is_predicted():
    def cases():
        raise AssertionError("a case was predicted")
        yield

    annotator = LabelCorrection()
    assert revised(annotator, 0, cases()) == []
    observe(annotator, (SLOW, SLOW), 0)
    assert revised(annotator, 2, cases()) == []


def test_what_is_refused():
    assert LabelCorrection.role == "labelled"
    with pytest.raises(RecipeError, match="does not hand them back: use adele"):
        LabelCorrection().observe(batch_of(np.zeros((1, 2, 2), np.int64)), {}, Progress(0, 1))
    for options in ({"threshold": 1.2}, {"agreement": -0.1}, {"r": 1.0}, {"windows": 1}, {"points": 1}):
        with pytest.raises(RecipeError, match="annotator 'label_correction'"):
            build("annotator", "label_correction", **options)


def test_a_run_corrects_its_labels_and_writes_the_curves_down(tmp_path, cache):
    run(load_recipe(RECIPES["label_correction"]), tmp_path, cache=cache)
    changes = AnnotationStore.open(tmp_path / "annotations").history()
    assert {(c["by"], c["author"]) for c in changes} == {("label_correction", "corrected")}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "annotator" in line]
    assert [line["step"] for line in told] == [3, 6, 9, 10]  # and at the end of the stage
    assert [len(line["annotator"]["iou/1"]) for line in told] == [1, 3, 4, 5]  # windows of two steps
    assert {c["step"] for c in changes} == {6, 9}


# -- it helps ---------------------------------------------------------------------------------------------------------------


def discs(count, generator):
    """Return images [N, 1, 32, 32] of discs, clean labels, and labels of which every fourth is dilated by 3 voxels."""
    rows, columns = np.mgrid[:32, :32]
    clean = np.zeros((count, 32, 32), np.uint8)
    for label in clean:
        x, y, radius = *generator.integers(10, 22, 2), generator.integers(4, 8)
        label[(rows - x) ** 2 + (columns - y) ** 2 <= radius**2] = 1
    noisy = clean.copy()
    for label in noisy[::4]:
        label |= binary_dilation(label, iterations=3)
    image = clean + 0.3 * generator.normal(size=clean.shape)
    return torch.as_tensor(image[:, None], dtype=torch.float32), clean, noisy


def test_corrected_labels_are_closer_to_the_clean_ones():
    image, clean, noisy = discs(24, np.random.default_rng(0))
    task, total = Task(("background", "disc"), 2), 80
    torch.manual_seed(0)
    backbone, strategy, annotator = ToyNet(task), Adele(), LabelCorrection(windows=20, patches=1)
    strategy.build(backbone, task)
    optimiser = torch.optim.AdamW(backbone.parameters(), lr=2e-2)
    generator = np.random.default_rng(1)
    for step in range(total):
        pick = generator.integers(0, 24, 8)
        batch = batch_of(noisy[pick].astype(np.int64))
        batch["labelled"] = batch["labelled"]._replace(image=image[pick])
        strategy.set_modes(backbone)
        output = strategy.step(backbone, batch, Progress(step, total))
        optimiser.zero_grad()
        sum(output.losses.values()).backward()
        optimiser.step()
        annotator.observe(batch, output.logits, Progress(step, total))
    backbone.eval()
    with torch.no_grad():
        probs = backbone(image).softmax(1)
    cases = [Reviewed(str(i), probs[i][None], noisy[i], noisy[i], (1.0, 1.0)) for i in range(24)]
    corrected = noisy.copy()
    for edit in revised(annotator, total, cases, total):
        box = tuple(slice(o, o + n) for o, n in zip(edit.origin, edit.label.shape, strict=True))
        corrected[int(edit.case)][box][edit.mask] = edit.label[edit.mask]
    assert int(annotator.since[1]) > 0
    assert (corrected != clean).sum() < 0.6 * (noisy != clean).sum()
    assert ((corrected != clean) & (noisy == clean)).sum() < 0.02 * (clean == 1).sum()
