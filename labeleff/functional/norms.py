"""Norm layers of any network: which have running statistics, and how they are kept from moving."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_statistics(network: nn.Module) -> None:
    """Put batch norms into eval mode: their running statistics are used, and do not move. Others have none."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
