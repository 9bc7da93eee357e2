"""Volume contrast: a step by hand in three generations, how teachers follow, what is cut out, and a run that learns nothing."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from labeleff.batch import IGNORE, Batch, Progress, Task
from labeleff.errors import RecipeError, ShapeError
from labeleff.functional.losses import segmentation_loss
from labeleff.functional.voco import grid_boxes
from labeleff.recipe_io import load_recipe
from labeleff.runner import run
from labeleff.strategies import voco as module
from labeleff.strategies.voco import Projector, Voco
from labeleff.testing import ShortRun, Subject, check_resume, toy_geometry

from ..conftest import tiny

TASK = Task(("background", "one", "two"), 2)
VOLUMES = Task(("background", "one"), 3)
AS_THEY_ARE = {"flip": 0.0, "rot90": 0.0, "offset_probability": 0.0}
EPS = 1e-6


class Small(nn.Module):
    """An encoder of two levels, a decoder, no norm and no dropout."""

    def __init__(self, task):
        super().__init__()
        self.ndim = task.ndim
        convolution, pool = (nn.Conv2d, nn.AvgPool2d) if task.ndim == 2 else (nn.Conv3d, nn.AvgPool3d)
        self.fine = nn.Sequential(convolution(task.channels, 4, 3, padding=1), nn.ReLU())
        self.deep = nn.Sequential(pool(2), convolution(4, 6, 3, padding=1), nn.ReLU())
        self.mixed = nn.Sequential(convolution(10, 4, 1), nn.ReLU())
        self.head = convolution(4, task.num_classes, 1)

    def forward(self, image):
        fine = self.fine(image)
        up = F.interpolate(self.deep(fine), size=image.shape[2:])
        return self.head(self.mixed(torch.cat([fine, up], 1)))


def share(image, *, valid=None, label=None):
    label = torch.full((len(image), *image.shape[2:]), IGNORE) if label is None else label
    valid = torch.ones(len(image), 1, *image.shape[2:], dtype=torch.bool) if valid is None else valid
    return Batch(image, label, label, valid, toy_geometry(len(image), image.shape[2:]))


def windows(count=2, size=(12, 18), seed=0):
    return {"images": share(torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed)))}


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def built(task=TASK, backbone=Small, **options):
    torch.manual_seed(0)
    network, strategy = backbone(task), Voco(**{"width": 5, **options})
    strategy.build(network, task)
    strategy.set_modes(network)
    return network, strategy


# -- a step by hand ---------------------------------------------------------------------------------------------------------


def embedded(network, crops):
    """Both levels of the encoder, averaged over space, by calling them one by one."""
    with torch.no_grad():
        fine = network.fine(torch.from_numpy(np.stack(crops)))
        levels = [fine.double().numpy(), network.deep(fine).double().numpy()]
    return np.concatenate([level.reshape(*level.shape[:2], -1).mean(-1) for level in levels], 1)


def projected(projector, rows):
    """Linear, batch norm and ReLU twice, then Linear, in numpy."""
    weights = [p.detach().double().numpy() for p in projector.parameters()]
    for layer in range(3):
        rows = rows @ weights[2 * layer].T + weights[2 * layer + 1]
        if layer < 2:
            rows = np.maximum(0, (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5))
    return rows


def relu_cosine(a, b):
    return max(0.0, float(a @ b / np.sqrt((a @ a) * (b @ b))))


def entries(y, s, form):
    """Positive and negative part of one volume."""
    top = [(-np.log(1 - abs(b - a) + EPS), 1.0 if form == "v0" else a) for a, b in zip(y, s, strict=True) if a > 0]
    rest = [-np.log(1 - b + EPS) if form == "v2" else b**2 for a, b in zip(y, s, strict=True) if a == 0]
    positive = sum(v * w for v, w in top) / (sum(w for _, w in top) + EPS)
    return positive + sum(rest) / (len(rest) + EPS)


@pytest.mark.parametrize("form", ["v0", "v1", "v2"])
@pytest.mark.parametrize(("task", "size", "grid"), [(TASK, (12, 18), (3, 3)), (VOLUMES, (8, 12, 6), (2, 3, 1))])
def test_losses_of_a_step_by_hand(form, task, size, grid, monkeypatch):
    network, strategy = built(task, form=form, grid=grid, regulariser=0.7, inter=0.4, **AS_THEY_ARE)
    batch, cell = windows(size=size), [n // g for n, g in zip(size, grid, strict=True)]
    starts = np.array([[[1, 3, 0], [0, 2, 0]], [[2, 1, 0], [3, 0, 0]]])[..., : task.ndim]  # two crops of two windows
    drawn = iter(torch.from_numpy(np.stack([starts, starts + cell], 2)))
    monkeypatch.setattr(module, "draw_boxes", lambda *_, **__: next(drawn))
    students = {"teacher": network, "teacher_projector": strategy.projector}
    before = {}
    for name, child in strategy.named_children():
        if name in students:
            pairs = zip(child.parameters(), students[name].parameters(), strict=True)
            before[name] = [(own.clone(), other.detach().clone()) for own, other in pairs]
    found = strategy.step(network, batch, Progress(0, 10))

    cells = [np.array(box) for box in grid_boxes(size, grid).tolist()]
    image = batch["images"].image.numpy()
    cut = [[(slice(None), *map(slice, at, at + cell)) for at in own] for own in starts]
    cut = [own + [(slice(None), *map(slice, *box)) for box in cells] for own in cut]
    rows = [image[b][place] for b in range(2) for place in cut[b]]
    count = 2 + len(cells)
    assert len(strategy.taps) == 2
    raw = embedded(network, rows)
    z = projected(strategy.projector, raw)
    t = z
    if form != "v0":  # the teachers have followed the students, and only then looked
        for name, pairs in before.items():
            for (own, other), now in zip(pairs, getattr(strategy, name).parameters(), strict=True):
                torch.testing.assert_close(now, 0.9 * own + 0.1 * other)
        t = projected(strategy.teacher_projector, embedded(strategy.teacher, rows) if form == "v1" else raw)
    position, regulariser, inter = [], [], []
    for b in range(2):
        x, q = z[b * count : b * count + 2], z[b * count + 2 : (b + 1) * count]
        x_t, q_t = t[b * count : b * count + 2], t[b * count + 2 : (b + 1) * count]
        other = (1 - b) * count
        y, s, near, aim = [], [], [], []
        for m in range(2):
            for k, box in enumerate(cells):
                masks = np.zeros((2, *size), bool)
                masks[0][cut[b][m][1:]] = True
                masks[1][tuple(map(slice, *box))] = True
                y.append(masks.all(0).sum() / masks[0].sum())
                two = relu_cosine(x[m], q_t[k]), relu_cosine(x_t[m], q[k])
                s.append(sum(two) / 2 if form == "v1" else two[0])
                near.append(relu_cosine(x[m], z[other + 2 + k]))
                aim.append(relu_cosine(x_t[m], t[other + 2 + k]))
        position.append(entries(y, s, form))
        inter.append(entries(aim, near, "v2"))
        pairs = [relu_cosine(q[i], q[j]) ** 2 for i in range(len(q)) for j in range(i)]
        regulariser.append(np.mean(pairs))
    assert float(found.losses["position"].detach()) == pytest.approx(np.mean(position), rel=1e-4)
    assert float(found.losses["regulariser"].detach()) == pytest.approx(0.7 * np.mean(regulariser), rel=1e-4)
    assert ("inter" in found.losses) == (form == "v2")
    if form == "v2":
        assert float(found.losses["inter"].detach()) == pytest.approx(0.4 * np.mean(inter), rel=1e-4)


# -- teachers ---------------------------------------------------------------------------------------------------------------


def stepped(strategy, network, **progress):
    return strategy.step(network, windows(), Progress(**{"step": 0, "total": 10, **progress}))


@pytest.mark.parametrize(
    ("form", "names"), [("v0", []), ("v1", ["teacher_projector", "teacher"]), ("v2", ["teacher_projector"])]
)
def test_teachers_have_weights_of_their_own_and_no_gradient(form, names):
    network, strategy = built(form=form)
    assert [name for name, _ in strategy.named_children()] == ["projector", *names]
    students = {"teacher": network, "teacher_projector": strategy.projector}
    torch.autograd.backward(list(stepped(strategy, network).losses.values()))
    for name in names:
        pairs = zip(getattr(strategy, name).parameters(), students[name].parameters(), strict=True)
        assert all(p.grad is None and not torch.equal(p, q) for p, q in pairs)
    optimised = {id(p) for group in strategy.parameter_groups(network) for p in group["params"]}
    encoder = [*network.fine.parameters(), *network.deep.parameters()]
    assert optimised == {id(p) for p in [*encoder, *strategy.projector.parameters()]}
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in encoder)


def test_teachers_follow_once_an_optimiser_step_and_keep_their_statistics():
    network, strategy = built(backbone=Normed)
    before = [p.clone() for p in strategy.teacher.parameters()]
    stepped(strategy, network, micro=1)
    assert all(torch.equal(a, b) for a, b in zip(before, strategy.teacher.parameters(), strict=True))
    stepped(strategy, network)
    assert any(not torch.equal(a, b) for a, b in zip(before, strategy.teacher.parameters(), strict=True))
    own, other = (m.fine[1].running_mean for m in (network, strategy.teacher))
    assert bool((own != other).all())
    seen = []
    strategy.teacher.fine[0].register_forward_hook(lambda _, __, maps: seen.append(maps.mean((0, 2, 3))))
    before = other.clone()
    stepped(strategy, network)
    torch.testing.assert_close(other, 0.9 * before + 0.1 * seen[0])  # of what it sees itself


class Normed(Small):
    """With batch norm in the encoder."""

    def __init__(self, task):
        super().__init__(task)
        self.fine.insert(1, nn.BatchNorm2d(4))


def test_the_decoder_is_neither_run_nor_trained():
    network, strategy = built()
    stepped(strategy, network)  # the first one tries the size of crops on the whole network
    calls = []
    for part in (network.mixed, strategy.teacher.mixed):
        part.register_forward_hook(lambda *_: calls.append(1))
    stepped(strategy, network)
    assert not calls
    assert not any(p.requires_grad for part in (network.mixed, network.head) for p in part.parameters())


def test_projectors_look_at_the_batch_in_eval_mode_too():
    projector, rows = Projector(3, 4), torch.randn(6, 3)
    torch.testing.assert_close(projector(rows), projector.eval()(rows))
    assert not torch.allclose(projector(rows)[:3], projector(rows[:3]))
    np.testing.assert_allclose(
        projector(rows).detach(), projected(projector, rows.double().numpy()), rtol=1e-4, atol=1e-5
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projector(rows.bfloat16()).dtype == torch.float32


# -- what is cut out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "size"), [(TASK, (13, 20)), (VOLUMES, (7, 13, 20)), (VOLUMES, (13, 20, 7))])
def test_crops_hold_what_their_boxes_say(task, size):
    _, strategy = built(task, crops=4, **AS_THEY_ARE)
    numbers = torch.arange(float(np.prod(size))).view(1, 1, *size)
    image = torch.cat([numbers, -numbers])
    crops, overlap, counted = strategy._cut(share(image), generators(2))
    cell = [n if len(size) == 3 and n == min(size) else n // 3 for n in size]
    assert crops.shape == (2, 4 + 9, 1, *cell)
    assert bool(counted.all())
    for b in range(2):
        sets = [set(piece.flatten().tolist()) for piece in crops[b]]
        assert len(set.union(*sets[4:])) == 9 * np.prod(cell)  # cells do not overlap
        for m in range(4):  # every voxel has a number of its own: shares are those of numbers in common
            shares = [len(sets[m] & base) / len(sets[m]) for base in sets[4:]]
            np.testing.assert_allclose(overlap[b, m], shares, atol=1e-6)


def test_crops_are_those_of_the_window_in_whatever_process():
    _, strategy = built(row_dropout=0.5, crops=3)
    images, keys = windows(4)["images"], torch.arange(4)
    whole = strategy._cut(images, Progress(3, 10).generators("crops", keys))
    for start in (0, 2):
        half = images._replace(image=images.image[start : start + 2], valid=images.valid[start : start + 2])
        part = strategy._cut(half, Progress(3, 10, micro=start).generators("crops", keys[start : start + 2]))
        assert all(torch.equal(a, b[start : start + 2]) for a, b in zip(part, whole, strict=True))
    assert len(whole[1].unique(dim=0)) == 4
    rows = strategy._dropped(torch.ones(48, 2), Progress(3, 10).generators("rows", keys))
    assert torch.equal(rows[24:], strategy._dropped(torch.ones(24, 2), Progress(3, 10).generators("rows", keys[2:])))


def test_cells_of_padding_and_constant_ones_do_not_count():
    image, valid = torch.randn(1, 1, 9, 9), torch.ones(1, 1, 9, 9, dtype=torch.bool)
    valid[..., :3, :3] = False
    valid[..., 6:, 6:] = False
    valid[..., 8, 8] = True  # a ninth of the last cell
    image[..., 3:6, 3:6] = 7.0
    expected = [k not in (0, 4, 8) for k in range(9)]
    for least, last in ((0.2, False), (0.1, True)):
        _, strategy = built(least=least)
        counted = strategy._cut(share(image, valid=valid), generators(1))[2]
        assert counted.tolist() == [[*expected[:8], last]]
    assert built(least=0.0)[1]._cut(share(image, valid=valid), generators(1))[2] is None


def test_a_window_of_padding_teaches_nothing_and_breaks_nothing():
    network, strategy = built(form="v2")
    empty = share(torch.zeros(2, 1, 12, 18), valid=torch.zeros(2, 1, 12, 18, dtype=torch.bool))
    output = strategy.step(network, {"images": empty}, Progress(0, 10))
    torch.autograd.backward(list(output.losses.values()))
    assert all(bool(torch.isfinite(value)) for value in [*output.losses.values(), *output.notes.values()])
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.fine.parameters())
    assert float(output.losses["regulariser"].detach()) == 0
    assert float(output.notes["padded"]) == 1


def test_crops_are_mirrored_turned_and_shifted_each_by_itself():
    rows = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def changed(grid=(3, 3), **options):
        _, strategy = built(**{**AS_THEY_ARE, **options})
        now = rows.clone()
        strategy._augment_(now, grid, generators(20))
        return now

    assert torch.equal(changed(), rows)
    assert torch.equal(changed(flip=1.0), rows.flip(2, 3))
    assert torch.equal(changed(rot90=1.0, grid=(3, 1)), rows)  # one axis with cells: there is no plane
    turned = changed(rot90=1.0)
    kinds = [[torch.equal(a, torch.rot90(b, k, (1, 2))) for k in (1, 2, 3)] for a, b in zip(turned, rows, strict=True)]
    assert all(sum(kind) == 1 for kind in kinds)
    assert all(40 < n < 95 for n in np.sum(kinds, 0))
    shifts = changed(offset_probability=0.5, offset=0.1) - rows
    per_row = shifts.flatten(1)
    assert bool((per_row.amax(1) - per_row.amin(1) < 1e-6).all())
    assert 70 < int((per_row[:, 0] != 0).sum()) < 130
    assert 0.08 < float(per_row.abs().max()) <= 0.1 + 1e-6


def test_dropout_takes_whole_crops_from_the_student_alone():
    network, strategy = built(form="v2", row_dropout=0.4, crops=20)
    given = {}
    for name in ("projector", "teacher_projector"):
        getattr(strategy, name).register_forward_pre_hook(lambda _, rows, name=name: given.update({name: rows[0]}))
    stepped(strategy, network)
    clean = given["teacher_projector"]
    ratio = (given["projector"] / clean)[:, (clean != 0).all(0)].detach()
    kept = ratio[:, 0] != 0
    assert 0.35 < float(kept.float().mean()) < 0.85
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.6))
    assert bool((ratio[~kept] == 0).all())


def test_crops_come_in_the_size_that_is_asked_for():
    network, strategy = built(size=(8,), **AS_THEY_ARE)
    sizes = []
    network.fine.register_forward_hook(lambda _, given, __: sizes.append(tuple(given[0].shape)))
    stepped(strategy, network)
    assert sizes == [(2 * 11, 1, 8, 8)]
    rows = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 6, 4)  # a ramp: the corners stay where they are
    seen = strategy._as_seen(network, rows)
    torch.testing.assert_close(seen[0, 0, 0], torch.linspace(0, 3, 8))


# -- other terms and forms --------------------------------------------------------------------------------------------------


def test_labels_are_learnt_beside_where_asked_for():
    assert set(Voco().streams()) == {"images"}
    assert set(Voco(supervised=1.0).streams()) == {"images", "labelled"}
    network, strategy = built(supervised=0.3)
    image, label = torch.randn(2, 1, 12, 18), torch.randint(3, (2, 12, 18))
    output = strategy.step(network, windows() | {"labelled": share(image, label=label)}, Progress(0, 10))
    expected = 0.3 * segmentation_loss(network(image), label)
    torch.testing.assert_close(output.losses["supervised"], expected)
    assert all(p.requires_grad for p in network.parameters())


def test_pseudo_labels_of_a_frozen_copy_train_the_decoder_alone():
    """The second half of the omni-supervised form, by hand: what the copy says of the random crops, padding left out."""
    network, strategy = built(supervised=1.0, pseudo=0.7, pseudo_after=0.5, crops=3, offset_probability=1.0)
    valid = torch.ones(2, 1, 12, 18, dtype=torch.bool)
    valid[0, ..., :9] = False
    given = windows()["images"]._replace(valid=valid)
    labelled = share(torch.randn(2, 1, 12, 18), label=torch.randint(3, (2, 12, 18)))

    def step(number, **more):
        return strategy.step(network, {"images": given, "labelled": labelled}, Progress(number, 10, **more))

    assert "pseudo" not in step(4).losses
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)  # what was learnt until now is what is frozen
    frozen = {name: p.clone() for name, p in network.named_parameters()}
    step(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05)
    found = step(6).losses["pseudo"]
    assert all(torch.equal(frozen[name], p) for name, p in strategy.labeller.named_parameters())
    assert not any(module.training for module in strategy.labeller.modules())

    pieces = strategy._cut(given, Progress(6, 10).generators("crops", given.geometry.sample))[0]
    crops, inside = pieces[:, :3, :1].flatten(0, 1), pieces[:, :3, 1].flatten(0, 1) == 1
    assert not inside.all()
    with torch.no_grad():
        target = strategy.labeller(crops).argmax(1)
        target[~inside] = IGNORE
        expected = 0.7 * segmentation_loss(network(crops), target)
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    decoder = [*network.mixed.parameters(), *network.head.parameters()]
    assert all(bool((p.grad != 0).any()) for p in decoder)
    assert all(p.grad is None for part in (network.fine, network.deep) for p in part.parameters())
    optimised = {id(p) for group in strategy.parameter_groups(network) for p in group["params"]}
    assert not optimised & {id(p) for p in strategy.labeller.parameters()}
    assert strategy.reads_labels
    assert not Voco().reads_labels


def test_pseudo_labels_of_a_run_that_resumes():
    """The frozen copy is part of the state: a run that stops after the switch goes on as if it had not."""
    subject = Subject(
        Voco,
        {"supervised": 1.0, "pseudo": 1.0, "pseudo_after": 0.1, "width": 5},
        TASK,
        Small,
        batch=2,
        size=(16, 24),
    )
    check_resume(subject)
    run_ = ShortRun(subject).run(0, 3)
    assert not torch.equal(run_.strategy.labeller.head.weight, run_.backbone.head.weight)


def test_one_window_is_set_against_itself_only_where_asked_for():
    for option in (False, True):
        network, strategy = built(form="v2", self_contrast=option)
        output = strategy.step(network, windows(1), Progress(0, 10))
        assert ("inter" in output.losses) == option


def test_levels_and_layers():
    assert [tap.module for tap in built()[1].taps] == ["fine", "deep"]
    assert [tap.module for tap in built(levels="bottleneck")[1].taps] == ["deep"]
    assert [tap.module for tap in built(layers=("fine",))[1].taps] == ["fine"]
    assert "fine (4), deep (6)" in built()[1].said


# -- what cannot be -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (1,)}, "two cells"),
        ({"grid": ()}, "two cells"),
        ({"grid": (1, 1)}, "two cells"),
        ({"crops": 0}, "at least 1"),
        ({"window": (0, 4)}, "at least 1"),
        ({"row_dropout": 1.0}, "row_dropout"),
        ({"supervised": 1.0, "pseudo": 1.0, "pseudo_after": 1.0}, "pseudo_after"),
        ({"pseudo": 1.0}, "set supervised, too"),
        ({"momentum": 1.5}, "momentum"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Voco(**options)


@pytest.mark.parametrize("options", [{"grid": (3, 3, 1)}, {"window": (32,)}, {"size": (8, 8, 8)}])
def test_options_of_other_axes(options):
    with pytest.raises(RecipeError, match="2 axes"):
        built(**options)


def test_windows_and_crops_without_room():
    network, strategy = built(grid=(5, 5))
    with pytest.raises(ShapeError, match="does not fit"):
        strategy.step(network, windows(size=(4, 18)), Progress(0, 10))
    network, strategy = built()
    with pytest.raises(ShapeError, match="one voxel"):
        strategy.step(network, windows(size=(6, 6)), Progress(0, 10))  # cells of 2 x 2, and a stride of 2


def test_a_network_without_a_bottleneck():
    with pytest.raises(ShapeError, match="no bottleneck"):
        built(backbone=lambda task: nn.Conv2d(1, 3, 3, padding=1))


# -- a run that learns nothing, and one that learns -----------------------------------------------------------------------------


def test_a_run_that_learns_nothing_is_reported_once():
    _, strategy = built()
    flat, constant, nothing = torch.tensor(0.71), torch.tensor(0.4), torch.tensor(0.05)
    for step in range(219):
        strategy._watch(flat, constant, nothing, Progress(step, 400))
    with pytest.warns(
        UserWarning, match="step 220: the loss of positions is 0.710, and 0.400 for one answer.*not learning"
    ):
        strategy._watch(flat, constant, nothing, Progress(219, 400))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(220, 400):
            strategy._watch(flat, constant, nothing, Progress(step, 400))
        # below it, though not by much; early in a long stage; and where places are told, though a few misses cost much
        for value, told, total in ((0.9 * constant, nothing, 400), (flat, nothing, 20000), (flat, 4 * nothing, 400)):
            _, other = built()
            for step in range(400):
                other._watch(value, constant, told, Progress(step, total))


def test_the_best_constant_answer_in_loops():
    network, strategy = built(**AS_THEY_ARE)
    notes = stepped(strategy, network).notes
    overlap = (
        strategy._cut(windows()["images"], Progress(0, 10).generators("crops", torch.arange(2)))[1].double().numpy()
    )
    tried = [np.mean([entries(y, np.full(18, c), "v1") for y in overlap.reshape(2, 18)]) for c in np.arange(6) / 10]
    assert float(notes["flat"]) == pytest.approx(tried[0], rel=1e-5)
    assert float(notes["constant"]) == pytest.approx(min(tried), rel=1e-5)
    assert min(tried) < 0.9 * tried[0]


def test_noted_is_the_loss_where_nothing_is_told_apart():
    network, strategy = built(**AS_THEY_ARE)
    with torch.no_grad():
        for name in ("projector", "teacher_projector"):
            for parameter in getattr(strategy, name).layers[-1].parameters():
                parameter.zero_()  # every embedding is 0, every cosine too
    output = stepped(strategy, network)
    assert float(output.losses["position"].detach()) == pytest.approx(float(output.notes["flat"]), rel=1e-6)
    assert float(output.notes["correlation"]) == 0


def test_voco_then_supervised_in_a_run(tmp_path, cache):
    stages = [
        {"strategy": {"name": "voco", "window": [40, 40], "grid": [2]}, "steps": 2, "batch": 2},
        {"strategy": "supervised", "steps": 2, "batch": 4},
    ]
    values = tiny(stages=stages)
    values["data"]["labelled"] = 2
    summary = run(load_recipe(values), tmp_path, cache=cache)
    assert summary["results"]
    rows = 2 * (2 + 4)  # crops and cells of two windows, once by each encoder
    assert summary["images_per_step"] == [{"with_gradient": rows, "without": rows}, {"with_gradient": 4, "without": 0}]
