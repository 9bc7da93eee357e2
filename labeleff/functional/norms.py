"""Norm layers of any network: their statistics are kept, or taken from the batch; their affine parameters are found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a network, which alone have running statistics by default."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def freeze_statistics(network: nn.Module) -> None:
    """Put batch norms into eval mode: their running statistics are used, and do not move."""
    for module in batch_norms(network):
        module.eval()


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Within, batch norms use the statistics of the batch, whatever their mode, and leave their running ones alone."""
    norms = batch_norms(network)
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, track) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, track


class OnBatchStatistics(nn.Module):
    """A network that predicts with the statistics of the batch it is given. Its weights keep their own names.

    Predictions depend on what else is in the batch: ``evaluation.window_batch`` becomes part of the method.

    Args:
        network: Any network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Return what the network returns."""
        with batch_statistics(self.network):
            found: Tensor = self.network(image)
        return found

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state of the network itself."""
        return self.network.state_dict(*args, **kwargs)


def norm_affine(network: nn.Module) -> list[nn.Parameter]:
    """Return scale and shift of all norm layers: batch, instance, group and layer norm."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    modules = (module for module in network.modules() if isinstance(module, kinds))
    return [p for module in modules for p in module.parameters(recurse=False)]


@contextmanager
def cumulative_statistics(network: nn.Module) -> Iterator[None]:
    """Within, running statistics become the plain mean over all batches since they were last reset, without gradients."""
    norms = batch_norms(network)
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    try:
        with torch.no_grad():
            yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
