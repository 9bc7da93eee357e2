"""A toy in which places can be told: images share a template, which each of them changes; held-out ones are placed, too."""

import torch
import torch.nn.functional as F
from torch import nn

from labeleff.batch import IGNORE, Batch, Progress, Task
from labeleff.strategies.voco import Voco
from labeleff.testing import toy_geometry

SIZE, STEPS = 36, 60


class Three(nn.Module):
    """An encoder of three levels and a head."""

    def __init__(self, width=8):
        super().__init__()

        def block(inputs, outputs):
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.one, self.two, self.three = block(1, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(4 * width, 2, 1)

    def forward(self, image):
        deep = self.three(self.pool(self.two(self.pool(self.one(image)))))
        return F.interpolate(self.head(deep), size=image.shape[2:])


def smooth(count, side, generator):
    return F.interpolate(torch.randn(count, 1, side, side, generator=generator), (SIZE, SIZE), mode="bicubic")


def windows(count, seed):
    """Return images of one template, a smooth field of their own and noise."""
    generator = torch.Generator().manual_seed(seed)
    template = smooth(1, 6, torch.Generator().manual_seed(0))
    noise = torch.randn(count, 1, SIZE, SIZE, generator=generator)
    image = template + 0.5 * smooth(count, 5, generator) + 0.3 * noise
    label = torch.full((count, SIZE, SIZE), IGNORE)
    return {"images": Batch(image, label, label, image == image, toy_geometry(count, (SIZE, SIZE)))}


def placed(network, strategy):
    """Return how predicted and true overlaps of crops of unseen images correlate."""
    network.eval()
    with torch.no_grad():
        return float(strategy.step(network, windows(48, 1), Progress(0, 10)).notes["correlation"])


def test_crops_of_unseen_images_are_placed():
    torch.manual_seed(0)
    network, strategy = Three(), Voco(flip=0.0, rot90=0.0)
    strategy.build(network, Task(("background", "one"), 2))
    assert placed(network, strategy) < 0.2
    optimiser = torch.optim.AdamW([p for g in strategy.parameter_groups(network) for p in g["params"]], lr=2e-3)
    for step in range(STEPS):
        strategy.set_modes(network)
        losses = strategy.step(network, windows(8, 100 + step), Progress(step, STEPS)).losses
        optimiser.zero_grad()
        torch.autograd.backward(list(losses.values()))
        optimiser.step()
    now, constant, _ = strategy.means.tolist()
    assert now < 0.8 * constant
    assert placed(network, strategy) > 0.4
