"""One forward pass of a network that notes what each of its modules returns, and what depends on what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from labeleff.backbones.outputs import check_patch, copy_of, tensors_of
from labeleff.batch import Task

SEED = 0


@dataclass(frozen=True, eq=False)
class Output:
    """A tensor that a module returned.

    Args:
        module: Its name in the network.
        call: Which call of the module in the pass, from 0.
        item: Which of the tensors it returned.
        tensor: The tensor itself.
        start: When the call began, in the order in which calls begin.
        end: When it ended, in the order in which tensors are returned.
        version: How often the tensor had been changed in place.
    """

    module: str
    call: int
    item: int
    tensor: Tensor
    start: int
    end: int
    version: int

    @property
    def node(self) -> Any:
        """The operation of the autograd graph that made it; None for what depends on no parameter."""
        return self.tensor.grad_fn

    @property
    def settled(self) -> bool:
        """Nothing changed the tensor in place after the module had returned it."""
        return self.tensor._version == self.version


@dataclass
class DryRun:
    """What a pass has shown.

    Args:
        network: The copy of the network that was run.
        outputs: What modules returned, in the order in which they did.
        final: What the network returned.
        image: What it was given, [1, C, *S].
    """

    network: nn.Module
    outputs: list[Output]
    final: list[Tensor]
    image: Tensor
    parents: dict[Any, list[Any]] = field(default_factory=dict)
    """Every operation on the way to what the network returned, with those it takes from."""

    def __post_init__(self) -> None:
        self.parents = graph_of(tensor.grad_fn for tensor in self.final)

    def parameters_behind(self, tensor: Tensor) -> tuple[str, ...]:
        """Return the names of the parameters that a tensor depends on, in the network's order."""
        reached = {id(node.variable) for node in graph_of([tensor.grad_fn]) if hasattr(node, "variable")}
        return tuple(name for name, parameter in self.network.named_parameters() if id(parameter) in reached)

    def ancestors(self, node: Any) -> set[Any]:
        """Return all operations that one depends on, itself included."""
        return set(graph_of([node]))

    def descendants(self, node: Any) -> set[Any]:
        """Return all operations on the way to the network's output that depend on one, itself included."""
        children: dict[Any, list[Any]] = {}
        for child, parents in self.parents.items():
            for parent in parents:
                children.setdefault(parent, []).append(child)
        return _walk([node], lambda at: children.get(at, []))


def graph_of(roots: Iterable[Any]) -> dict[Any, list[Any]]:
    """Return the operations that some depend on, each with those it takes from; graphs are kept alive by it."""
    parents: dict[Any, list[Any]] = {}

    def look(at: Any) -> list[Any]:
        parents[at] = [parent for parent, _ in at.next_functions if parent is not None]
        return parents[at]

    _walk([root for root in roots if root is not None], look)
    return parents


def _walk(start: list[Any], neighbours: Any) -> set[Any]:
    """Return everything that can be reached."""
    seen, waiting = set(start), list(start)
    while waiting:
        for other in neighbours(waiting.pop()):
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen


def dry_run(network: nn.Module, task: Task, patch: Sequence[int]) -> DryRun:
    """Return what a network's modules do with one random image, in eval mode.

    A copy is run, since some networks keep tensors of a pass in attributes, with which they could not be copied any more.

    Args:
        network: Any backbone.
        task: What it is given.
        patch: Size of the image, voxels.

    Raises:
        ShapeError: The network cannot take the patch.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    outputs: list[Output] = []
    with torch.inference_mode(mode=False), torch.enable_grad():
        twin = differentiable_copy(network)
        image = torch.randn(1, task.channels, *patch, generator=torch.Generator().manual_seed(SEED)).to(device)
        with _noting(twin, outputs):
            try:
                final = twin.forward(image)  # past the network's own hooks: a trial is not an image that a method sees
            except (RuntimeError, ValueError, AssertionError, IndexError):
                check_patch(network, task, patch)
                raise
    return DryRun(twin, outputs, tensors_of(final), image)


def differentiable_copy(network: nn.Module) -> nn.Module:
    """Return a copy in eval mode all of whose parameters ask for gradients, so that the graph shows all of them."""
    twin = copy_of(network).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twin


@contextmanager
def _noting(network: nn.Module, outputs: list[Output]) -> Iterator[None]:
    """Within, what modules return is noted. Hooks return None: anything else would take the place of the output."""
    calls: dict[str, int] = {}
    open_calls: list[tuple[str, int, int]] = []
    starts = count()
    handles = []

    def begin(name: str) -> None:
        calls[name] = calls.get(name, -1) + 1
        open_calls.append((name, calls[name], next(starts)))

    def finish(returned: Any) -> None:
        name, call, start = open_calls.pop()
        for item, tensor in enumerate(tensors_of(returned)):
            outputs.append(Output(name, call, item, tensor, start, len(outputs), tensor._version))

    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
            handles.append(module.register_forward_hook(lambda _, __, returned: finish(returned)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
