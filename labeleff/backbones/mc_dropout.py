"""Monte Carlo dropout: several predictions of one network with dropout left on, at the price of what differs between them.

Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016, arXiv:1506.02142. Only dropout is in train mode; norm
layers keep to their running statistics, so that what varies between predictions is dropout alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from labeleff.backbones.dry_run import dry_run
from labeleff.backbones.outputs import logits_of, nearest_size
from labeleff.backbones.replay import Replay
from labeleff.batch import Task
from labeleff.errors import ShapeError, did_you_mean
from labeleff.functional.losses import probabilities

INSERTED = "dropout_before"
"""Name under which :func:`with_dropout` puts its module into the convolution."""
USUAL_PATCH = 32
REMEDY = "set the backbone's dropout, or insert one with with_dropout"


def dropouts(network: nn.Module) -> list[nn.Module]:
    """Return the modules that drop anything out while they train."""
    return [module for module in network.modules() if isinstance(module, _DropoutNd) and module.p > 0]


def has_dropout(network: nn.Module) -> bool:
    """Return whether a network drops anything out while it trains."""
    return bool(dropouts(network))


@contextmanager
def prediction_modes(network: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """Put a network into eval mode, and every module back into its own mode afterwards.

    Args:
        network: Any network.
        dropout: Leave dropout on (Monte Carlo dropout); norm layers stay in eval mode.
    """
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        if dropout:
            set_dropout(network, on=True)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def set_dropout(network: nn.Module, *, on: bool) -> None:
    """Set the mode of the dropout modules, and of nothing else."""
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.train(on)


def with_dropout(
    network: nn.Module,
    task: Task,
    *,
    p: float = 0.5,
    kind: Literal["channel", "voxel"] = "channel",
    head: str | None = None,
) -> nn.Module:
    """Return the network itself, with a dropout before the convolution that makes the logits.

    The names of its weights stay as they are, and so do its predictions in eval mode. Copies made by ``copy.deepcopy`` drop
    out by themselves. A second call changes the probability.

    Args:
        network: Any backbone.
        task: What it is given.
        p: Probability of dropout, in (0, 1).
        kind: Drop whole ``channel`` maps, as usual before a convolution, or every ``voxel`` of a map by itself.
        head: Name of the convolution; None: the last one in a forward pass with one output channel per class and more input
            channels than that, found by a dry run (one of as many, such as the last of V-Net, only reworks logits).

    Raises:
        ShapeError: p is out of range, or there is no such convolution.
    """
    if not 0 < p < 1:
        raise ShapeError(f"p is {p}; it must lie in (0, 1)")
    target = _named_head(network, head) if head is not None else _head(network, task)
    kinds: dict[int, type[_DropoutNd]] = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
    made = (kinds[task.ndim] if kind == "channel" else nn.Dropout)(p)
    made.train(target.training)
    if not hasattr(target, INSERTED):
        target.register_forward_pre_hook(_drop_input)
    setattr(target, INSERTED, made)
    return network


def _drop_input(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a convolution is given, after dropout. A function of the module, so that a copy uses its own."""
    return (getattr(module, INSERTED)(given[0]), *given[1:])


def _named_head(network: nn.Module, name: str) -> nn.Module:
    modules = dict(network.named_modules())
    found = modules.get(name)
    if not isinstance(found, _ConvNd):
        convolutions = [other for other, module in modules.items() if isinstance(module, _ConvNd)]
        raise ShapeError(f"head: this backbone has no convolution {name!r}.{did_you_mean(name, convolutions)}")
    return found


def _head(network: nn.Module, task: Task) -> nn.Module:
    """Return the convolution that first makes as many channels as there are classes, on the way to the output."""
    run = dry_run(network, task, nearest_size(network, task, (USUAL_PATCH,) * task.ndim))
    modules = dict(network.named_modules())
    found: list[_ConvNd] = []
    for output in run.outputs:
        module = modules[output.module]
        if isinstance(module, _ConvNd) and module.out_channels == task.num_classes and output.node in run.parents:
            found.append(module)
    if not found:
        raise ShapeError(
            "no convolution of this backbone makes one channel per class; name the one before which to drop: head"
        )
    return next((module for module in reversed(found) if module.in_channels > task.num_classes), found[-1])


def sample(network: nn.Module, image: Tensor, samples: int, *, exclusive: bool = True, share: bool = True) -> Tensor:
    """Return predictions with dropout on: [T, B, K, *S] probabilities, float32, without gradients.

    They are those of T plain passes one after the other, to the bit and with the same draws of torch's global generator. But
    what the passes have in common, all modules up to the first dropout, is computed once. How much that is depends on the
    backbone: all but the head for a dropout before it, nothing for one in the first block.

    Args:
        network: Any backbone with dropout; its modes are put back.
        image: [B, C, *S].
        samples: Number of passes, T >= 1.
        exclusive: Softmax over classes; otherwise sigmoid for each region.
        share: Compute once what is common; False: T plain passes.

    Raises:
        ShapeError: There is no dropout, or none in the way of an image; T < 1.
    """
    return _predictions(network, image, samples, exclusive=exclusive, share=share, plain=False)[1]


def predict_and_sample(
    network: nn.Module, image: Tensor, samples: int, *, exclusive: bool = True, share: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the prediction without dropout [B, K, *S] and those with it, as :func:`sample` does, [T, B, K, *S].

    The plain prediction shares what the others share, so that it costs what one more of them does.
    """
    whole, sampled = _predictions(network, image, samples, exclusive=exclusive, share=share, plain=True)
    return whole[0], sampled


def _predictions(
    network: nn.Module, image: Tensor, samples: int, *, exclusive: bool, share: bool, plain: bool
) -> tuple[Tensor, Tensor]:
    """Return predictions without dropout [0 or 1, B, K, *S] and with it [T, B, K, *S]."""
    active = dropouts(network)
    if samples < 1:
        raise ShapeError(f"samples is {samples}; it must be at least 1")
    if not active:
        raise ShapeError(f"this backbone has no dropout, so that its predictions do not vary: {REMEDY}")
    reached: list[bool] = []
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))  # what is returned may be part of a loss
        stack.enter_context(torch.no_grad())
        stack.enter_context(prediction_modes(network))
        image = image.clone() if image.is_inference() else image
        for module in active:
            handle = module.register_forward_pre_hook(lambda *_: reached.append(True))
            stack.callback(handle.remove)
        one_pass: Callable[[Tensor], Any] = network
        if share:
            one_pass = stack.enter_context(Replay(network, active))
        found = []
        for number in range(samples + plain):
            set_dropout(network, on=number >= plain)
            found.append(probabilities(logits_of(one_pass(image)), exclusive=exclusive))
            if not reached:
                raise ShapeError(
                    f"no image passes the dropout of this backbone, so that predictions do not vary: {REMEDY}"
                )
        together = torch.stack(found)
        return together[: int(plain)], together[int(plain) :]
