"""GLCL's two stages: what is contrasted, what is trained, and what is not even run."""

import json
import warnings

import pytest
import torch
from torch import nn

from labeleff import registry
from labeleff.backbones.taps import capture, encode, find_taps
from labeleff.batch import Progress, Task
from labeleff.describing import describe
from labeleff.errors import RecipeError, ShapeError
from labeleff.functional.glcl import local_loss
from labeleff.learner import images_counted
from labeleff.prepare import prepare
from labeleff.recipe_io import load_recipe
from labeleff.runner import run
from labeleff.strategies.glcl_global import GlclGlobal
from labeleff.strategies.glcl_local import GlclLocal, LocalHead
from labeleff.testing import ShortRun, Subject

from ..conftest import tiny
from ..functional.test_glcl import BY_HAND, local_by_hand, table_of

TASK = Task(("background", "one", "two"), 2)
STILL = {"brightness": 0.0, "contrast": 0.0}


def unet(task):
    return registry.get("backbone", "unet")(task, channels=(4, 8, 8), norm="batch", dropout=0.2)


def deep(task):
    return registry.get("backbone", "basic_unet")(task, features=(4, 4, 4, 4, 8, 4), norm="batch")


def started(factory, backbone=unet, batch=8, shape=None, **options):
    run = ShortRun(Subject(factory, {"partitions": 2} | options, TASK, backbone, batch=batch, size=shape))
    return run, run.subject.batches(run.strategy, 0)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


# -- between images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", BY_HAND)
def test_rows_are_volumes_of_partitions_in_their_versions(scheme):
    run, batch = started(GlclGlobal, scheme=scheme, crop=1.0, **STILL)
    backbone, head = run.backbone.eval(), run.strategy.head
    with torch.no_grad(), capture(backbone, [run.strategy.tap]) as found:
        backbone(batch["images"].image)
        feature = found[run.strategy.tap]
        pooled = torch.stack([feature[..., a : a + 2, b : b + 3].mean((2, 3)) for a in (0, 2) for b in (0, 3)], -1)
        z = head.last.weight @ torch.relu(head.first.weight @ pooled.flatten(1).t())
    z = z.t().double().numpy()  # volume-major, partition-minor; every version is the image itself
    parts = 2
    rows = {
        "gr": [*z, *z],
        "gd-": [*z, *z, *z],
        "gd": [row for v in range(4) for _ in range(2) for row in z[parts * v : parts * v + parts]],
    }
    output = run.strategy.step(backbone, batch, Progress(0, 10))
    expected = BY_HAND[scheme](rows[scheme], 0.1, 4, parts)
    assert float(output.losses["contrast"].detach()) == pytest.approx(expected, rel=1e-4)


def test_views_are_drawn_from_the_progress():
    run, batch = started(GlclGlobal, scheme="gd-")
    images = batch["images"]
    image = images.image
    one, two = (run.strategy._view(images, version, Progress(3, 10)) for version in (1, 2))
    assert run.strategy._view(images, 0, Progress(3, 10)) is image
    assert torch.equal(one, run.strategy._view(images, 1, Progress(3, 10)))
    assert not torch.allclose(one, two)
    assert not torch.allclose(one, run.strategy._view(images, 1, Progress(4, 10)))
    assert len({float(m) for m in (one - image).flatten(1).mean(1)}) == len(image)
    # a process that sees the other half of the batch draws what one that sees all of it does
    rest = images._replace(image=image[4:], geometry=images.geometry._replace(sample=images.geometry.sample[4:]))
    torch.testing.assert_close(run.strategy._view(rest, 1, Progress(3, 10, micro=1)), one[4:])


def test_only_the_encoder_is_trained_and_run():
    run, batch = started(GlclGlobal, backbone=deep, shape=(32, 32))
    before, called = state(run.backbone), set()
    for name, module in run.backbone.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    with images_counted(type(run.backbone)) as counts:
        run.forward(0, batch)
    assert counts == {"with_gradient": 16, "without": 0}  # eight images and a view of each
    assert not [name for name in called if name.startswith(("upcat", "final"))]
    assert "down_4" in called
    run.run()
    names = moved(before, run.backbone)
    assert {name.split(".")[0] for name in names} == {"conv_0", "down_1", "down_2", "down_3", "down_4"}
    encoder = {name for name, _ in run.backbone.named_parameters() if name.startswith(("conv_0", "down"))}
    assert {name for name, p in run.backbone.named_parameters() if p.requires_grad} == encoder


@pytest.mark.parametrize("factory", [GlclGlobal, GlclLocal])
def test_what_learns_nothing_is_told_apart_by_a_note(factory):
    values = {GlclGlobal: 4 * torch.log(torch.tensor(9.0)), GlclLocal: torch.log(torch.tensor(11.0))}
    run, batch = started(factory)
    output = run.forward(0, batch)
    torch.testing.assert_close(output.notes["flat_contrast"], values[factory])  # eight rows of the other partition
    with torch.no_grad():
        for parameter in run.strategy.parameters():
            parameter.zero_()
    torch.testing.assert_close(run.forward(0, batch).losses["contrast"].detach(), values[factory])


def test_a_head_of_the_size_of_the_bottleneck_flattens_it():
    run, _ = started(GlclGlobal, grid=4)
    feature = torch.randn(2, 8, 4, 4)
    head = run.strategy.head
    expected = torch.relu(feature.flatten(1) @ head.first.weight.t()) @ head.last.weight.t()
    torch.testing.assert_close(head(feature), expected)


# -- between regions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "size", "dense"), [("lr", 3, True), ("ld", 1, False)])
def test_regions_of_two_views(scheme, size, dense):
    run, batch = started(GlclLocal, batch=4, scheme=scheme, size=size, dense=dense, projection=0, temperature=0.5)
    strategy, backbone, progress = run.strategy, run.backbone.eval(), Progress(0, 10)
    image = batch["images"].image
    maps = []
    for number in (1, 2):  # brightness and contrast spelt out
        own = progress.generators(f"view {number}", batch["images"].geometry.sample)
        shift, factor = 2 * torch.stack([torch.rand(2, generator=g) for g in own], 1)[..., None, None, None] - 1
        view = image + 0.3 * shift
        view = view.mean((2, 3), keepdim=True) + (1 + 0.3 * factor) * (view - view.mean((2, 3), keepdim=True))
        with torch.no_grad(), capture(backbone, [strategy.tap]) as found:
            backbone(view)
        maps.append(found[strategy.tap])
    feature = torch.einsum("oc,nchw->nohw", strategy.head.first.weight[:, :, 0, 0], torch.cat(maps))
    spread = feature.var((0, 2, 3), correction=0, keepdim=True)
    feature = torch.relu((feature - feature.mean((0, 2, 3), keepdim=True)) / (spread + 1e-5).sqrt())
    feature = torch.einsum("oc,nchw->nohw", strategy.head.last.weight[:, :, 0, 0], feature).detach().double().numpy()
    expected = local_by_hand(scheme, feature[:4], feature[4:], table_of(2, size, 13 if dense else 9), size, 0.5, 2)
    assert float(strategy.step(backbone, batch, progress).losses["contrast"].detach()) == pytest.approx(
        expected, rel=1e-3
    )


@pytest.mark.parametrize(("size", "projection"), [(3, 6), (3, 0), (1, 0)])
def test_a_head_that_computes_what_regions_show_is_one_that_computes_all(size, projection):
    torch.manual_seed(0)
    head, feature = LocalHead(4, 2, size=size, projection=projection).double(), torch.randn(6, 4, 12, 10).double()
    whole = head.last(torch.relu(head.norm(head.first(feature))))
    expected = local_loss(*whole.chunk(2), size=size, project=head.region)
    found = local_loss(*head(feature).chunk(2), size=size, project=head.embed)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    parameters = list(head.parameters())
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # compared in single precision


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_encoder_keeps_still(mode):
    run, _ = started(GlclLocal, backbone=deep, shape=(32, 32), level=2, encoder_mode=mode)
    before = state(run.backbone)
    called = set()
    for name, module in run.backbone.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name.split(".")[0]))
    run.run()
    names = moved(before, run.backbone)
    weights = {name for name, _ in run.backbone.named_parameters()}
    assert {name.split(".")[0] for name in names & weights} == {"upcat_4", "upcat_3"}
    statistics = {name.split(".")[0] for name in names - weights}
    encoder = {"conv_0", "down_1", "down_2", "down_3", "down_4"}
    assert statistics == {"upcat_4", "upcat_3"} | (encoder if mode == "train" else set())
    assert not called & {"upcat_2", "upcat_1", "final_conv"}
    assert "upcat_3" in called


def test_a_still_encoder_draws_nothing_and_moves_no_statistics():
    """SegResNet's dropout, and norms without scale and shift, have no parameter by which they were the encoder's."""

    def backbone(task):
        network = registry.get("backbone", "segresnet")(task, filters=8, blocks_down=(1, 1, 1), dropout=0.5)
        network.dropout = nn.Sequential(network.dropout, nn.BatchNorm2d(8, affine=False))
        return network

    for mode, still in (("eval", True), ("train", False)):
        run, batch = started(GlclLocal, backbone=backbone, shape=(32, 32), level=1, encoder_mode=mode)
        run.strategy.set_modes(run.backbone)
        deepest = find_taps(run.backbone, TASK).bottleneck
        before = state(run.backbone)
        with torch.no_grad():
            one, two = (encode(run.backbone, batch["images"].image, [deepest])[0] for _ in range(2))
        assert torch.equal(one, two) == still
        assert (not moved(before, run.backbone)) == still
        assert any(module.training for module in run.backbone.modules())


@pytest.mark.parametrize("factory", [GlclGlobal, GlclLocal])
def test_a_run_that_learns_nothing_is_reported_once(factory):
    run, _ = started(factory)
    loss, flat = torch.tensor(2.3), torch.tensor(2.4)
    for step in range(219):
        run.strategy._watch(loss, flat, Progress(step, 400))
    with pytest.warns(UserWarning, match=r"step 220: the contrast is 2\.300, and 2\.400 where nothing .* not learning"):
        run.strategy._watch(loss, flat, Progress(219, 400))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(220, 300):
            run.strategy._watch(loss, flat, Progress(step, 400))
        other, _ = started(factory)
        for step in range(300):
            other.strategy._watch(0.9 * flat, flat, Progress(step, 400))


@pytest.mark.parametrize(("level", "last"), [(1, "upcat_4"), (3, "upcat_2"), (9, "upcat_2")])
def test_levels_end_before_full_resolution(level, last):
    run, _ = started(GlclLocal, backbone=deep, shape=(32, 32), level=level)
    assert run.strategy.tap.module == last
    assert max(run.strategy.tap.stride) > 1
    assert f"up to {last} at stride" in run.strategy.said
    named, _ = started(GlclLocal, backbone=deep, shape=(32, 32), decoder="upcat_1")
    assert named.strategy.tap.stride == (1, 1)


class NoDecoder(nn.Module):
    """Logits of the bottleneck, enlarged."""

    def __init__(self, task):
        super().__init__()
        self.down = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.head = nn.Sequential(nn.Conv2d(6, 3, 1), nn.Upsample(scale_factor=2))

    def forward(self, x):
        return self.head(self.down(x))


def test_what_cannot_be_trained_is_said_in_one_line():
    with pytest.raises(RecipeError, match="no features between its bottleneck and its logits"):
        started(GlclLocal, backbone=NoDecoder)
    with pytest.raises(ValueError, match="nothing to be told from"):
        GlclGlobal(partitions=1)
    run, batch = started(GlclGlobal, batch=6, partitions=4)
    with pytest.raises(ShapeError, match="6 images are not volumes of 4 partitions"):
        run.forward(0, batch)
    assert [GlclGlobal(scheme=s).streams()["images"].kind for s in ("gr", "gd-", "gd")] == [
        "slice",
        *["partitions"] * 2,
    ]
    assert [GlclLocal(scheme=s).streams()["images"].kind for s in ("lr", "ld")] == ["slice", "partitions"]


# -- in runs --------------------------------------------------------------------------------------------------------------

VOLUMES = {
    "dataset": {"name": "phantom", "patients": 6, "test": 1, "ndim": 3, "size": [8, 30, 32]},
    "labelled": 1,
    "dimensions": 2,
    "patch": [32, 32],
}
STAGES = [
    {"strategy": "glcl_global", "steps": 2, "batch": 16},
    {"strategy": "glcl_local", "steps": 2, "batch": 3},
    {"strategy": "supervised", "steps": 1, "batch": 2},
]


def test_both_stages_then_fine_tuning(tmp_path, cache):
    recipe = load_recipe(tiny(data=VOLUMES, stages=STAGES))
    run(recipe, tmp_path, cache=cache)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "contrast" in json.dumps(row)]
    assert losses
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["images_per_step"] == [
        {"with_gradient": 32, "without": 0},
        {"with_gradient": 6, "without": 0},
        {"with_gradient": 2, "without": 0},
    ]


def test_batches_that_are_no_volumes_of_partitions_are_refused(tmp_path, cache):
    def loader(**changes):
        recipe = load_recipe(tiny(data=VOLUMES | changes.pop("data", {}), stages=[STAGES[0] | changes]))
        prepared = prepare(recipe, tmp_path / str(len(list(tmp_path.iterdir()))), cache=cache)
        stage = recipe.stages[0]
        strategy = registry.build("strategy", stage.strategy.name, **stage.strategy.options)
        return prepared, prepared.loader(stage, 0, strategy, first=0, last=1, revision=0)

    prepared, batches = loader()
    geometry = next(iter(batches))["images"].geometry
    assert geometry.case.view(4, 4).unique(dim=1).shape == (4, 1)
    assert (4 * (geometry.origin[:, 0] + 0.5) / 8).floor().tolist() == [0, 1, 2, 3] * 4
    assert next(iter(batches))["images"].image.shape == (16, 1, 32, 32)  # whole slices
    assert not [note for note in describe(prepared)["notes"] if "left out" in note]
    for changes, said in [
        ({"batch": 10}, "make the batch a multiple of 4, at least 8"),
        ({"batch": 4}, "make the batch a multiple of 4, at least 8"),
        ({"batch": 28}, "a batch of 28 is 4 partitions of 7 volumes, but only 6 of 6 cases"),
        (
            {"strategy": {"name": "glcl_global", "partitions": 9}, "batch": 18},
            "only 0 of 6 cases have 9 places or more",
        ),
        (
            {"strategy": {"name": "glcl_global", "scheme": "gr"}, "batch": 1},
            "a process sees 1 sample of stream 'images' at a time, but needs 2 .* make the batch at least 2",
        ),
        ({"data": {"dataset": tiny()["data"]["dataset"], "labelled": 2, "dimensions": None}}, "has single images"),
    ]:
        with pytest.raises(RecipeError, match=said) as error:
            loader(**changes)
        assert "\n" not in str(error.value)


def test_what_a_later_stage_cannot_draw_is_found_before_the_first(tmp_path, cache):
    stages = [{"strategy": "glcl_local", "steps": 2, "batch": 3}, STAGES[0] | {"batch": 28}]
    with pytest.raises(RecipeError, match="4 partitions of 7 volumes, but only 6 of 6"):
        prepare(load_recipe(tiny(data=VOLUMES, stages=stages)), tmp_path, cache=cache)


def test_volumes_that_are_too_short_are_left_out_and_said_to_be(tmp_path, cache):
    changes = {"dimensions": 3, "patch": [4, 32, 32]}  # a patch of 4 of 8 voxels lies in five places
    backbone = {"name": "segresnet", "filters": 8, "blocks_down": [1, 1]}
    stages = [
        {"strategy": {"name": "glcl_global", "partitions": parts}, "batch": 6, "steps": steps}
        for parts, steps in ((3, 1), (6, 0))
    ]
    prepared = prepare(
        load_recipe(tiny(data=VOLUMES | changes, backbone=backbone, stages=stages)), tmp_path, cache=cache
    )
    notes = [note for note in describe(prepared)["notes"] if "left out" in note]
    assert notes == ["stages.1: 6 cases have fewer than 6 places along axis 0 and are left out"]
    strategy = GlclGlobal(partitions=3)
    batch = next(iter(prepared.loader(prepared.recipe.stages[0], 0, strategy, first=0, last=1, revision=0)))
    assert (3 * (batch["images"].geometry.origin[:, 0] + 0.5) / 5).floor().tolist() == [0, 1, 2] * 2
    assert batch["images"].image.shape == (6, 1, 4, 32, 32)
