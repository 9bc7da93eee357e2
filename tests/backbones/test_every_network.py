"""Every registered network in 2-D and 3-D: a step, its taps, a copy, and a file that gives the same network back."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from labeleff import registry
from labeleff.backbones import transformers
from labeleff.backbones.outputs import check_patch
from labeleff.backbones.taps import encode, find_taps
from labeleff.backbones.weights import state_of
from labeleff.batch import Task
from labeleff.errors import RecipeError, ShapeError
from labeleff.strategies.base import fresh_copy
from labeleff.testing import Subject, check_predictors, check_resume
from tests.backbones.networks import SIDE, SMALL, make, sorted_out, task_of

STRIDES = {
    # of the encoder, of the decoder
    "unet": ([2, 4], [2]),
    "basic_unet": ([1, 2, 4, 8, 16], [8, 4, 2, 1]),
    "vnet": ([1, 2, 4, 8, 16], [8, 4, 2, 1]),
    "segresnet": ([1, 2, 4], [2, 1]),
    "dynunet": ([1, 2, 4], [2, 1]),
    "attention_unet": ([1, 2, 4], [2, 1]),
    "mednext": ([1, 2, 4, 8, 16], [8, 4, 2, 1]),
    "residual_unet": ([1, 2, 4], [2, 1]),
    "flexible_unet": ([2, 4, 8, 16, 32], [16, 8, 4, 2, 1]),
    "unetr": ([16], [8, 4, 2, 1]),
    "swin_unetr": ([2, 4, 8, 16, 32], [16, 8, 4, 2, 1]),
}


def test_every_registered_network_is_here():
    assert set(SMALL) == set(STRIDES) == set(registry.names("backbone"))


@pytest.fixture(scope="module", params=itertools.product(SMALL, (2, 3)), ids=lambda given: f"{given[0]}-{given[1]}d")
def trained(request):
    """A network after one backward pass, in eval mode, with the image it saw."""
    name, ndim = request.param
    network = make(name, ndim).train()
    image = torch.randn(2 if ndim == 2 else 1, 2, *[SIDE.get(name, 32)] * ndim)
    logits = network(image)
    assert logits.shape == (len(image), 3, *image.shape[2:])
    logits.square().mean().backward()
    return name, ndim, network, image


def test_every_parameter_that_asks_for_a_gradient_gets_one(trained):
    _, _, network, _ = trained
    assert not [name for name, p in network.named_parameters() if (p.grad is not None) != p.requires_grad]


def test_levels(trained):
    name, ndim, network, image = trained
    taps = find_taps(network, task_of(ndim), patch=image.shape[2:])
    down, up = STRIDES[name]
    assert [tap.stride for tap in taps.encoder] == [(stride,) * ndim for stride in down]
    assert [tap.stride for tap in taps.decoder] == [(stride,) * ndim for stride in up]
    with torch.no_grad():
        deepest = encode(network.eval(), image, [taps.bottleneck])[0]
    assert deepest.shape == (len(image), taps.bottleneck.channels, *taps.bottleneck.shape)


def test_a_copy_and_a_file_give_the_same_network(trained, tmp_path):
    name, ndim, network, image = trained
    twin = fresh_copy(network)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in network.parameters()}
    save_file(state_of(network), tmp_path / "weights.safetensors")
    again = make(name, ndim, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        seen = network.eval()(image)
        assert torch.equal(seen, again.eval()(image))
        assert torch.equal(seen, twin.eval()(image))


@pytest.mark.parametrize("name", SMALL)
def test_weights_are_a_function_of_the_seed(name):
    one, two = make(name, 2), make(name, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "side", "divisor"),
    [("segresnet", 34, 4), ("mednext", 40, 16), ("unetr", 40, 16), ("swin_unetr", 80, 32), ("swin_unetr", 32, 64)],
)
def test_sizes_that_do_not_fit_are_refused_with_one_that_does(name, side, divisor):
    network = make(name, 2)
    with pytest.raises(
        ShapeError, match=rf"data\.patch is \[{side}, {side}\].*multiples of {divisor} work, such as"
    ) as error:
        check_patch(network, task_of(2), (side, side))
    nearest = int(str(error.value).rstrip("]").split()[-1])
    check_patch(network, task_of(2), (nearest, nearest))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention_unet", {"channels": (4,)}),
        ("mednext", {"filters": 0}),
        ("residual_unet", {"filters": (4, 8)}),
        ("unetr", {"hidden": 20, "heads": 3}),
        ("unetr", {"image": 40}),
        ("swin_unetr", {"features": 20}),
        ("swin_unetr", {"heads": (5, 6, 12, 24)}),
    ],
)
def test_options_out_of_range(name, options):
    make(name, 2)
    with pytest.raises(ValueError, match=f"{next(iter(options))} (is|are)"):
        registry.get("backbone", name)(Task(("a", "b"), 2), **options)


@pytest.mark.parametrize("name", ["attention_unet", "mednext"])
def test_standard_is_larger_than_small(name):
    small, standard = (registry.get("backbone", name)(task_of(2), size=size) for size in ("small", "standard"))
    assert sum(p.numel() for p in standard.parameters()) > 3 * sum(p.numel() for p in small.parameters())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(transformers, "find_spec", lambda name: None)
    for name in ("unetr", "swin_unetr"):
        with pytest.raises(RecipeError, match=f"{name} needs the package einops.*pip install einops"):
            registry.get("backbone", name)(task_of(2))


def test_deep_supervision_of_mednext_gives_the_full_resolution_head():
    network = make("mednext", 2, deep_supervision=True)
    for mode in (True, False):
        assert network.train(mode)(torch.randn(2, 2, 32, 32)).shape == (2, 3, 32, 32)
    assert [t.stride[0] for t in find_taps(network, task_of(2), patch=(32, 32)).encoder] == STRIDES["mednext"][0]


@pytest.mark.parametrize("ndim", [2, 3])
def test_unetr_is_that_of_monai_and_takes_other_sizes(ndim):
    from monai.networks.nets import UNETR

    network = make("unetr", ndim).eval()
    arguments = {key: value for key, value in network.definition.items() if key != "_target_"}
    theirs = UNETR(**arguments).eval()
    theirs.load_state_dict(network.state_dict())
    image = torch.randn(1, 2, *[32] * ndim)
    with torch.no_grad():
        assert torch.allclose(network(image), theirs(image), atol=1e-5)
        longer = network(torch.randn(1, 2, 48, *[32] * (ndim - 1)))
    assert longer.shape == (1, 3, 48, *[32] * (ndim - 1))
    own = network.vit.patch_embedding.position_embeddings
    assert torch.equal(network.positions([2] * ndim), own)
    # between the first and the last of two positions, interpolation without aligned corners puts their mean in the middle
    laid_out = own.transpose(1, 2).reshape(1, 24, *[2] * ndim)
    wide = network.positions([3, *[2] * (ndim - 1)]).transpose(1, 2).reshape(1, 24, 3, *[2] * (ndim - 1))
    assert torch.allclose(wide[:, :, 1], laid_out.mean(2), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy", "ndim"),
    sorted_out(
        itertools.product(SMALL, ("supervised", "mean_teacher", "bcp"), (2, 3)),
        lambda _, strategy, __: strategy == "supervised",  # which is what the two others do, and less
    ),
)
def test_steps_are_saved_and_go_on_and_predict(name, strategy, ndim):
    size = (SIDE.get(name, 32),) * ndim
    subject = Subject(
        registry.get("strategy", strategy),
        task=task_of(ndim),
        backbone=lambda task: make(name, ndim),
        batch=2,
        size=size,
    )
    check_resume(subject)
    check_predictors(subject)
