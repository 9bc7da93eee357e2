"""Small networks of every registered kind, shared by the tests of networks."""

from importlib.util import find_spec

import pytest
import torch

from labeleff import registry
from labeleff.batch import Task

SMALL = {
    "unet": {"channels": (4, 8, 16)},
    "basic_unet": {"features": (4, 4, 8, 8, 16, 4)},
    "vnet": {},
    "segresnet": {"filters": 8, "blocks_down": (1, 1, 1)},
    "dynunet": {"filters": (4, 8, 16)},
    "attention_unet": {"channels": (4, 8, 16)},
    "mednext": {"filters": 4},
    "residual_unet": {"filters": (4, 8, 16), "blocks": (1, 1, 2)},
    "flexible_unet": {"decoder": (16, 8, 8, 4, 4)},
    "unetr": {"hidden": 24, "heads": 3, "features": 4, "image": 32},
    "swin_unetr": {"features": 12, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8), "window": 4},
}
SIDE = {"flexible_unet": 64, "swin_unetr": 64}
"""Side of an image that leaves two voxels in the deepest level, where 32 does not."""
EINOPS = {"unetr", "swin_unetr"}


def task_of(ndim):
    return Task(("background", "one", "two"), ndim, channels=2)


def make(name, ndim, seed=0, **more):
    if name in EINOPS and find_spec("einops") is None:
        pytest.skip("needs einops")
    torch.manual_seed(seed)
    return registry.get("backbone", name)(task_of(ndim), **(SMALL[name] | more))


HEAVY = ("flexible_unet", "swin_unetr", "vnet")
"""Up to two minutes a test in 3-D."""


def sorted_out(combinations, left_out=lambda *one: False):
    """Return combinations (name of a network, ..., ndim) as parameters; the heaviest, and what is left out, are exhaustive."""
    return [
        pytest.param(*one, marks=pytest.mark.exhaustive)
        if (one[0] in HEAVY and one[-1] == 3) or left_out(*one)
        else one
        for one in combinations
    ]
