"""Passes of one network over one image that compute what they have in common only once.

The forward of an arbitrary network cannot be entered in the middle. So every pass starts at the top, but modules that ended
before the first random one give back what they returned in the first pass, the largest of them as a whole; between them
only the glue of the network's own code runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from labeleff.backbones.outputs import tensors_of
from labeleff.errors import ShapeError


@dataclass
class _Call:
    """A call of a module in the first pass, in the order in which calls begin.

    Args:
        module: What was called.
        resume: Number of the first call that began after this one had ended; None: it had not ended before the first random
            module was called, so that it runs in every pass.
        returned: What it returned.
        versions: How often each tensor in it had been changed in place when it was returned.
        steady: It may be given back: what it was given was left as it was, and what it returned can be kept.
    """

    module: nn.Module
    resume: int | None = None
    returned: Any = None
    versions: list[int] = field(default_factory=list)
    steady: bool = False


class Replay:
    """A network as a context in which the first pass is recorded, and the others repeat what is common to all.

    All passes must be given the same image, in one mode but for the random modules, under ``no_grad``. A network that draws
    random numbers before the first of these modules, or does not call its modules in the same order each time, shares
    nothing or is refused. What modules hand on through attributes of others is kept from the first pass.

    Args:
        network: Any network.
        random: Modules whose output is to differ from pass to pass.
    """

    def __init__(self, network: nn.Module, random: Collection[nn.Module]) -> None:
        self.network, self.random = network, {id(module) for module in random}
        self.calls: list[_Call] = []
        self.recorded = False
        self.next = 0
        self.varies = False  # in this pass a random module has been called
        self.draws: Tensor | None = None
        self.device = torch.device("cpu")
        self.before: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> Replay:
        """Take the place of the modules' forwards."""
        try:
            for module in self.network.modules():
                if module is not self.network and not isinstance(module, torch.jit.ScriptModule):
                    self.before.append((module, vars(module).get("forward")))
                    vars(module)["forward"] = self._standing_in(module, module.forward)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Give the modules their own forwards back, and let go of what was recorded."""
        for module, forward in self.before:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
        self.before, self.calls = [], []

    def __call__(self, image: Tensor) -> Any:
        """Return what the network returns."""
        self.next, self.varies = 0, False
        if self.recorded:
            return self.network(image)
        self.device = image.device
        self.draws = self._random_state()
        returned = self.network(image)
        for call in self.calls:  # what was changed in place after it was returned is not what it was
            call.steady = call.steady and [t._version for t in tensors_of(call.returned)] == call.versions
        self.recorded = True
        return returned

    def _standing_in(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*given: Any, **named: Any) -> Any:
            if self.varies:
                return forward(*given, **named)
            if id(module) in self.random:
                self._vary()
                return forward(*given, **named)
            if self.recorded:
                return self._repeat(module, forward, given, named)
            return self._record(module, forward, given, named)

        return stand_in

    def _vary(self) -> None:
        """Note that from here on passes differ. What came before is worth nothing if it was random too."""
        self.varies = True
        if not self.recorded and self.draws is not None and not torch.equal(self.draws, self._random_state()):
            for call in self.calls:
                call.steady, call.returned = False, None

    def _random_state(self) -> Tensor:
        """Return the state of the generator that a pass draws from."""
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def _record(
        self, module: nn.Module, forward: Callable[..., Any], given: tuple[Any, ...], named: Mapping[str, Any]
    ) -> Any:
        call, first = _Call(module), len(self.calls)
        self.calls.append(call)
        inputs = [*tensors_of(given), *tensors_of(named)]
        versions = [tensor._version for tensor in inputs]
        returned = forward(*given, **named)
        if not self.varies:
            call.resume = len(self.calls)
            if _can_be_kept(returned) and versions == [tensor._version for tensor in inputs]:
                call.steady, call.returned = True, _copied(returned)
                call.versions = [tensor._version for tensor in tensors_of(returned)]
                for inner in self.calls[first + 1 :]:  # the larger module stands for them: their tensors can go
                    inner.steady, inner.returned = False, None
        return returned

    def _repeat(
        self, module: nn.Module, forward: Callable[..., Any], given: tuple[Any, ...], named: Mapping[str, Any]
    ) -> Any:
        call = self.calls[self.next] if self.next < len(self.calls) else None
        if call is None or call.module is not module:
            raise ShapeError(
                "this backbone does not call its modules in the same order for the same image, so that passes have nothing "
                "in common; use share=False"
            )
        if call.steady and call.resume is not None:
            self.next = call.resume
            return _copied(call.returned)
        self.next += 1
        return forward(*given, **named)


def _can_be_kept(returned: Any) -> bool:
    """Return whether something is made of tensors, plain values and plain containers alone."""
    if isinstance(returned, Mapping):
        return type(returned) is dict and all(map(_can_be_kept, returned.values()))
    if isinstance(returned, list | tuple):
        return type(returned) in (list, tuple) and all(map(_can_be_kept, returned))
    return returned is None or isinstance(returned, Tensor | int | float | str)


def _copied(returned: Any) -> Any:
    """Return the same tensors in containers of their own: who is given a list may change it."""
    if isinstance(returned, dict):
        return {key: _copied(value) for key, value in returned.items()}
    if isinstance(returned, list | tuple):
        return type(returned)(_copied(value) for value in returned)
    return returned
