"""Taps: where the features of any network are found, and a pass that stops once they are there.

A dry run shows which feature map is the bottleneck, which are the levels of the encoder and of the decoder, and which
parameters each of them depends on. No network is edited or written for a method; what is found can be named instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from labeleff.backbones.dry_run import DryRun, Output, dry_run
from labeleff.backbones.outputs import nearest_size, tensors_of
from labeleff.batch import Task
from labeleff.errors import ShapeError, did_you_mean

SMALL_PATCH, USUAL_PATCH = 32, 64
"""Sides of the image of a dry run, voxels, where none is given: four halvings leave two voxels, or five. The smaller one is an
eighth of the cost in 3-D, and enough for a network that makes no map of one voxel of it."""


@dataclass(frozen=True)
class Tap:
    """Where one feature map is found.

    Args:
        module: Name of the module that returns it.
        call: Which call of the module in a forward pass, from 0.
        item: Which of the tensors that the module returns.
        channels: Channels of the map.
        shape: Spatial size in the dry run, voxels.
        stride: Voxels of the image per voxel of the map, per axis.
        parameters: All parameters of the network that the map depends on, in the network's order.
    """

    module: str
    call: int
    item: int
    channels: int
    shape: tuple[int, ...]
    stride: tuple[float, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Taps:
    """The feature maps of a network.

    Args:
        encoder: One per resolution, finest first; the last is the bottleneck.
        decoder: One per resolution above the bottleneck's, coarsest first.
        encoder_modules: Names of the modules that are of the encoder alone, those without parameters (dropout, norms without
            scale and shift) among them: what has to be in eval mode for an encoder that keeps still.
    """

    encoder: tuple[Tap, ...]
    decoder: tuple[Tap, ...]
    encoder_modules: tuple[str, ...] = ()

    @property
    def bottleneck(self) -> Tap:
        """The deepest features."""
        return self.encoder[-1]

    @property
    def encoder_parameters(self) -> tuple[str, ...]:
        """What the bottleneck depends on. Convolutions on a skip connection that the bottleneck does not see are no part."""
        return self.bottleneck.parameters

    def decoder_parameters(self, level: int) -> tuple[str, ...]:
        """Return what a level of the decoder depends on beyond the encoder, coarser levels included."""
        mine = set(self.encoder_parameters)
        return tuple(name for name in self.decoder[level].parameters if name not in mine)


def find_taps(
    network: nn.Module,
    task: Task,
    *,
    patch: Sequence[int] | None = None,
    bottleneck: str | None = None,
    encoder: Sequence[str] | None = None,
    decoder: Sequence[str] | None = None,
) -> Taps:
    """Return where the features of a network are found, by a dry run in eval mode.

    * Bottleneck: of the maps that the output depends on, one of the smallest size above one voxel (maps of one voxel are
      gates); of these the widest, of these the last; or the block around it that returns a map of the same size (blocks
      widen inside).
    * Encoder: at each larger size the last map before the bottleneck that the bottleneck depends on.
    * Decoder: at each larger size the last map after the bottleneck that depends on it and that the output depends on. Maps
      at full resolution with one channel per class are heads, not features.

    Where a size has other maps, concatenations do not count, nor does what comes from inside a module that enlarges (the
    convolution before an upsampling). Nor do sizes that do not divide the image's, which are padding, where the bottleneck's
    does, or maps whose channels change with the size of the image, which come last in them (transformers). Each can be
    named instead.

    Args:
        network: Any backbone; left as it was.
        task: What it is given.
        patch: Size of the image of the dry run, voxels: large enough to leave the bottleneck two voxels per axis. None: 32 or 64.
        bottleneck: Name of the module that returns the bottleneck.
        encoder: Names of the modules of the finer levels of the encoder, finest first.
        decoder: Names of the modules of the levels of the decoder, coarsest first.

    Raises:
        ShapeError: There is no bottleneck, features are tokens, a named module is not there or returns no [B, C, *S], or the
            patch cannot be taken.
    """
    size, run, maps = _looked_at(network, task, patch)
    off = {
        name for name, module in network.named_modules() if isinstance(module, _DropoutNd)
    }  # they hand on, perhaps a copy
    candidates = [o for o in _distinct(maps) if o.node in run.parents and o.module not in off]
    deepest = _named(network, maps, bottleneck, "bottleneck") if bottleneck else _bottleneck(candidates, size)
    if _divides(deepest, size):
        candidates = [output for output in candidates if _divides(output, size)]
    below, above = run.ancestors(deepest.node), run.descendants(deepest.node)
    larger = [output for output in candidates if _voxels(output) > _voxels(deepest)]
    if encoder is None:
        fine = [output for output in larger if output.end < deepest.end and output.node in below]
        encoding = _last_per_size(fine)[::-1]
    else:
        encoding = [_named(network, maps, name, "encoder") for name in encoder]
    if decoder is None:
        final = {id(tensor) for tensor in run.final}
        up = [o for o in larger if o.end > deepest.end and o.node in above and id(o.tensor) not in final]
        decoding = _last_per_size([o for o in up if not _is_head(o, task, size)], _enlarging(maps, deepest))
    else:
        decoding = [_named(network, maps, name, "decoder") for name in decoder]
    if bottleneck is None:
        _refuse_tokens(run, deepest, alone=not encoding)

    def tap(output: Output) -> Tap:
        shape = tuple(output.tensor.shape[2:])
        stride = tuple(n / m for n, m in zip(size, shape, strict=True))
        behind = run.parameters_behind(output.tensor)
        return Tap(output.module, output.call, output.item, output.tensor.shape[1], shape, stride, behind)

    own = _modules_of_encoder(run, deepest, below)
    return Taps((*map(tap, encoding), tap(deepest)), tuple(map(tap, decoding)), own)


def _modules_of_encoder(run: DryRun, deepest: Output, below: set[Any]) -> tuple[str, ...]:
    """Return the modules whose parameters the bottleneck depends on, and those without any that were called on the way there."""
    mine = set(run.parameters_behind(deepest.tensor))
    beyond = {o.module for o in run.outputs if o.node not in below or o.end > deepest.end}
    before = {o.module for o in run.outputs} - beyond
    found: set[str] = set()
    for name, module in run.network.named_modules():
        behind = {f"{name}.{p}" if name else p for p, _ in module.named_parameters()}
        if behind and behind <= mine:
            found |= {f"{name}.{child}" if child else name for child, _ in module.named_modules()}
        elif not behind and name in before:
            found.add(name)
    return tuple(name for name, _ in run.network.named_modules() if name in found)


def _looked_at(
    network: nn.Module, task: Task, patch: Sequence[int] | None
) -> tuple[tuple[int, ...], DryRun, list[Output]]:
    """Return the size of the image of a dry run, the run, and its feature maps."""
    for side in (SMALL_PATCH, USUAL_PATCH):
        size = tuple(patch) if patch is not None else nearest_size(network, task, (side,) * task.ndim)
        run = dry_run(network, task, size)
        maps = [output for output in run.outputs if _is_map(output.tensor, task.ndim)]
        if any(isinstance(module, nn.LayerNorm) for module in network.modules()):
            maps = _channels_second(maps, network, task, size)
        if patch is not None or all(_voxels(output) > 1 for output in maps):
            break  # none of them can be a bottleneck that a larger image would show
    return size, run, maps


def _is_map(tensor: Tensor, ndim: int) -> bool:
    return tensor.ndim == ndim + 2 and len(tensor) == 1 and tensor.grad_fn is not None


def _channels_second(maps: list[Output], network: nn.Module, task: Task, size: Sequence[int]) -> list[Output]:
    """Return the maps without those that have their channels last, as norm layers of transformers want them.

    What is taken for channels is then a length of the image, and changes with it. Networks that cannot take another size are
    believed.
    """
    try:
        outputs = dry_run(network, task, (2 * size[0], *size[1:])).outputs
    except ShapeError:
        return maps
    channels = {(o.module, o.call, o.item): o.tensor.shape[1] for o in outputs if _is_map(o.tensor, task.ndim)}
    return [o for o in maps if channels.get((o.module, o.call, o.item)) == o.tensor.shape[1]]


def _divides(output: Output, size: Sequence[int]) -> bool:
    return all(n % m == 0 for n, m in zip(size, output.tensor.shape[2:], strict=True))


def _voxels(output: Output) -> int:
    return prod(output.tensor.shape[2:])


def _is_head(output: Output, task: Task, size: Sequence[int]) -> bool:
    return output.tensor.shape[1] == task.num_classes and _voxels(output) == prod(size)


def _distinct(outputs: list[Output]) -> list[Output]:
    """Return each tensor once, as what the outermost module returned, and only if it is not changed afterwards.

    A later module that merely hands a tensor on (dropout that is off) is not its origin; one that has changed it in place is.
    """
    found: dict[int, Output] = {}
    for output in outputs:
        before = found.get(id(output.tensor))
        if before is None or output.start < before.start or output.version != before.version:
            found[id(output.tensor)] = output
    return [output for output in found.values() if output.settled]


def _bottleneck(candidates: list[Output], size: Sequence[int]) -> Output:
    small = [output for output in candidates if 1 < _voxels(output) < prod(size)]
    if not small:
        raise ShapeError(
            f"this backbone has no bottleneck: no feature map of an image of {list(size)} is smaller than the image and "
            "larger than one voxel; name the module that returns it"
        )
    fewest = min(map(_voxels, small))
    deep = _features([output for output in small if _voxels(output) == fewest])
    widest = max(deep, key=lambda output: (output.tensor.shape[1], output.end))
    return max((o for o in deep if o is widest or _inside(widest, o)), key=lambda output: output.end)


def _features(outputs: list[Output]) -> list[Output]:
    """Return the outputs without concatenations, which are what others have found; all of them if there is nothing else."""
    return [o for o in outputs if not type(o.node).__name__.startswith("CatBackward")] or outputs


def _enlarging(maps: list[Output], deepest: Output) -> list[Output]:
    """Return what was returned by modules of the decoder alone."""
    return [output for output in maps if output.start > deepest.start and output.end > deepest.end]


def _last_per_size(outputs: list[Output], modules: Sequence[Output] = ()) -> list[Output]:
    """Return the last output at each size, coarsest first; where there is a choice, none from inside a module that enlarges."""
    by_size: dict[tuple[int, ...], list[Output]] = {}
    for output in outputs:
        by_size.setdefault(tuple(output.tensor.shape[2:]), []).append(output)
    found = []
    for same in by_size.values():
        free = [o for o in same if not any(_inside(o, m) and _voxels(m) > _voxels(o) for m in modules)]
        found.append(max(_features(free or same), key=lambda output: output.end))
    return sorted(found, key=_voxels)


def _inside(output: Output, other: Output) -> bool:
    """Return whether a module was called by another."""
    return other.start < output.start and other.end > output.end


def _named(network: nn.Module, maps: list[Output], name: str, what: str) -> Output:
    """Return what a named module returned last."""
    modules = dict(network.named_modules(remove_duplicate=False))
    if name not in modules or not name:
        raise ShapeError(f"{what}: this backbone has no module {name!r}.{did_you_mean(name, modules)}")
    first = next(other for other, module in network.named_modules() if module is modules[name])
    found = [output for output in maps if output.module == first]
    if not found:
        raise ShapeError(f"{what}: module {name!r} returns no feature map [B, C, *S] that depends on parameters")
    return found[-1]


def _refuse_tokens(run: DryRun, deepest: Output, *, alone: bool) -> None:
    """Refuse networks whose deepest features are tokens [B, N, C]: what looks like a bottleneck is where those were cut.

    A map of as many voxels as there were tokens before it is these tokens, laid out.

    Raises:
        ShapeError: Tokens come after the bottleneck, or before it where it is the only level.
    """
    after, before = run.descendants(deepest.node), run.ancestors(deepest.node)
    for output in run.outputs:
        if output.tensor.ndim != 3 or output.node not in run.parents:
            continue
        laid_out = output.node in before and output.tensor.shape[1] == _voxels(deepest)
        if output.node in after or (alone and not laid_out):
            raise ShapeError(
                f"this backbone works on tokens (module {output.module!r} returns {list(output.tensor.shape)}), so that its "
                "bottleneck cannot be told; name the module that returns a feature map [B, C, *S]"
            )


class _Reached(BaseException):
    """Every tap has been reached; the rest of the pass is not needed. No network that catches exceptions may catch it."""


@contextmanager
def capture(network: nn.Module, taps: Sequence[Tap], *, stop: bool = False) -> Iterator[dict[Tap, Tensor]]:
    """Within, each forward pass of the network leaves its features in the dictionary this yields.

    Args:
        network: The network the taps were found in (under ``DistributedDataParallel``: the module inside).
        taps: Features that are wanted.
        stop: End the pass once all are there, see :func:`encode`.
    """
    modules = dict(network.named_modules())
    found: dict[Tap, Tensor] = {}
    calls: dict[str, int] = {}
    handles = []

    def restart(*_: Any) -> None:
        found.clear()
        calls.clear()

    def keep(name: str, returned: Any) -> None:
        calls[name] = calls.get(name, -1) + 1
        for tap in taps:
            if tap.module == name and tap.call == calls[name]:
                found[tap] = tensors_of(returned)[tap.item]
        if stop and len(found) == len(set(taps)):
            raise _Reached

    missing = [tap.module for tap in taps if tap.module not in modules]
    if missing:
        raise ShapeError(f"this backbone has no module {missing[0]!r}; its taps belong to another network")
    try:
        handles.append(network.register_forward_pre_hook(restart))
        for name in {tap.module for tap in taps}:
            handles.append(modules[name].register_forward_hook(lambda _, __, returned, name=name: keep(name, returned)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def encode(network: nn.Module, image: Tensor, taps: Sequence[Tap]) -> list[Tensor]:
    """Return the features at some taps, [B, C_l, *S_l] each, of a pass that stops at the last of them.

    What comes after costs nothing: no decoder is run for features of the encoder. Modes are as they are.

    Args:
        network: The network the taps were found in, not compiled.
        image: [B, C, *S].
        taps: Where the features are found.

    Raises:
        ShapeError: A tap is not reached.
    """
    with capture(network, taps, stop=True) as found:
        with suppress(_Reached):
            network(image)
        missing = [tap.module for tap in taps if tap not in found]
        if missing:
            raise ShapeError(
                f"module {missing[0]!r} was not called as in the dry run; find the taps in this network's own mode"
            )
        return [found[tap] for tap in taps]
