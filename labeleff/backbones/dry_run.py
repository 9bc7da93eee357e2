"""One forward pass of a network that notes what each of its modules returns, and what depends on what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from labeleff.backbones.outputs import check_patch, tensors_of
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
        outputs: What modules returned, in the order in which they did.
        final: What the network returned.
        image: What it was given, [1, C, *S].
        inputs: Sizes that each module was given in its first call, by name; None where it was no tensor.
    """

    outputs: list[Output]
    final: list[Tensor]
    image: Tensor
    inputs: dict[str, tuple[int, ...] | None]
    parents: dict[Any, list[Any]] = field(default_factory=dict)
    """Every operation on the way to what the network returned, with those it takes from."""

    def __post_init__(self) -> None:
        self.parents = graph_of(tensor.grad_fn for tensor in self.final)

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


def parameters_behind(tensor: Tensor, network: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that a tensor of a dry run depends on, in the network's order."""
    reached = {id(node.variable) for node in graph_of([tensor.grad_fn]) if hasattr(node, "variable")}
    return tuple(name for name, parameter in network.named_parameters() if id(parameter) in reached)


def dry_run(network: nn.Module, task: Task, patch: Sequence[int]) -> DryRun:
    """Return what a network's modules do with one random image, in eval mode. The network is left as it was.

    Args:
        network: Any backbone.
        task: What it is given.
        patch: Size of the image, voxels.

    Raises:
        ShapeError: The network cannot take the patch.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_differentiable(network))
        image = torch.randn(1, task.channels, *patch, generator=torch.Generator().manual_seed(SEED)).to(device)
        outputs: list[Output] = []
        inputs: dict[str, tuple[int, ...] | None] = {}
        stack.enter_context(_noting(network, outputs, inputs))
        try:
            final = network.forward(image)  # past the network's own hooks: a trial is not an image that a method sees
        except (RuntimeError, ValueError, AssertionError, IndexError):
            check_patch(network, task, patch)
            raise
    return DryRun(outputs, tensors_of(final), image, inputs)


@contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """Within, everything is in eval mode and all parameters ask for gradients, so that the graph shows all of them."""
    modes = [(module, module.training) for module in network.modules()]
    asked = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        network.eval()
        for parameter, _ in asked:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _noting(network: nn.Module, outputs: list[Output], inputs: dict[str, tuple[int, ...] | None]) -> Iterator[None]:
    """Within, what modules return is noted. Hooks return None: anything else would take the place of the output."""
    calls: dict[str, int] = {}
    open_calls: list[tuple[str, int, int]] = []
    starts = count()
    handles = []

    def begin(name: str, arguments: tuple[Any, ...]) -> None:
        given = tensors_of(arguments)
        inputs.setdefault(name, tuple(given[0].shape) if given else None)
        calls[name] = calls.get(name, -1) + 1
        open_calls.append((name, calls[name], next(starts)))

    def finish(returned: Any) -> None:
        name, call, start = open_calls.pop()
        for item, tensor in enumerate(tensors_of(returned)):
            outputs.append(Output(name, call, item, tensor, start, len(outputs), tensor._version))

    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda _, given, name=name: begin(name, given)))
            handles.append(module.register_forward_hook(lambda _, __, returned: finish(returned)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
