"""Filling in what was blotted out: the loss by hand, which blocks, and what is trained."""

import numpy as np
import pytest
import torch
from torch import nn

from labeleff.batch import IGNORE, Batch, Progress, Task
from labeleff.errors import ShapeError
from labeleff.strategies.masked_autoencoder import MaskedAutoencoder
from labeleff.testing import toy_geometry

TASK = Task(("background", "one", "two"), 2, channels=2)


class Small(nn.Module):
    """An encoder, a decoder at full resolution, and a head."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
        self.deep = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.up = nn.Upsample(scale_factor=2)
        self.mixed = nn.Sequential(nn.Conv2d(10, 5, 1), nn.ReLU())
        self.head = nn.Conv2d(5, 3, 1)

    def features(self, image):
        fine = self.fine(image)
        return self.mixed(torch.cat([fine, self.up(self.deep(fine))], 1))

    def forward(self, image):
        return self.head(self.features(image))


def built(**options):
    torch.manual_seed(0)
    network, strategy = Small(), MaskedAutoencoder(**options)
    strategy.build(network, TASK)
    strategy.set_modes(network)
    return network, strategy


def batch(size=(12, 16)):
    image = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(1))
    label, valid = torch.full((2, *size), IGNORE), torch.ones(2, 1, *size, dtype=torch.bool)
    valid[0, ..., :3] = False
    return {"images": Batch(image, label, label, valid, toy_geometry(2, size))}


def test_loss_by_hand():
    network, strategy = built(block=4)
    share, progress = batch()["images"], Progress(3, 10, seed=5)
    found = strategy.step(network, {"images": share}, progress).losses["reconstruction"]
    hidden = strategy.hidden(share.image, progress.generators("blocks", share.geometry.sample)).numpy()
    seen = np.where(hidden, 0, share.image.numpy()).astype(np.float32)
    with torch.no_grad():
        filled = strategy.head(network.features(torch.from_numpy(seen))).numpy()
    errors = [
        (filled[b, c, y, x] - float(share.image[b, c, y, x])) ** 2
        for b, c, y, x in np.ndindex(2, 2, 12, 16)
        if hidden[b, 0, y, x] and share.valid[b, 0, y, x]
    ]
    assert float(found.detach()) == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize(("size", "blocks"), [((12, 16), (3, 4)), ((10, 15, 4), (3, 4, 1))])
def test_as_many_blocks_of_every_image_and_all_in_turn(size, blocks):
    strategy, image = MaskedAutoencoder(ratio=0.6, block=4), torch.zeros(50, 1, *size)
    hidden = strategy.hidden(image, [torch.Generator().manual_seed(seed) for seed in range(50)])
    assert hidden.shape == (50, 1, *size)
    corners = hidden[(slice(None), 0, *[slice(None, None, 4)] * len(size))].flatten(1)
    assert bool((corners.sum(1) == 7).all())  # 0.6 of 12
    assert bool(((corners.float().mean(0) - 7 / 12).abs() < 0.25).all())
    for place in np.ndindex(*size):  # every voxel goes with its block
        corner = tuple(4 * (n // 4) for n in place)
        assert torch.equal(hidden[(slice(None), 0, *place)], hidden[(slice(None), 0, *corner)])


def test_blocks_are_those_of_the_image_in_whatever_process():
    strategy, image, progress = MaskedAutoencoder(block=4), torch.zeros(4, 1, 12, 16), Progress(3, 10)

    def hidden(keys, micro=0):
        own = progress._replace(micro=micro).generators("blocks", torch.tensor(keys))
        return strategy.hidden(image[: len(keys)], own)

    whole = hidden([7, 8, 9, 10])
    assert torch.equal(torch.cat([hidden([7, 8]), hidden([9, 10], micro=1)]), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 4


def test_what_comes_after_the_decoder_is_left_as_it_was():
    network, strategy = built()
    assert strategy.tap.module == "mixed"
    assert not any(p.requires_grad for p in network.head.parameters())
    strategy.step(network, batch(), Progress(0, 10)).losses["reconstruction"].backward()
    parts = (network.fine, network.deep, network.mixed, strategy.head)
    assert all(bool((p.grad != 0).any()) for part in parts for p in part.parameters())


def test_features_of_a_coarser_layer_are_enlarged():
    network, strategy = built(layer="deep")
    assert bool(torch.isfinite(strategy.step(network, batch(), Progress(0, 10)).losses["reconstruction"]))
    assert not any(p.requires_grad for p in network.mixed.parameters())


def test_what_cannot_be():
    for options in ({"ratio": 1.0}, {"ratio": 0.0}, {"block": 0}):
        with pytest.raises(ValueError, match="ratio"):
            MaskedAutoencoder(**options)
    with pytest.raises(ShapeError, match="no module"):
        built(layer="nothing")
