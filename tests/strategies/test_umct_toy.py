"""A toy on which co-training has something to give: three labelled images of discs among bars, and many more without labels."""

import torch
from torch import nn

from labeleff.batch import IGNORE, Batch, Progress, Task
from labeleff.strategies.umct import Umct
from labeleff.testing import toy_geometry

TASK, SIZE, STEPS, SEED = Task(("background", "disc"), 2), 16, 60, 2


class Wide(nn.Module):
    """A few dilated convolutions, which see far enough to tell a disc from a bar."""

    def __init__(self, width=6):
        super().__init__()

        def block(channels, dilation):
            convolution = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation)
            return nn.Sequential(convolution, nn.InstanceNorm2d(width, affine=True), nn.LeakyReLU(0.1))

        self.body = nn.Sequential(block(1, 1), block(width, 2), block(width, 3))
        self.dropout, self.head = nn.Dropout(0.2), nn.Conv2d(width, 2, 1)

    def forward(self, image):
        return self.head(self.dropout(self.body(image)))


def scene(count, seed):
    """Return noisy images of a bright disc and an upright bar of the same brightness, and the discs."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[torch.arange(SIZE) / SIZE] * 2, indexing="ij")
    centre = 0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=generator)
    radius = 0.12 + 0.12 * torch.rand(count, 1, 1, generator=generator)
    disc = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2
    bar = (x - torch.randint(SIZE - 3, (count, 1, 1), generator=generator) / SIZE).abs() < 0.07
    contrast = 0.6 + 0.8 * torch.rand(count, 1, 1, generator=generator)
    noise = 0.5 * torch.randn(count, SIZE, SIZE, generator=generator)
    return (contrast * (disc | bar) + noise)[:, None], disc.long()


def share(image, label):
    return Batch(image, label, label, torch.ones_like(image, dtype=torch.bool), toy_geometry(len(image), (SIZE, SIZE)))


def trained(network, previous, *, unlabelled=None, rate):
    """Train one stage, and return its strategy."""
    strategy, given = Umct(samples=3, weight=1.0), scene(3, SEED)
    torch.manual_seed(SEED + 7)
    strategy.build(network, TASK)
    if previous is not None:
        strategy.inherit(previous.state_dict())
    optimiser = torch.optim.AdamW([p for group in strategy.parameter_groups(network) for p in group["params"]], lr=rate)
    for step in range(STEPS):
        torch.manual_seed(step)
        batch = {"labelled": share(*given)}
        if unlabelled is not None:
            image = unlabelled[torch.randperm(len(unlabelled))[:6]]
            batch["unlabelled"] = share(image, torch.full_like(image[:, 0], IGNORE, dtype=torch.int64))
        strategy.set_modes(network)
        losses = strategy.step(network, batch, Progress(step, STEPS)).losses
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    return strategy


def dice(strategy, network):
    """Return the Dice of the ensemble, and the mean of that of the views."""
    image, truth = scene(30, 200 + SEED)
    found = []
    for member in strategy.predictors(network).values():
        with torch.no_grad():
            said = member.eval()(image).argmax(1)
        found.append(float(2 * (said * truth).sum() / (said.sum() + truth.sum())))
    return found[0], sum(found[1:]) / (len(found) - 1)


def test_co_training_beats_what_it_started_from():
    torch.manual_seed(SEED)
    network = Wide()
    alone = trained(network, None, rate=1e-2)
    ensemble, views = dice(alone, network)
    taught = trained(network, alone, unlabelled=scene(24, 100 + SEED)[0], rate=5e-3)
    after, views_after = dice(taught, network)
    assert after > ensemble + 0.02
    assert views_after > views + 0.04
