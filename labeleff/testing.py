"""The contract of strategies and annotators as checks that anybody can run, plug-in authors too.

    from labeleff.testing import Subject, checks
    @pytest.mark.parametrize("check", checks(), ids=lambda c: c.__name__)
    def test_contract(check):
        check(Subject(MyStrategy))

A check raises ``AssertionError`` with one line that says what is wrong. Neither data nor Lightning is needed; each check
takes about a second with the toy network.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from labeleff import registry
from labeleff.annotators.base import Annotator
from labeleff.batch import IGNORE, Batch, Geometry, Progress, StepOutput, Task, derive_seed
from labeleff.edits import Edit, Question, Reviewed
from labeleff.errors import LabeleffError, RecipeError
from labeleff.functional.resizing import resized
from labeleff.strategies.base import Strategy

STEPS = 3
SIZE = {2: (16, 24), 3: (16, 16, 24)}


class ToyNet(nn.Module):
    """A small network with batch norm and dropout, so that modes and buffers matter.

    Args:
        task: What is segmented.
        width: Channels.
    """

    def __init__(self, task: Task, width: int = 6) -> None:
        super().__init__()
        convolution, norm, dropout = (
            (nn.Conv2d, nn.BatchNorm2d, nn.Dropout2d) if task.ndim == 2 else (nn.Conv3d, nn.BatchNorm3d, nn.Dropout3d)
        )
        self.first = convolution(task.channels, width, 3, padding=1)
        self.norm = norm(width)
        self.dropout = dropout(0.2)
        self.last = convolution(width, task.num_classes, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, K, *S] of [B, C, *S]."""
        logits: Tensor = self.last(self.dropout(torch.relu(self.norm(self.first(image)))))
        return logits


@dataclass(frozen=True)
class Subject:
    """A strategy under test.

    Args:
        factory: The strategy's class.
        options: Its options.
        task: What it is given to do.
        backbone: Makes the network.
        batch: Samples per stream.
        size: Spatial shape of the samples.
    """

    factory: Callable[..., Strategy]
    options: Mapping[str, Any] = field(default_factory=dict)
    task: Task = Task(("background", "one", "two"), 2)  # noqa: RUF009  frozen
    backbone: Callable[[Task], nn.Module] = ToyNet
    batch: int = 4
    size: tuple[int, ...] | None = None

    def make(self, **changes: Any) -> tuple[nn.Module, Strategy]:
        """Return a network and the strategy built for it, both functions of a fixed seed."""
        torch.manual_seed(0)
        backbone = self.backbone(self.task)
        strategy = self.factory(**{**self.options, **changes})
        strategy.build(backbone, self.task)
        return backbone, strategy

    def batches(self, strategy: Strategy, step: int) -> dict[str, Batch]:
        """Return a batch of every declared stream: blobs that can be told apart, some voxels unknown, some padding."""
        return {name: self._batch(name, stream.role, step) for name, stream in strategy.streams().items()}

    def _batch(self, name: str, role: str, step: int) -> Batch:
        shape = self.size or SIZE[self.task.ndim]
        generator = torch.Generator().manual_seed(derive_seed("testing", name, step))
        coarse = torch.rand(self.batch, 1, *(n // 8 for n in shape), generator=generator)
        smooth = resized(coarse, shape, align_corners=False)[:, 0]
        count = self.task.num_classes
        if self.task.exclusive:
            label = (smooth * count).long().clamp_max(count - 1)
            shade = label
        else:
            label = _overlapping(smooth, count)
            shade = label.sum(1)
        noise = torch.randn(self.batch, self.task.channels, *shape, generator=generator)
        image = shade.unsqueeze(1).float() - 1 + 0.3 * noise
        valid = torch.ones(self.batch, 1, *shape, dtype=torch.bool)
        valid[0, ..., :2] = False
        image = image * valid
        label = torch.where(valid if label.ndim > smooth.ndim else valid[:, 0], label, IGNORE)
        extras = {}
        if role == "unlabelled":
            shares = 1.0 + torch.arange(count)
            extras = {"prior": (shares / shares.sum()).expand(self.batch, -1).contiguous()}
            label = torch.full_like(label, IGNORE)
        else:
            label[0, ..., 3:5, :] = IGNORE
        return Batch(image, label, label, valid, toy_geometry(self.batch, shape), extras=extras)


def _overlapping(smooth: Tensor, count: int) -> Tensor:
    """Return regions [B, R, *S] of {0, 1}: one inside the other, the last mirrored so that it lies across them."""
    steps = torch.arange(1, count + 1).view(-1, *([1] * (smooth.ndim - 1))) / (count + 1)
    regions = (smooth.unsqueeze(1) > steps).long()
    regions[:, -1] = regions[:, -1].flip(1)
    return regions


def toy_geometry(batch: int, shape: tuple[int, ...]) -> Geometry:
    """Return a geometry of whole cases without augmentation."""
    d = len(shape)
    lengths = torch.tensor(shape).expand(batch, d)
    return Geometry(
        case=torch.arange(batch),
        origin=torch.zeros(batch, d, dtype=torch.long),
        size=lengths,
        shape=lengths,
        spacing=torch.ones(batch, d),
        affine=torch.eye(d, d + 1).expand(batch, d, d + 1),
        intensity=torch.tensor([1.0, 0, 1, 0, 0]).expand(batch, 5),
        sample=torch.arange(batch),
    )


class ShortRun:
    """The loop of the Learner over a few steps, without Lightning.

    Args:
        subject: What is run.
        changes: Options that differ from the subject's.
    """

    def __init__(self, subject: Subject, **changes: Any) -> None:
        self.subject = subject
        self.backbone, self.strategy = subject.make(**changes)
        groups = [{**g, "params": list(g["params"])} for g in self.strategy.parameter_groups(self.backbone)]
        self.optimiser = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.losses: list[float] = []

    def progress(self, step: int) -> Progress:
        """Return where the run stands."""
        return Progress(step, 10, stage=1, seed=7)

    def forward(self, step: int, batch: dict[str, Batch] | None = None) -> StepOutput:
        """Return the output of a step, with global randomness seeded as the Learner does."""
        torch.manual_seed(derive_seed("testing", "step", step))
        self.strategy.set_modes(self.backbone)
        given = batch if batch is not None else self.subject.batches(self.strategy, step)
        return self.strategy.step(self.backbone, given, self.progress(step))

    def run(self, first: int = 0, last: int = STEPS) -> ShortRun:
        """Take the steps ``first`` … ``last`` - 1 and return itself."""
        for step in range(first, last):
            losses = list(self.forward(step).losses.values())
            self.losses.append(float(sum(loss.detach() for loss in losses)))
            self.optimiser.zero_grad()
            driving = [loss for loss in losses if loss.requires_grad]
            if driving:
                torch.autograd.backward(driving)
                self.optimiser.step()
            self.strategy.after_step(self.backbone, self.progress(step))
        return self

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint would hold."""
        return {
            "backbone": self.backbone.state_dict(),
            "strategy": self.strategy.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def outcome(self) -> dict[str, Tensor]:
        """Return what a user could see differ: losses, weights of the backbone, and outputs of the predictors."""
        seen = {f"backbone.{k}": v.clone() for k, v in self.backbone.state_dict().items()}
        seen["losses"] = torch.tensor(self.losses)
        image = self.subject._batch("unseen", "labelled", 0).image
        for name, network in self.strategy.predictors(self.backbone).items():
            network.eval()
            with torch.no_grad():
                seen[f"predictor.{name}"] = network(image)
        return seen


def _same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# -- checks of strategies -----------------------------------------------------------------------------------------------


def check_finite_losses(subject: Subject) -> None:
    """Losses are finite float32 scalars, at least one."""
    output = ShortRun(subject).forward(0)
    assert output.losses or not getattr(subject.factory, "trains", True), "step returned no losses"
    for name, loss in output.losses.items():
        assert loss.ndim == 0, f"loss {name!r} has shape {tuple(loss.shape)}; a scalar is needed"
        assert bool(torch.isfinite(loss)), f"loss {name!r} is {float(loss.detach())}"
        assert loss.dtype == torch.float32, f"loss {name!r} is {loss.dtype}; losses are computed in float32"
    for name, logits in output.logits.items():
        assert not logits.requires_grad, f"logits of stream {name!r} still carry a gradient; detach them"


def check_nothing_known(subject: Subject) -> None:
    """Losses stay finite where no voxel is labelled, and where all is padding."""
    for what in ("labelled", "valid"):
        run = ShortRun(subject)
        batch = run.subject.batches(run.strategy, 0)
        empty = {}
        for name, share in batch.items():
            unknown = torch.full_like(share.label, IGNORE)
            valid = torch.zeros_like(share.valid) if what == "valid" else share.valid
            empty[name] = share._replace(label=unknown, given=unknown, valid=valid)
        output = run.forward(0, empty)
        for name, loss in output.losses.items():
            assert bool(torch.isfinite(loss)), f"loss {name!r} is {float(loss.detach())} where nothing is {what}"
        driving = [loss for loss in output.losses.values() if loss.requires_grad]
        if driving:
            torch.autograd.backward(driving)
        for name, parameter in run.backbone.named_parameters():
            finite = parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
            assert finite, f"the gradient of {name} is not finite where nothing is {what}"


def check_gradient(subject: Subject) -> None:
    """Gradient reaches the backbone, or what is trained in its place; where nothing is trained, no loss asks for one."""
    run = ShortRun(subject)
    if not run.strategy.trains:
        assert not any(loss.requires_grad for loss in run.forward(0).losses.values()), (
            "trains is False, but a loss does"
        )
        return
    torch.autograd.backward([loss for loss in run.forward(0).losses.values() if loss.requires_grad])
    trained = run.backbone if run.strategy.trains_backbone else run.strategy
    reached = any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained.parameters())
    assert reached, f"no gradient reaches the {'backbone' if trained is run.backbone else 'strategy'}"


def check_batch_left_alone(subject: Subject) -> None:
    """The batch is as it was after a step."""
    run = ShortRun(subject)
    batch = run.subject.batches(run.strategy, 0)
    before = {name: [t.clone() for t in share[:4]] for name, share in batch.items()}
    run.forward(0, batch)
    for name, share in batch.items():
        for part, old, new in zip(("image", "label", "given", "valid"), before[name], share[:4], strict=True):
            assert torch.equal(old, new), f"{name} {part} was changed in place"


def check_own_storage(subject: Subject) -> None:
    """Tensors of the strategy are not those of the backbone, and ask for no gradient unless they are optimised."""
    backbone, strategy = subject.make()
    theirs = {
        t.untyped_storage().data_ptr(): name for name, t in [*backbone.named_parameters(), *backbone.named_buffers()]
    }
    for name, tensor in [*strategy.named_parameters(), *strategy.named_buffers()]:
        shared = theirs.get(tensor.untyped_storage().data_ptr())
        assert shared is None, f"strategy.{name} is backbone.{shared}, not a copy"
    optimised = {id(p) for group in strategy.parameter_groups(backbone) for p in group["params"]}
    for name, parameter in strategy.named_parameters():
        asks = parameter.requires_grad and id(parameter) not in optimised
        assert not asks, f"strategy.{name} asks for a gradient but is not optimised"


def check_submodules_matter(subject: Subject) -> None:
    """Shaking any submodule of the strategy changes something outside it."""
    plain = ShortRun(subject).run().outcome()
    children = [name for name, module in subject.make()[1].named_children() if any(True for _ in module.parameters())]
    for child in children:
        shaken = ShortRun(subject)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in shaken.strategy.get_submodule(child).parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        after = shaken.run().outcome()
        # the predictor that the submodule is may well change: only what it does to the rest counts
        rest = {k for k in plain if k == "losses" or k.startswith("backbone.")}
        changed = any(not torch.equal(plain[k], after[k]) for k in rest)
        assert changed, f"nothing depends on strategy.{child}"


def check_options_matter(subject: Subject) -> None:
    """Changing any option changes a short run, unless the strategy says why it need not."""
    plain = ShortRun(subject).run().outcome()
    excused = getattr(subject.factory, "equivalent_options", {})
    for name, option in registry.options(subject.factory).items():
        if name in excused:
            continue
        value = subject.options.get(name, option.default)
        alternatives = list(alternative_values(option.type, value))
        assert alternatives, (
            f"option {name!r} of type {option.type} has no alternative to try; add it to equivalent_options"
        )
        matters = refused = tried = False
        for other in alternatives:
            if matters and not isinstance(other, str):
                continue  # every choice is a path of its own and is taken; of numbers one is enough
            try:
                matters |= not _same(plain, ShortRun(subject, **{name: other}).run().outcome())
            except ValueError:
                continue  # out of range
            except RecipeError:
                refused = True  # not for this task, and said so
                continue
            tried = True
        assert matters or (refused and not tried), f"option {name!r} changes nothing"


def alternative_values(kind: Any, value: Any) -> Iterable[Any]:
    """Yield other legal-looking values of an option's type."""
    if isinstance(value, bool):
        yield not value
    elif get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            yield from alternative_values(part, value)
    elif get_origin(kind) is Literal:
        yield from (choice for choice in get_args(kind) if choice != value)
    elif isinstance(value, tuple) and value and all(isinstance(part, int | float) for part in value):
        yield from (tuple(2 * part for part in value), value[:-1])
    elif isinstance(value, float):
        yield from (value * 0.5 if value else 0.5, value + 0.25)
    elif isinstance(value, int):
        yield from (value + 1, value + 2)


def check_resume(subject: Subject) -> None:
    """A run that is saved, torn down and loaded again ends bit for bit like an unbroken one."""
    whole = ShortRun(subject).run(0, STEPS + 1).outcome()
    buffer = io.BytesIO()
    torch.save(ShortRun(subject).run(0, 2).state(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    resumed = ShortRun(subject)
    resumed.backbone.load_state_dict(state["backbone"])
    resumed.strategy.load_state_dict(state["strategy"])
    resumed.optimiser.load_state_dict(state["optimiser"])
    after = resumed.run(2, STEPS + 1).outcome()
    whole["losses"] = whole["losses"][2:]
    assert _same(whole, after), "a resumed run differs: some state is not in state_dict"


def check_same_seed(subject: Subject) -> None:
    """Two runs with one seed are one run, whatever numpy's and Python's global generators do."""
    outcomes = []
    for number in (1, 2):
        np.random.seed(number)
        random.seed(number)
        outcomes.append(ShortRun(subject).run().outcome())
    assert _same(*outcomes), "two runs with the same seed differ"


def check_streams(subject: Subject) -> None:
    """A step needs nothing but the declared streams, and can do without the optional ones."""
    run = ShortRun(subject)
    declared = run.subject.batches(run.strategy, 0)
    optional = {name for name, stream in run.strategy.streams().items() if stream.optional}
    for batch in (declared, {name: share for name, share in declared.items() if name not in optional}):
        try:
            output = ShortRun(subject).forward(0, dict(batch))
        except KeyError as error:
            raise AssertionError(f"step wants stream {error}, which is not declared or is optional") from error
        for name, loss in output.losses.items():
            assert bool(torch.isfinite(loss)), (
                f"loss {name!r} is {float(loss.detach())} with the streams {sorted(batch)}"
            )


def check_frozen(subject: Subject) -> None:
    """Backbone parameters outside the groups, and statistics of frozen norms, do not move by a bit."""
    run = ShortRun(subject)
    optimised = {id(p) for group in run.optimiser.param_groups for p in group["params"]}
    run.strategy.set_modes(run.backbone)
    still = {n: p for n, p in run.backbone.named_parameters() if id(p) not in optimised}
    for path, module in run.backbone.named_modules():
        if not module.training:
            still |= {f"{path}.{n}": b for n, b in module.named_buffers(recurse=False)}
    before = {name: tensor.detach().clone() for name, tensor in still.items()}
    run.run()
    for name, tensor in still.items():
        assert torch.equal(before[name], tensor), f"backbone.{name} moved although it is frozen"


def check_predictors(subject: Subject) -> None:
    """Every predictor returns finite logits [B, K, *S], the same twice in eval mode."""
    run = ShortRun(subject).run()
    predictors = run.strategy.predictors(run.backbone)
    assert predictors, "there is no predictor"
    image = run.subject._batch("unseen", "labelled", 0).image
    for name, network in predictors.items():
        network.eval()
        with torch.no_grad():
            one, two = network(image), network(image)
        wanted = (len(image), subject.task.num_classes, *image.shape[2:])
        assert tuple(one.shape) == wanted, f"predictor {name!r} returns {tuple(one.shape)}; logits {wanted} are needed"
        assert torch.equal(one, two), f"predictor {name!r} differs from itself in eval mode"
        assert bool(torch.isfinite(one).all()), f"predictor {name!r} is not finite"


def check_ignore(subject: Subject) -> None:
    """Labels of a stream that is said to be unlabelled are never looked at, unless it says that some may be given later."""
    run = ShortRun(subject)
    batch = run.subject.batches(run.strategy, 0)
    plain = run.forward(0, batch).losses
    for name, stream in run.strategy.streams().items():
        share = batch[name]
        if stream.role == "unlabelled" and not stream.partial:
            told = batch | {
                name: share._replace(label=torch.zeros_like(share.label), given=torch.zeros_like(share.label))
            }
            other = ShortRun(subject).forward(0, told).losses
            for key in plain:
                assert torch.equal(plain[key], other[key]), f"loss {key!r} depends on labels of the unlabelled stream"
    _check_unknown_region(subject, batch, plain)


def _check_unknown_region(subject: Subject, batch: dict[str, Batch], plain: Mapping[str, Tensor]) -> None:
    """Taking a label away is not the same as calling it background, and leaves every gradient finite."""
    streams = subject.make()[1].streams()
    labelled = [n for n, stream in streams.items() if stream.role != "unlabelled" or stream.partial]
    outcomes = []
    for value in (IGNORE, 0):
        told = dict(batch)
        for name in labelled:
            label = batch[name].label.clone()
            if value != IGNORE or streams[name].role != "unlabelled":
                label[1:, ..., 6:, :] = value
            told[name] = batch[name]._replace(label=label, given=label)
        run = ShortRun(subject)
        outcomes.append(run.forward(0, told).losses)
        torch.autograd.backward([loss for loss in outcomes[-1].values() if loss.requires_grad])
        finite = all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in run.backbone.parameters())
        assert finite, "a gradient is not finite where labels are partly unknown"
        unread = run.strategy.reads_labels or all(torch.equal(plain[key], outcomes[-1][key]) for key in plain)
        assert unread, "reads_labels is False, but labels matter"
    if any(not torch.equal(plain[key], outcomes[1][key]) for key in plain):
        differs = any(not torch.equal(outcomes[0][key], outcomes[1][key]) for key in plain)
        assert differs, "IGNORE is taken for background"


class Voxelwise(nn.Module):
    """A network whose logits of a voxel depend on that voxel alone.

    Args:
        task: What is segmented.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        convolution = nn.Conv2d if task.ndim == 2 else nn.Conv3d
        self.first, self.last = convolution(task.channels, 6, 1), convolution(6, task.num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, K, *S] of [B, C, *S]."""
        logits: Tensor = self.last(torch.tanh(self.first(image)))
        return logits


def check_unknown_voxels(subject: Subject) -> None:
    """What a labelled image shows where its label is unknown moves neither a loss nor a gradient, whichever forms are chosen.

    Asked with a network that sees a voxel at a time, some voxels away from what is known (images may be resized). A strategy that
    learns from those voxels on purpose sets ``uses_unknown``; one that has no labelled stream is not asked.
    """
    known = registry.options(subject.factory)
    values = {name: subject.options.get(name, option.default) for name, option in known.items()}
    forms = [
        {name: other}
        for name, option in known.items()
        for other in alternative_values(option.type, values[name])
        if isinstance(other, str)
    ]
    for changes in ({}, *forms):
        try:
            found = [_learnt(replace(subject, backbone=Voxelwise), shown, changes) for shown in (1.0, -3.0)]
        except (ValueError, LabeleffError):
            continue  # not with these options, or not on this network
        for name, value in found[0].items():
            same = torch.allclose(value, found[1][name], rtol=1e-5, atol=1e-7)
            said = f" ({changes})" if changes else ""
            assert same, f"{name} depends on voxels of which nobody has said anything{said}"


def _learnt(subject: Subject, factor: float, changes: Mapping[str, str]) -> dict[str, Tensor]:
    """Return losses and gradients of a step whose labels are unknown in one part, where images are multiplied by a factor.

    Nothing where no stream is labelled, or the strategy learns from that part on purpose.
    """
    strategy = subject.factory(**{**subject.options, **changes})
    labelled = [name for name, stream in strategy.streams().items() if stream.role == "labelled"]
    if strategy.uses_unknown or not labelled:
        return {}
    run = ShortRun(subject, **changes)
    batch = subject.batches(run.strategy, 0)
    for name in labelled:
        image, label = batch[name].image.clone(), batch[name].label.clone()
        label[..., :10], image[..., :5] = IGNORE, image[..., :5] * factor
        batch[name] = batch[name]._replace(image=image, label=label, given=label)
    losses = run.forward(0, batch).losses
    torch.autograd.backward([loss for loss in losses.values() if loss.requires_grad])
    trained = (("backbone", run.backbone), ("strategy", run.strategy))
    gradients = {
        f"the gradient of {whose}.{name}": parameter.grad
        for whose, module in trained
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return {**{f"loss {name!r}": loss.detach() for name, loss in losses.items()}, **gradients}


def check_soft_labels(subject: Subject) -> None:
    """Shares of one-hot labels are those labels; other shares matter where the strategy says that it learns from them."""
    run = ShortRun(subject)
    batch, claims = run.subject.batches(run.strategy, 0), run.strategy.soft_labels
    streams = run.strategy.streams().items()
    labelled = {name: batch[name] for name, stream in streams if stream.role != "unlabelled" and name in batch}
    if not subject.task.exclusive or not labelled:
        assert not claims, "soft_labels is True, but no stream of exclusive classes is labelled"
        return
    plain = run.forward(0, batch).losses

    def told(keep: float) -> Mapping[str, Tensor]:
        shares = {name: _shares_of(share.label, subject.task.num_classes, keep) for name, share in labelled.items()}
        softened = {name: share._replace(soft=shares[name]) for name, share in labelled.items()}
        return ShortRun(subject).forward(0, batch | softened).losses

    sure, unsure = told(1.0), told(0.6)
    if claims:
        for key, loss in plain.items():
            near = torch.allclose(loss, sure[key], rtol=1e-4, atol=1e-6)
            assert near, f"loss {key!r} differs between labels and the same labels as shares of 1"
    changes = any(not torch.equal(plain[key], unsure[key]) for key in plain)
    assert changes == claims, (
        "soft_labels is True, but soft labels change nothing"
        if claims
        else "soft labels matter, but soft_labels is False"
    )


def _shares_of(label: Tensor, classes: int, keep: float) -> Tensor:
    """Return [B, K, *S]: a share of each voxel for its label, the rest for the next class; 0 where nobody has said."""
    known = (label != IGNORE).unsqueeze(1)
    own = torch.where(label != IGNORE, label, 0)
    first, second = (torch.nn.functional.one_hot(c, classes).movedim(-1, 1) for c in (own, (own + 1) % classes))
    return (keep * first + (1 - keep) * second) * known


def check_mixed_precision(subject: Subject) -> None:
    """Losses are float32 and finite under bfloat16 autocast."""
    run = ShortRun(subject)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run.forward(0)
    for name, loss in output.losses.items():
        assert loss.dtype == torch.float32, f"loss {name!r} is {loss.dtype} under autocast; compute it in float32"
        assert math.isfinite(float(loss.detach())), f"loss {name!r} is {float(loss.detach())} under autocast"


def checks() -> list[Callable[[Subject], None]]:
    """Return every check of a strategy."""
    return [
        check_finite_losses, check_nothing_known, check_gradient, check_batch_left_alone, check_own_storage,
        check_submodules_matter, check_options_matter, check_resume, check_same_seed, check_streams, check_frozen,
        check_predictors, check_ignore, check_unknown_voxels, check_soft_labels, check_mixed_precision,
    ]  # fmt: skip


def check_strategy(factory: Callable[..., Strategy], **subject: Any) -> None:
    """Run every check on a strategy; keyword arguments are those of :class:`Subject`."""
    for check in checks():
        check(Subject(factory, **subject))


# -- checks of annotators -----------------------------------------------------------------------------------------------


def check_annotator(annotator: Annotator, *, classes: int = 3, shape: tuple[int, ...] = (12, 16)) -> None:
    """Edits are legal and deterministic, the cases are left alone, and voxels that somebody gave are not written to."""
    cases = _reviewed(classes, shape, annotator)
    before = [(c.probs.clone(), c.label.copy(), c.given.copy()) for c in cases]
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(list(annotator.revise(iter(cases), Progress(5, 10, seed=1))))
    for case, (probs, label, given) in zip(cases, before, strict=True):
        same = (
            torch.equal(case.probs, probs) and np.array_equal(case.label, label) and np.array_equal(case.given, given)
        )
        assert same, f"case {case.case!r} was changed in place"
    known = {case.case: case for case in cases}
    for one, two in zip(*runs, strict=True):
        assert _same_answer(one, two), f"two revisions of case {one.case!r} with one seed differ"
        assert one.case in known, f"an answer is about case {one.case!r}, which was not shown"
        if isinstance(one, Edit):
            _check_edit(one, known[one.case], classes)
    _check_asked_once(annotator, cases, [one for one in runs[0] if isinstance(one, Question)])


def _check_asked_once(annotator: Annotator, cases: list[Reviewed], first: list[Question]) -> None:
    """Boxes reach into their cases, and those of the next round keep clear of what was asked before."""
    shapes = {case.case: case.label.shape for case in cases}
    for one in first:
        reach = zip(one.origin, one.size, shapes[one.case], strict=True)
        assert all(o < n and o + s > 0 < s for o, s, n in reach), f"a question lies outside case {one.case!r}: {one}"
    asked = {name: tuple((q.origin, q.size) for q in first if q.case == name) for name in shapes}
    later = [case._replace(asked=asked[case.case]) for case in cases]
    for new in annotator.revise(iter(later), Progress(6, 10, seed=1, round=1)) if first else ():
        assert isinstance(new, Question), "an annotator that asked in one round makes changes itself in the next"
        for origin, size in asked[new.case]:
            meets = zip(new.origin, new.size, origin, size, strict=True)
            assert not all(a < b + t and b < a + s for a, s, b, t in meets), f"asked twice about the same voxels: {new}"


def _reviewed(classes: int, shape: tuple[int, ...], annotator: Annotator) -> list[Reviewed]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for number in range(3):
        probs = torch.randn(annotator.samples, classes, *shape, generator=generator).softmax(1)
        truth = probs.mean(0).argmax(0).numpy().astype(np.uint8) if annotator.oracle else None
        given = np.full(shape, IGNORE, np.uint8)
        given[: number * 2] = 1
        cases.append(Reviewed(f"case{number}", probs, given.copy(), given, (1.0,) * len(shape), truth=truth))
    return cases


def _same_answer(one: Edit | Question, two: Edit | Question) -> bool:
    if isinstance(one, Question):
        return one == two
    pairs = [(a, b) for a, b in zip(one, two, strict=True) if isinstance(a, np.ndarray)]
    arrays = [np.array_equal(a, np.asarray(b)) for a, b in pairs]
    return type(one) is type(two) and one.case == two.case and all(arrays)


def _check_edit(edit: Edit, case: Reviewed, classes: int) -> None:
    assert edit.label.dtype == np.uint8, f"an edit of case {edit.case!r} is {edit.label.dtype}; uint8 is needed"
    values = set(np.unique(edit.label).tolist())
    assert values <= {*range(classes), IGNORE}, f"an edit of case {edit.case!r} writes the values {sorted(values)}"
    origin = edit.origin or (0,) * case.label.ndim
    window = tuple(slice(o, o + n) for o, n in zip(origin, edit.label.shape, strict=True))
    mask = edit.mask if edit.mask is not None else np.ones(edit.label.shape, bool)
    given = case.given[window]
    if edit.author == "pseudo":
        overwritten = mask & (given != IGNORE) & (edit.label != given)
        assert not overwritten.any(), f"a pseudo-label of case {edit.case!r} overwrites voxels that somebody gave"
