"""Networks that are blind along one axis, k × k × 1 in place of k × k × k, and 2-D weights for them.

In UMCT (Xia et al., WACV 2020, arXiv:1811.12506) every view's encoder has kernels n × n × 1 in its own frame: the views
differ in what they can see, and all may start from one 2-D network without becoming the same. Its decoders are 3-D.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from labeleff.backbones.dry_run import differentiable_copy
from labeleff.backbones.outputs import accepts, nearest_size
from labeleff.backbones.taps import USUAL_PATCH, find_taps
from labeleff.batch import Task
from labeleff.errors import ShapeError

Part = Literal["encoder", "all"]
Strided = Literal["full", "flat", "plane"]


@dataclass(frozen=True)
class AsymmetryReport:
    """Which convolutions have become blind along an axis.

    Args:
        axis: The axis, 0 … 2.
        changed: Names of those that have.
        kept: Names of all others, with the reason.
    """

    axis: int
    changed: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]

    @property
    def summary(self) -> str:
        """All of it in one line."""
        return (
            f"{len(self.changed)} of {len(self.changed) + len(self.kept)} convolutions are now blind along axis {self.axis}"
            + (counted("; left as they are", self.kept))
        )


def counted(heading: str, entries: Sequence[tuple[str, str]]) -> str:
    """Return a heading and how often each reason is given, or nothing; entries are pairs of a name and a reason."""
    counts = Counter(reason for _, reason in entries)
    return f"{heading}: " + ", ".join(f"{n} ({reason})" for reason, n in counts.items()) if counts else ""


def flatten_kernel(convolution: nn.Conv3d, axis: int, *, unit_stride: bool = False) -> None:
    """Make the kernel of a convolution one voxel wide along an axis, in place, by summing it along the axis.

    On inputs that are constant along the axis the layer stays what it was, but for the margin that padding with zeros
    reached into; the central slice alone would have scaled it down. Its stride stays, so that sizes do too: with padding p,
    dilation d and stride s, n voxels became ``⌊(n + 2p - d(k-1) - 1) / s⌋ + 1`` and become ``⌊(n - 1) / s⌋ + 1``, which is
    the same for all n where 2p = d(k-1), and see :func:`keeps_sizes`.

    Args:
        convolution: Any 3-D convolution that is not transposed.
        axis: 0 … 2.
        unit_stride: Take every voxel along the axis from now on.
    """
    weight = convolution.weight.detach().sum(axis + 2, keepdim=True)
    convolution.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
    convolution.kernel_size = _with(convolution.kernel_size, axis, 1)
    if not isinstance(convolution.padding, str):
        convolution.padding = _with(convolution.padding, axis, 0)
    # what torch pads by in other modes than zeros: both ends of the last axis come first
    ends = convolution._reversed_padding_repeated_twice
    convolution._reversed_padding_repeated_twice = [0 if i // 2 == 2 - axis else n for i, n in enumerate(ends)]
    if unit_stride:
        convolution.stride = _with(convolution.stride, axis, 1)


def _with(values: Sequence[int], axis: int, value: int) -> tuple[int, int, int]:
    first, second, third = (value if i == axis else old for i, old in enumerate(values))
    return first, second, third


def keeps_sizes(convolution: nn.Conv3d, axis: int) -> bool:
    """Return whether sizes that the stride divides come out the same with a kernel of one voxel along the axis.

    For n = s · m both are m if and only if ``1 - s <= 2p - d(k-1) <= 0``.
    """
    if convolution.padding == "same":
        return True
    padding = 0 if isinstance(convolution.padding, str) else int(convolution.padding[axis])
    excess = 2 * padding - convolution.dilation[axis] * (convolution.kernel_size[axis] - 1)
    return 1 - convolution.stride[axis] <= excess <= 0


def make_asymmetric(
    network: nn.Module,
    task: Task,
    *,
    axis: int = -1,
    part: Part = "encoder",
    strided: Strided = "full",
    patch: Sequence[int] | None = None,
) -> AsymmetryReport:
    """Make the convolutions of a 3-D network blind along one axis, in place, and return which.

    Pooling, upsampling and transposed convolutions stay 3-D. So do, by default, convolutions with a stride along the axis:
    they are the pooling of networks that have none, and one that is blind would leave out every second slice for good where
    no skip connection has seen it (the first layer of MONAI's ``UNet``). Call it before an optimiser is made.

    Args:
        network: Any 3-D backbone.
        task: What it is given.
        axis: The axis in the network's own frame: last, as in the paper, where each view has its own last.
        part: ``encoder``: what the bottleneck depends on, found by a dry run; ``all``: the decoder too.
        strided: Convolutions with a stride along the axis: ``full`` leaves them 3-D, ``flat`` makes them blind with their
            stride, ``plane`` blind with stride 1 along the axis, which only networks can take that enlarge in the plane only.
        patch: Size of the image of the dry run, voxels; None: 64.

    Raises:
        ShapeError: The network is not 3-D, has no bottleneck, or no longer fits together.
    """
    if task.ndim != 3 or not -3 <= axis < 3:
        raise ShapeError(
            f"a {task.ndim}-D network and axis {axis}: only 3-D networks have an axis, -3 … 2, to be blind along"
        )
    axis %= 3
    size = tuple(patch) if patch is not None else nearest_size(network, task, (USUAL_PATCH,) * 3)
    inside = set(find_taps(network, task, patch=size).encoder_parameters) if part == "encoder" else None
    # by module, since DynUNet has its modules under two names each
    shared = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    changed, kept = [], []
    for name, module in network.named_modules():
        if isinstance(module, _ConvNd):
            outside = inside is not None and f"{name}.weight" not in inside
            reason = "not in the encoder" if outside else _reason_to_keep(module, axis, strided, shared)
            if reason:
                kept.append((name, reason))
            else:
                changed.append(name)
    trial = differentiable_copy(network)
    for twin in (trial, network):
        for name in changed:
            convolution = twin.get_submodule(name)
            assert isinstance(convolution, nn.Conv3d)  # noqa: S101  chosen above
            flatten_kernel(convolution, axis, unit_stride=strided == "plane")
        if twin is trial and not accepts(trial, task, size):
            raise ShapeError(
                f"with strided={strided!r} this backbone no longer fits together: its skip connections and upsampling are "
                f"made for its strides along axis {axis}; use strided='full' or 'flat'"
            )
    return AsymmetryReport(axis, tuple(changed), tuple(kept))


def _reason_to_keep(convolution: _ConvNd, axis: int, strided: Strided, shared: Mapping[int, int]) -> str:
    """Return why a convolution stays as it is; empty if it does not."""
    weight = convolution._parameters.get("weight")
    if not isinstance(convolution, nn.Conv3d):
        return "transposed"
    if convolution.kernel_size[axis] == 1:
        return "one voxel wide already"
    if weight is None or shared[id(weight)] > 1:
        return "weight computed or shared"
    if convolution.stride[axis] > 1 and strided == "full":
        return "strided"
    return "" if keeps_sizes(convolution, axis) else "padding that changes sizes"


@dataclass(frozen=True)
class InflationReport:
    """What became of 2-D weights in a 3-D network.

    Args:
        matched: Entries of the 3-D network that equal the 2-D ones, kernels slice by slice.
        adapted: Entries that do so only on average, and how.
        left: Entries of the 3-D network that stay as they were, and why.
        unused: Entries of the 2-D network that fit nowhere.
        share: Share of the numbers in the 2-D network that were used, in [0, 1].
    """

    matched: tuple[str, ...]
    adapted: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    share: float

    @property
    def summary(self) -> str:
        """All of it in one line."""
        taken = f"{self.share:.0%} of the 2-D weights are used: {len(self.matched)} entries as they are"
        return (
            taken + counted("; adapted", self.adapted) + counted("; left", self.left) + f"; {len(self.unused)} unused"
        )


def inflate_2d(
    state: Mapping[str, Tensor], network: nn.Module, *, axis: int = -1, prefix: str = "", minimum: float = 0.5
) -> InflationReport:
    """Put the weights of a 2-D network into a 3-D one, in place, and return what became of each.

    * k × k into k × k × 1 is exact: the layer does in each slice what the 2-D one does.
    * k × k into k × k × m is repeated and divided by m (of a transposed convolution: by m over its stride), which equals the
      2-D layer on inputs that are constant along the axis.
    * The first convolution may have other input channels: their mean is given to each, which equals the 2-D layer where all
      channels are alike.
    * Norm layers, biases and statistics are copied.

    Args:
        state: State of the 2-D network.
        network: The 3-D network; nothing is written if it is refused.
        axis: The axis that the 2-D network does not have.
        prefix: What comes before the 2-D names in the 3-D network, such as ``encoder.``
        minimum: Smallest share of the 2-D numbers that must find a place.

    Raises:
        ShapeError: Less than that does, so that these are weights of another network.
    """
    own = network.state_dict()
    first = next((name for name, tensor in own.items() if tensor.ndim == 5), None)

    def fit(name: str, target: Tensor) -> tuple[Tensor | None, str]:
        source = state.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if source is None:
            return None, "no 2-D weight of this name"
        stride = stride_of_transposed(network, name, axis % 3)
        return inflated(source, target, axis % 3, stride=stride, first=name == first)

    taken, matched, adapted, left = fitted(own, fit)
    used = {name.removeprefix(prefix) for name in taken}
    unused = tuple(name for name in state if name not in used)
    total = sum(tensor.numel() for tensor in state.values())
    share = sum(state[name].numel() for name in used) / max(total, 1)
    report = InflationReport(matched, adapted, left, unused, share)
    if share < minimum:
        example = next(iter(unused), "none")
        raise ShapeError(
            f"only {share:.0%} of the 2-D weights fit this network, and at least {minimum:.0%} must: {example!r} fits nowhere; "
            "is prefix right, and has the network the same widths?"
        )
    with torch.no_grad():
        for name, tensor in taken.items():
            own[name].copy_(tensor)
    return report


class Fitted(NamedTuple):
    """What the entries of a network can be given."""

    taken: dict[str, Tensor]
    matched: tuple[str, ...]
    adapted: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]


def fitted(own: Mapping[str, Tensor], fit: Callable[[str, Tensor], tuple[Tensor | None, str]]) -> Fitted:
    """Return what is found for each entry of a network, and how: as it is, adapted, or not at all.

    Args:
        own: The network's entries.
        fit: Returns a tensor in the shape of an entry and how it was adapted (empty: it was not), or None and why there is none.
    """
    taken: dict[str, Tensor] = {}
    matched, adapted, left = [], [], []
    for name, target in own.items():
        found, how = fit(name, target)
        if found is None:
            left.append((name, how))
            continue
        taken[name] = found
        if how:
            adapted.append((name, how))
        else:
            matched.append(name)
    return Fitted(taken, tuple(matched), tuple(adapted), tuple(left))


def stride_of_transposed(network: nn.Module, name: str, axis: int) -> int | None:
    """Return the stride along an axis of the transposed convolution that a weight belongs to; None for other weights."""
    owner = network.get_submodule(name.rpartition(".")[0])
    return int(owner.stride[axis]) if isinstance(owner, nn.ConvTranspose3d) else None


def inflated(
    source: Tensor, target: Tensor, axis: int, *, stride: int | None, first: bool
) -> tuple[Tensor | None, str]:
    """Return a 2-D tensor in the shape of a 3-D one and in what respect it is not exact, or None and why it does not fit.

    Args:
        source: Of the 2-D network.
        target: Of the 3-D network.
        axis: 0 … 2, the axis that the 2-D network does not have.
        stride: Along that axis, of a transposed convolution; None for other weights.
        first: It sees the image, and may have other input channels.
    """
    if source.shape == target.shape:
        return source, ""
    kernel = list(target.shape[2:])
    if (
        target.ndim != 5
        or source.ndim != 4
        or len(source) != len(target)
        or list(source.shape[2:]) != _without(kernel, axis)
    ):
        return None, f"{list(source.shape)} does not fit {list(target.shape)}"
    how = []
    if source.shape[1] != target.shape[1]:
        if not first or stride is not None:
            return None, f"{list(source.shape)} does not fit {list(target.shape)}"
        how.append(f"{source.shape[1]} input channels averaged to {target.shape[1]}")
        source = source.sum(1, keepdim=True).div(target.shape[1]).expand(-1, target.shape[1], -1, -1)
    width = kernel[axis]
    divisor = width / (stride or 1)
    if width > 1:
        how.append(f"repeated {width} times" + (f", divided by {divisor:g}" if divisor != 1 else ""))
    return source.unsqueeze(axis + 2).div(divisor).expand_as(target), "; ".join(how)


def _without(values: list[int], axis: int) -> list[int]:
    return values[:axis] + values[axis + 1 :]
