"""Published weights: random values under their names go through our reader and give what the publishers' networks compute."""

import json

import pytest
import torch
import torch.nn.functional as F

from labeleff import registry
from labeleff.backbones.released import FOLDER, recognised, releases, translated
from labeleff.backbones.weights import load_weights, read_weights
from labeleff.batch import Task
from labeleff.errors import RunError

NARROW = 12
KNOWN = {release.name: release for release in releases()}
SWIN = ("swinvit", "voco_ssl_head", "voco_10k", "vocomni")
FOUND_UNDER = {
    "swinvit": ("",),
    "voco_ssl_head": ("", "module."),
    "voco_10k": ("", "module."),
    "vocomni": ("", "module.", "backbone."),
}


def task(classes):
    return Task(("background", *map(str, range(1, classes))), 3, 1)


def values(shapes, seed=0):
    """Return random values under published names, as small as weights are."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def monai_swin(version, classes):
    from monai.networks.nets import SwinUNETR

    torch.manual_seed(5)
    return SwinUNETR(1, classes, feature_size=NARROW, use_v2=version == 2).eval()


def features(network, image):
    """Return what VoCo pools: five blocks of the encoder."""
    hidden = network.swinViT(image, network.normalize)
    blocks = [network.encoder2, network.encoder3, network.encoder4, network.encoder10]
    deeper = [block(hidden[level]) for block, level in zip(blocks, (0, 1, 2, 4), strict=True)]
    return [*hidden, network.encoder1(image), *deeper]


def near(a, b):
    return (a - b).abs().max() <= 1e-5 * b.abs().max().clamp_min(1)


def read_as(state, tmp_path, **around):
    torch.save({"state_dict": state, **around}, tmp_path / "theirs.pt")
    return read_weights(tmp_path / "theirs.pt")


@pytest.mark.parametrize("name", SWIN)
def test_swin_transformers_compute_what_the_publishers_load_into_monai(name, tmp_path):
    release = KNOWN[name]
    version, classes = release.backbone.get("version", 1), 21 if name == "vocomni" else 3
    own = registry.get("backbone", "swin_unetr")(task(classes), features=NARROW, version=version).eval()
    theirs = monai_swin(version, classes)
    indices = {k: v for k, v in theirs.state_dict().items() if k.endswith("position_index")}
    # f = 12, of which the lists give the shapes that they give for 48, 96 and 192
    by_48 = {n: tuple(d // 4 if d % 48 == 0 else d for d in s) for n, s in release.shapes(48).items()}
    state = values(by_48 if release.widths == (48,) else release.shapes(NARROW))
    for entry in state:
        where = entry.replace("module.", "swinViT.") if name == "swinvit" else entry.removeprefix("backbone.")
        if where in indices:
            state[entry] = indices[where]
    if name == "swinvit":
        theirs.load_from({"state_dict": state})
    else:
        bare = {n.removeprefix("backbone."): v for n, v in state.items()}
        theirs.load_state_dict({n: v for n, v in bare.items() if n in theirs.state_dict()}, strict=False)
    parts = ("swinViT.",) if name == "swinvit" else ("swinViT.", "encoder")
    encoder = {n: v.numel() for n, v in own.state_dict().items() if n.startswith(parts)}
    side = 32 if name == "swinvit" else 64  # instance norm needs two voxels, the transformer does not
    image = torch.randn(1, 1, side, 32, 32, generator=torch.Generator().manual_seed(1))
    for prefix in FOUND_UNDER[name]:
        given = {prefix + n: v for n, v in state.items()}
        report = load_weights(own, read_as(given, tmp_path, epoch=7), channels=1, minimum=0.1)
        assert sum(encoder.get(n, 0) for n in report.matched) >= 0.95 * sum(encoder.values())
        assert not any(part in n for n in report.unused for part in ("patch_embed", "layers", "encoder"))
        if name == "vocomni":
            assert report.share == report.used == 1
    with torch.no_grad():
        if name == "swinvit":
            pairs = zip(own.swinViT(image), theirs.swinViT(image), strict=True)
        else:
            pairs = zip(features(own, image), features(theirs, image), strict=True)
        assert all(near(a, b) for a, b in pairs)
        if name == "vocomni":
            assert near(own(image), theirs(image))


def plain_unet(state, x):
    """Return what nnU-Net's plain U-Net computes, told from its weights alone."""

    def block(x, where, stride=1):
        x = F.conv3d(x, state[f"{where}.conv.weight"], state[f"{where}.conv.bias"], stride, padding=1)
        x = F.instance_norm(x, weight=state[f"{where}.norm.weight"], bias=state[f"{where}.norm.bias"], eps=1e-5)
        return F.leaky_relu(x, 0.01)

    levels = []
    for stage in range(6):
        x = block(x, f"encoder.stages.{stage}.0.convs.0", 1 if stage == 0 else 2)
        x = block(x, f"encoder.stages.{stage}.0.convs.1")
        levels.append(x)
    for stage in range(5):
        where = f"decoder.transpconvs.{stage}"
        x = F.conv_transpose3d(x, state[f"{where}.weight"], state[f"{where}.bias"], 2)
        x = torch.cat((x, levels[4 - stage]), 1)
        x = block(block(x, f"decoder.stages.{stage}.convs.0"), f"decoder.stages.{stage}.convs.1")
    return levels[-1], F.conv3d(x, state["decoder.seg_layers.4.weight"], state["decoder.seg_layers.4.bias"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_plain_u_net_of_nnu_net_is_a_dynunet(prefix, tmp_path):
    release = KNOWN["vocomni_nnunet"]
    narrow = {n: tuple(d // 8 if d % 32 == 0 else d for d in s) for n, s in release.shapes(32).items()}
    state = values(narrow)
    for name in state:  # every layer is there under several names
        first = name.replace("decoder.encoder.", "encoder.")
        state[name] = state[first.replace("all_modules.0", "conv").replace("all_modules.1", "norm")]
    filters = tuple(n // 8 for n in release.backbone["filters"])
    own = registry.get("backbone", "dynunet")(task(21), filters=filters, bias=release.backbone["bias"]).eval()
    read = read_as({prefix + n: v for n, v in state.items()}, tmp_path)
    report = load_weights(own, read, channels=1)
    assert report.share == 1
    said = {name.removeprefix(prefix) for name in report.unused}
    assert all(".bias" in n or "seg_layers" in n for n in said)  # a bias before instance norm does nothing
    image = torch.randn(1, 1, 64, 32, 32, generator=torch.Generator().manual_seed(1))
    deepest = []
    own.bottleneck.register_forward_hook(lambda *given: deepest.append(given[2]))
    with torch.no_grad():
        logits = own(image)
        there, expected = plain_unet(state, image)
    assert near(deepest[0], there)
    assert near(logits, expected)


def residual_encoder(state, x, blocks):
    """Return what nnU-Net's residual encoder computes at every level, told from its weights alone."""

    def block(x, where, stride=1, *, pad=1, active=True):
        x = F.conv3d(x, state[f"{where}.conv.weight"], state.get(f"{where}.conv.bias"), stride, padding=pad)
        x = F.instance_norm(x, weight=state[f"{where}.norm.weight"], bias=state[f"{where}.norm.bias"], eps=1e-5)
        return F.leaky_relu(x, 0.01) if active else x

    x, levels = block(x, "encoder.stem.convs.0"), []
    for level, count in enumerate(blocks):
        for number in range(count):
            where, stride = f"encoder.stages.{level}.blocks.{number}", 2 if level and not number else 1
            skipped = F.avg_pool3d(x, 2) if stride == 2 else x
            if f"{where}.skip.{stride - 1}.conv.weight" in state:
                skipped = block(skipped, f"{where}.skip.{stride - 1}", pad=0, active=False)
            inner = block(block(x, f"{where}.conv1", stride), f"{where}.conv2", active=False)
            x = F.leaky_relu(inner + skipped, 0.01)
        levels.append(x)
    return levels


def test_res_enc_l_of_nnssl_is_a_residual_u_net(tmp_path):
    release, blocks = KNOWN["nnssl_resencl"], (1, 3, 4, 6, 6, 6)
    narrow = {n: tuple(d // 8 if d % 32 == 0 else d for d in s) for n, s in release.shapes(32).items()}
    state = values(narrow)
    again = {"decoder." + n: v for n, v in state.items() if n.startswith("encoder.")}  # as decoders hold it, too
    own = registry.get("backbone", "residual_unet")(task(3), size="standard", filters=(4, 8, 16, 32, 40, 40)).eval()
    torch.save(
        {"network_weights": state | again, "trainer_name": "BaseMAETrainer", "nnssl_adaptation_plan": {}},
        tmp_path / "c.pth",
    )
    report = load_weights(own, read_weights(tmp_path / "c.pth"), channels=1, minimum=0.95)
    assert [name for name, _ in report.left] == ["decoder.head.weight", "decoder.head.bias"]
    assert all(n.endswith("conv.bias") or "seg_layers" in n for n in report.unused)
    image = torch.randn(1, 1, 64, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pairs = zip(own.encoder(image), residual_encoder(state, image, blocks), strict=True)
        assert all(near(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "width"), [(release.name, width) for release in releases() for width in release.widths]
)
def test_files_in_the_wrong_network_are_recognised_in_one_line(name, width):
    release = KNOWN[name]
    state = {n: torch.zeros(1).expand(shape) for n, shape in release.shapes(width).items()}
    network = registry.get("backbone", "unet")(task(2), channels=(4, 8))
    file = release.files[release.widths.index(width)]
    with pytest.raises(RunError) as error:
        load_weights(network, state, channels=1, minimum=0.1)
    text = str(error.value)
    assert f"it is like {file} of " in text
    assert "\n" not in text
    assert f"backbone: {{name: {release.backbone['name']}" in text
    assert (f"features: {width}" in text) == (len(release.widths) > 1)


def test_lists_say_where_they_are_from_and_other_files_are_left_alone():
    for release in releases():
        assert all(each["repository"] and each.get("commit", each.get("version")) for each in release.source)
        assert json.loads((FOLDER / f"{release.name}.json").read_text())["files"] == list(release.files)
    names = ["encoder.stages.0.0.convs.0.conv.weight", "layers1.0.weight"]
    assert translated(names, ["conv.weight"]) == dict(zip(names, names, strict=True))  # a network of another kind
    assert recognised({"weight": torch.zeros(2)}) == ""
