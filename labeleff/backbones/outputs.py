"""What networks hand back, unwrapped in one place, and what patches they can take."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labeleff.batch import Task
from labeleff.errors import ShapeError


def logits_of(output: Any) -> Tensor:
    """Return the logits in full resolution of what a network returned.

    Deep supervision comes as a tuple or list (the first is full resolution), a dict (``logits`` or ``out``), or stacked
    along an extra axis 1, as MONAI's DynUNet does while training.

    Raises:
        ShapeError: There is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if key in output:
                return logits_of(output[key])
    if isinstance(output, list | tuple) and output:
        return logits_of(output[0])
    raise ShapeError(f"the backbone returned {type(output).__name__}; a tensor of logits [B, K, *S] is needed")


def tensors_of(output: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists and mappings, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


class Unwrapped(nn.Module):
    """A network whose output is unwrapped; its parameters are found under ``network.``.

    Args:
        network: Any network.
        ndim: Spatial axes; a stacked output has one axis more.
    """

    def __init__(self, network: nn.Module, ndim: int) -> None:
        super().__init__()
        self.network, self.ndim = network, ndim

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, K, *S] of [B, C, *S]."""
        logits = logits_of(self.network(image))
        return logits[:, 0] if logits.ndim == self.ndim + 3 else logits


def check_patch(backbone: nn.Module, task: Task, patch: Sequence[int]) -> None:
    """Try a patch on a network.

    Raises:
        ShapeError: The network cannot take it, or does not return logits of its size; the message names a size that works.
    """
    if accepts(backbone, task, patch):
        return
    for divisor, nearest in rounded(patch):
        if nearest != list(patch) and accepts(backbone, task, nearest):
            raise ShapeError(
                f"data.patch is {list(patch)}, which this backbone cannot take; multiples of {divisor} work, such as {nearest}"
            )
    raise ShapeError(
        f"data.patch is {list(patch)}, which this backbone cannot take; it must map "
        f"[B, {task.channels}, {', '.join('S' * task.ndim)}] to [B, {task.num_classes}, …] of the same size"
    )


def nearest_size(backbone: nn.Module, task: Task, size: Sequence[float]) -> tuple[int, ...]:
    """Return a size that a network takes: the one asked for rounded down, or the nearest multiples of 2, 4, … 64.

    Args:
        backbone: The network; it is tried in eval mode, and left as it was.
        task: What it is given.
        size: Size asked for, voxels, one number per axis.

    Raises:
        ShapeError: None of these can be taken.
    """
    floor = tuple(max(1, math.floor(n)) for n in size)
    for candidate in (floor, *(tuple(nearest) for _, nearest in rounded(size))):
        if accepts(backbone, task, candidate):
            return candidate
    raise ShapeError(
        f"this backbone takes neither {list(floor)} nor a multiple of 2, 4, … 64 near it: it cannot see images of "
        "several sizes"
    )


def rounded(size: Sequence[float]) -> Iterator[tuple[int, list[int]]]:
    """Return, one after the other, divisors and the multiples of them that are nearest to a size."""
    for divisor in (2, 4, 8, 16, 32, 64):
        yield divisor, [max(divisor, round(n / divisor) * divisor) for n in size]


def accepts(backbone: nn.Module, task: Task, patch: Sequence[int]) -> bool:
    """Return whether a network gives logits of its size for a patch; it is tried in eval mode, and left as it was."""
    training = {module: module.training for module in backbone.modules()}
    state = torch.get_rng_state()
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            backbone.eval()
            # past the hooks: a trial is not an image that a method sees
            output = backbone.forward(torch.zeros(1, task.channels, *patch, device=device))
        return tuple(output.shape) == (1, task.num_classes, *patch)
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return False
    finally:
        torch.set_rng_state(state)
        for module, mode in training.items():
            module.training = mode


def copy_of(network: nn.Module) -> nn.Module:
    """Return a deep copy of a network that may have been trained.

    Some keep tensors of their last pass (MONAI's DynUNet its heads), and what has a graph cannot be copied: they are copied
    without it, and the next pass overwrites them.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for tensor in tensors_of(vars(module)):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(network, memo)
