"""Weights from files into networks, with a report of what became of each and a refusal where too little fits.

Files are safetensors, or torch files of nothing but tensors in plain containers: no file can run code.
"""

from __future__ import annotations

import pickle  # for the name of an error only; nothing is unpickled
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from labeleff.backbones.asymmetric import counted, fitted, inflated, stride_of_transposed
from labeleff.backbones.released import recognised, translated
from labeleff.errors import RunError, one_line

TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
STATES = ("state_dict", "model_state_dict", "network_weights", "model", "network", "net", "weights")
"""Where the state of a network lies in files that hold more, as others write them."""


@dataclass(frozen=True)
class WeightsReport:
    """What became of the weights of a file.

    Args:
        matched: Entries of the network that are those of the file.
        adapted: Entries that were made from those of the file, and how.
        left: Entries of the network that stay as they were, drawn at random, and why.
        unused: Entries of the file that fit nowhere.
        share: Share of the numbers in the network that the file fills, in [0, 1].
        used: Share of the numbers in the file that were used, in [0, 1].
    """

    matched: tuple[str, ...]
    adapted: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    share: float
    used: float

    @property
    def summary(self) -> str:
        """All of it in one line."""
        filled = (
            f"{self.share:.0%} of the network filled by {self.used:.0%} of the file: {len(self.matched)} entries match"
        )
        return (
            filled
            + counted("; adapted", self.adapted)
            + counted("; left at random", self.left)
            + (f"; {len(self.unused)} unused, such as {self.unused[0]!r}" if self.unused else "")
        )


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of a network for a file: on the CPU, every entry with storage of its own.

    Some networks have modules under two names (MONAI's DynUNet), which safetensors would refuse.
    """
    return {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state of a network that a file holds, on the CPU.

    Args:
        path: ``.safetensors``, or a torch file (``.pt``, ``.pth``, ``.ckpt``, ``.bin``, ``.tar``) whose state may lie under
            ``state_dict``, ``network_weights`` or the like.

    Raises:
        RunError: It is not there, is damaged, is of another kind, holds more than plain values, or numbers that are not finite.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif path.suffix in TORCH_FILES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of protocols that it then refuses
                state = _state_in(torch.load(path, map_location="cpu", weights_only=True), path)
        else:
            raise RunError(f"{path}: weights are .safetensors or torch files ({', '.join(TORCH_FILES)})")
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path}: holds more than tensors and plain values, which could run code, or is damaged; where you trust it, save "
            "its state as safetensors"
        ) from error
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, zipfile.BadZipFile, SafetensorError) as error:
        raise RunError(f"{path}: these weights cannot be read ({one_line(error) or type(error).__name__})") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(f"{path}: {name} holds NaN or infinite values; this network diverged or the file is damaged")
    return state


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the mapping of names to tensors in what a torch file holds."""
    if isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
        for key in STATES:
            if isinstance(content.get(key), Mapping):
                return _state_in(content[key], path)
    keys = ", ".join(map(str, content))[:200] if isinstance(content, Mapping) else type(content).__name__
    raise RunError(f"{path}: holds no weights by name; found {keys or 'nothing'}, not one of {', '.join(STATES)}")


def load_weights(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    channels: int,
    axis: int = -1,
    minimum: float = 1.0,
    what: str = "",
) -> WeightsReport:
    """Put weights into a network, in place, and return what became of each.

    Names may carry prefixes (``module.`` of data-parallel training, ``backbone.`` of a learner): those under which most
    numbers find a place are taken off; those of published files are translated (:mod:`labeleff.backbones.released`). What
    has another shape is adapted where that is known to mean the same: convolutions
    that see the image and have other input channels get the mean over those of the file, and 2-D kernels in a 3-D network
    are inflated (:func:`labeleff.backbones.asymmetric.inflate_2d`).

    Args:
        network: Nothing is written to it if the weights are refused.
        state: Weights by name.
        channels: Input channels of the network.
        axis: Axis that 2-D weights do not have.
        minimum: Smallest share of the network's numbers that must be filled.
        what: Where the weights come from, for messages.

    Raises:
        RunError: Less than that is.
    """
    own = network.state_dict()
    known = translated(state, own)
    named, names = _aligned({known[theirs]: tensor for theirs, tensor in state.items()}, own)
    twins = _twins(network)

    def fit(name: str, target: Tensor) -> tuple[Tensor | None, str]:
        source = next((named[twin] for twin in twins[name] if twin in named), None)
        if source is None:
            return None, "not in the file"
        owner = network.get_submodule(name.rpartition(".")[0])
        first = isinstance(owner, _ConvNd) and not owner.transposed and target.ndim > 2 and target.shape[1] == channels
        return _in_shape(source, target, network, name, axis=axis, first=first)

    taken, matched, adapted, left = fitted(own, fit)
    unused = tuple(theirs for theirs in state if names.get(known[theirs]) not in taken)
    filled, total = sum(own[name].numel() for name in taken), sum(tensor.numel() for tensor in own.values())
    held = sum(tensor.numel() for tensor in state.values())
    spent = held - sum(state[theirs].numel() for theirs in unused)
    report = WeightsReport(matched, adapted, left, unused, filled / max(total, 1), spent / max(held, 1))
    if filled < minimum * total:
        name, reason = left[0]
        raise RunError(
            f"{what or 'these weights'}: only {report.share:.1%} of the network's numbers are filled, and at least "
            f"{minimum:.0%} must be: {name} is left ({reason}); "
            f"{recognised(state) or 'is it the same network with the same widths?'}"
        )
    with torch.no_grad():
        for name, tensor in taken.items():
            own[name].copy_(tensor)
    return report


def _twins(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, by name, all names that an entry of a network has: some hold a module in two places (MONAI's DynUNet)."""
    groups: dict[int, list[str]] = {}
    for name, value in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def _aligned(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the file's weights by names of the network, and these names by those of the file.

    Every pair of a prefix of the file and one of the network (none, or the first part where all names have it) is tried.
    """
    heads = {name.partition(".")[0] + "." for name in own}
    fronts = ["", *heads] if len(heads) == 1 and all("." in name for name in own) else [""]
    found: Counter[tuple[str, str]] = Counter({("", ""): 0})
    for front in fronts:
        inner = {name.removeprefix(front) for name in own}
        for name, tensor in state.items():
            for prefix, rest in _splits(name):
                if rest in inner:
                    found[prefix, front] += tensor.numel()
    (prefix, front), _ = found.most_common(1)[0]
    names = {name: front + name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    return {ours: state[theirs] for theirs, ours in names.items() if ours in own}, names


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield a name cut at its beginning and after every dot."""
    parts = name.split(".")
    for number in range(len(parts)):
        prefix = "".join(part + "." for part in parts[:number])
        yield prefix, name.removeprefix(prefix)


def _in_shape(
    source: Tensor, target: Tensor, network: nn.Module, name: str, *, axis: int, first: bool
) -> tuple[Tensor | None, str]:
    """Return a tensor of the file in the shape of the network's and how it was adapted, or None and why it does not fit."""
    if source.shape == target.shape:
        return source, ""
    if target.ndim == 5 and source.ndim == 4:
        return inflated(source, target, axis % 3, stride=stride_of_transposed(network, name, axis % 3), first=first)
    same = source.ndim == target.ndim and (source.shape[0], *source.shape[2:]) == (target.shape[0], *target.shape[2:])
    if first and same:
        count = target.shape[1]
        how = f"{source.shape[1]} input channels averaged to {count}"
        return source.sum(1, keepdim=True).div(count).expand_as(target), how
    return None, f"{list(source.shape)} does not fit {list(target.shape)}"
