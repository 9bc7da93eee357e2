"""Views of an image: permuted, turned and mirrored axes, and networks that look through them.

UMCT (Xia et al., WACV 2020, arXiv:1811.12506) gives each view j a transform T_j of space and a network f_j of its own:
``p_j(X) = T_j⁻¹(f_j(T_j(X)))``. In 3-D its views permute the axes: axial, coronal and sagittal are a different axis last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labeleff.backbones.outputs import accepts, logits_of, rounded
from labeleff.batch import Task
from labeleff.errors import ShapeError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class View:
    """An order and direction of the spatial axes; every permutation, flip and turn by 90° is one. Invertible, no arithmetic.

    Args:
        axes: Axis i of what is seen is axis ``axes[i]`` of the image; each of 0 … d-1 once.
        flipped: Axes of what is seen that run backwards.

    Raises:
        ShapeError: ``axes`` is no permutation, or ``flipped`` is not among them.
    """

    axes: tuple[int, ...]
    flipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if sorted(self.axes) != list(range(len(self.axes))) or not self.axes:
            raise ShapeError(f"axes are {self.axes}; a view needs each of 0 … d-1 once")
        if len(set(self.flipped)) != len(self.flipped) or not set(self.flipped) <= set(self.axes):
            raise ShapeError(f"flipped is {self.flipped}; it must name axes out of 0 … {len(self.axes) - 1}, each once")
        object.__setattr__(self, "flipped", tuple(sorted(self.flipped)))

    @property
    def ndim(self) -> int:
        """Number of spatial axes, d."""
        return len(self.axes)

    @property
    def name(self) -> str:
        """The axes in words, those that run backwards with a minus: ``axes 1,-0,2``."""
        return "axes " + ",".join(f"{'-' if i in self.flipped else ''}{axis}" for i, axis in enumerate(self.axes))

    def apply(self, tensor: Tensor) -> Tensor:
        """Return what is seen of a tensor [B, C, *S] (or of anything else with two leading axes), perhaps as a view of it.

        Raises:
            ShapeError: The tensor has another number of axes.
        """
        if tensor.ndim != self.ndim + 2:
            raise ShapeError(
                f"a view of {self.ndim} axes cannot be taken of {tuple(tensor.shape)}, which is no [B, C, *S]"
            )
        seen = tensor.permute(0, 1, *(axis + 2 for axis in self.axes))
        return seen.flip([axis + 2 for axis in self.flipped]) if self.flipped else seen

    def invert(self, tensor: Tensor) -> Tensor:
        """Return a tensor [B, K, *S] as seen in the frame of the image: ``invert(apply(x))`` is x to the bit."""
        return self.inverse().apply(tensor)

    def inverse(self) -> View:
        """Return the view that undoes this one."""
        axes = tuple(self.axes.index(axis) for axis in range(self.ndim))
        return View(axes, tuple(self.axes[axis] for axis in self.flipped))

    def then(self, other: View) -> View:
        """Return the view of a view: first this one, then the other.

        Raises:
            ShapeError: They have different numbers of axes.
        """
        if other.ndim != self.ndim:
            raise ShapeError(f"a view of {other.ndim} axes cannot follow one of {self.ndim}")
        axes = tuple(self.axes[axis] for axis in other.axes)
        flipped = tuple(i for i, axis in enumerate(other.axes) if (axis in self.flipped) != (i in other.flipped))
        return View(axes, flipped)

    def shape(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Return the size that is seen of an image of a size, voxels."""
        return self._permuted(spatial)

    def spacing(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Return the size of a voxel along the axes that are seen, of its size along those of the image, mm."""
        return self._permuted(spacing)

    def _permuted(self, values: Sequence[Number]) -> tuple[Number, ...]:
        if len(values) != self.ndim:
            raise ShapeError(f"a view of {self.ndim} axes needs {self.ndim} numbers, not {tuple(values)}")
        return tuple(values[axis] for axis in self.axes)


def identity(ndim: int) -> View:
    """Return the view that leaves everything as it is."""
    return View(tuple(range(ndim)))


def flip(ndim: int, *axes: int) -> View:
    """Return the view in which some axes run backwards."""
    return View(tuple(range(ndim)), tuple(axis % ndim for axis in axes))


def transposition(ndim: int, first: int, second: int) -> View:
    """Return the view in which two axes have changed places."""
    axes = list(range(ndim))
    axes[first], axes[second] = axes[second], axes[first]
    return View(tuple(axes))


def rotation(ndim: int, turns: int = 1, plane: tuple[int, int] = (0, 1)) -> View:
    """Return the view turned by ``turns`` times 90° in a plane, from its first axis towards its second, as ``numpy.rot90``."""
    quarter = transposition(ndim, *plane).then(flip(ndim, plane[0]))
    view = identity(ndim)
    for _ in range(turns % 4):
        view = view.then(quarter)
    return view


def standard_views(ndim: int, count: int) -> tuple[View, ...]:
    """Return so many views of one another, the image as it is first.

    3-D, as in the paper: permutations of the axes. The first three have a different axis last and keep the order of the
    other two (for images in the order x, y, z: axial, coronal, sagittal), six are all there are, two are the first two.

    2-D, **outside the paper**, which has 3-D images: there is no plane to choose, so views are the image turned by 0°, 90°,
    180°, 270°, then the same of the transposed image. Networks that differ in more than the view may be worth more.

    Args:
        ndim: 2 or 3.
        count: 2 … 8 in 2-D, 2 … 6 in 3-D.

    Raises:
        ShapeError: There are no such views.
    """
    if ndim == 3:
        first = [(0, 1, 2), (0, 2, 1), (1, 2, 0)]
        views = [View(axes) for axes in [*first, *(p for p in permutations(range(3)) if p not in first)]]
    elif ndim == 2:
        turned = [rotation(2, turns) for turns in range(4)]
        views = [*turned, *(transposition(2, 0, 1).then(turn) for turn in turned)]
    else:
        raise ShapeError(f"there are views of 2 and 3 axes, not of {ndim}")
    if not 2 <= count <= len(views):
        raise ShapeError(
            f"{count} views of a {ndim}-D image were asked for; there are 2 … {len(views)}: one view has nobody to learn from"
        )
    return tuple(views[:count])


class ViewNetwork(nn.Module):
    """A network that looks at images through a view: ``x -> T⁻¹(f(T(x)))``. Its weights are found under ``network.``.

    Images and logits are in the frame of the image; what the network sees need not be a cube.

    Args:
        network: Any backbone.
        view: What it sees.
    """

    def __init__(self, network: nn.Module, view: View) -> None:
        super().__init__()
        self.network, self.view = network, view

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, K, *S] of [B, C, *S]."""
        # some layers reshape their input by ``view``, as some losses do the logits
        seen = self.view.apply(image).contiguous()
        return self.view.invert(logits_of(self.network(seen))).contiguous()


class Ensemble(nn.Module):
    """The mean prediction of several networks, as logits: log of the mean probability.

    Args:
        networks: Members, each from [B, C, *S] to logits [B, K, *S].
        regions: Classes are overlapping regions: the mean is of sigmoids, and comes back as its log odds.
    """

    def __init__(self, networks: Sequence[nn.Module], *, regions: bool = False) -> None:
        super().__init__()
        if not networks:
            raise ShapeError("an ensemble needs at least one network")
        self.networks, self.regions = nn.ModuleList(networks), regions

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, K, *S] float32 of [B, C, *S]. Sums are of logarithms, so that no probability rounds to 0 or 1."""
        inside: Tensor | None = None
        outside: Tensor | None = None
        for network in self.networks:
            scores = logits_of(network(image)).float()
            member = F.logsigmoid(scores) if self.regions else scores.log_softmax(1)
            inside = member if inside is None else torch.logaddexp(inside, member)
            if self.regions:
                other = F.logsigmoid(-scores)
                outside = other if outside is None else torch.logaddexp(outside, other)
        assert inside is not None  # noqa: S101  there is a member
        return inside - math.log(len(self.networks)) if outside is None else inside - outside


def first_of_ensemble(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state of the first network of an :class:`Ensemble`, and what is left; all of any other network's state."""
    first = "networks.0."
    if not any(key.startswith(first) for key in state) or not all(key.startswith("networks.") for key in state):
        return dict(state), {}
    own = {key.removeprefix(first): value for key, value in state.items() if key.startswith(first)}
    return own, {key: value for key, value in state.items() if not key.startswith(first)}


def check_views(networks: Sequence[ViewNetwork], task: Task, patch: Sequence[int]) -> None:
    """Try a patch on every view.

    Raises:
        ShapeError: A network cannot take what it sees of the patch; names the view and a patch that all views can take.
    """
    for number, member in enumerate(networks):
        if accepts(member, task, patch):
            continue
        seen = list(member.view.shape(patch))
        name = f"view {number} ({member.view.name})"
        said = f"data.patch is {list(patch)}, of which {name} sees {seen}, which its network cannot take"
        for divisor, nearest in rounded(patch):
            if nearest != list(patch) and all(accepts(network, task, nearest) for network in networks):
                raise ShapeError(f"{said}; multiples of {divisor} work for all views, such as {nearest}")
        raise ShapeError(f"{said}; nor do all views take a multiple of 2, 4, … 64 near it")
