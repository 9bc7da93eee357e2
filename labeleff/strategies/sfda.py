"""Source-free domain adaptation: certain predictions whose class shares are those expected (Bateson et al., AdaMI)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from labeleff.batch import IGNORE, Batch, Progress, StepOutput, Stream, Task
from labeleff.errors import RecipeError
from labeleff.functional.collapse import LOOK_EVERY, follow_, is_gone
from labeleff.functional.losses import segmentation_loss
from labeleff.functional.norms import OnBatchStatistics, batch_statistics, freeze_statistics, norm_affine
from labeleff.functional.sfda import EPS, Direction, Ratio, class_ratio_kl, entropy_and_ratio
from labeleff.registry import register
from labeleff.strategies.base import Strategy

SMALLEST_PRIOR, SMALLEST_ENTROPY = 1e-3, 1e-4


@register("strategy", "sfda")
class Sfda(Strategy):
    """L = entropy · H(p) + kl · KL(r ‖ τ), on images of the target alone: arXiv:2108.03152, equations 2 to 5.

    r is the share of every class in the predictions of an image, τ the share that is expected: ``data.prior``. Entropy on
    its own is least for a map of background, which is what the second term keeps from happening.

    In 2-D the images are whole. In 3-D they are patches, of which a share is not known: there r is the running mean over
    the patches of the case, which the newest joins with weight 1/n, n the visits so far, and at least ``memory``. The
    gradient is that of the newest patch as if it were the whole: over patches drawn evenly it is, in the mean, that of
    the case's share, where the running mean has settled.

    Voxels that somebody has labelled learn from their labels and leave the entropy; the shares are of all.

    The authors' code: ``ratio=max_normalised``, ``direction=pred_prior``, ``eps=1e-10``, all parameters, ``norm_stats=update``;
    these are the defaults. The papers' formula has ``ratio=mean_softmax``. ``trainable=norm_affine, norm_stats=batch, kl=0`` is
    TENT (Wang et al., ICLR 2021, arXiv:2006.10726).

    Args:
        entropy: Weight of the entropy.
        kl: Weight of the divergence of shares; above 0 it needs ``data.prior``.
        ratio: What r is made of: ``max_normalised`` or ``mean_softmax``, see ``class_ratio``.
        direction: ``pred_prior`` (AdaMI), ``prior_pred`` or ``cross_entropy``, see ``class_ratio_kl``.
        eps: Added within the logarithms of shares: what a class costs that is expected nowhere.
        class_weights: ν of the entropy: ``none``, ``inverse_prior`` (1/τ, summing to 1), or one number per class.
        labelled: Weight of (cross-entropy + Dice) / 2 on voxels that somebody has labelled.
        trainable: ``all`` parameters, or ``norm_affine``: scale and shift of norm layers.
        norm_stats: ``update`` running statistics by the target's; ``freeze`` them; or ``batch``: those of the batch in
            training and in evaluation, the running ones being left alone. Only batch norm has any.
        memory: Least weight of the newest patch in the running share of a 3-D case.
    """

    equivalent_options: ClassVar[Mapping[str, str]] = {
        "norm_stats": "a network without batch norm has no statistics",
        "memory": "for patches of volumes only",
        "labelled": "nothing is labelled at first",
        "kl": "without a prior there is nothing to diverge from",
        "ratio": "as kl",
        "direction": "as kl",
        "eps": "as kl",
    }

    def __init__(
        self,
        *,
        entropy: float = 1.0,
        kl: float = 1.0,
        ratio: Ratio = "max_normalised",
        direction: Direction = "pred_prior",
        eps: float = EPS,
        class_weights: Literal["none", "inverse_prior"] | tuple[float, ...] = "none",
        labelled: float = 1.0,
        trainable: Literal["all", "norm_affine"] = "all",
        norm_stats: Literal["update", "freeze", "batch"] = "update",
        memory: float = 0.05,
    ) -> None:
        super().__init__()
        if min(entropy, kl, labelled) < 0 or eps <= 0 or not 0 < memory <= 1:
            raise ValueError("weights are at least 0, eps is above 0, memory in (0, 1]")
        if not isinstance(class_weights, str) and (not class_weights or min(class_weights) < 0):
            raise ValueError("class_weights are one number of at least 0 for each class, background first")
        self.entropy, self.kl, self.ratio, self.direction, self.eps = entropy, kl, ratio, direction, eps
        self.class_weights, self.labelled = class_weights, labelled
        self.trainable, self.norm_stats, self.memory = trainable, norm_stats, memory
        self.shares: Tensor
        self.visits: Tensor
        self.means: Tensor

    def streams(self) -> dict[str, Stream]:
        """Return unlabelled images of the target, whole in 2-D."""
        return {"unlabelled": Stream("unlabelled", kind="slice", partial=True)}

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Choose what is trained, and make room for what is remembered."""
        self.task = task
        if not isinstance(self.class_weights, str) and len(self.class_weights) != task.num_classes:
            raise RecipeError(
                f"sfda: class_weights has {len(self.class_weights)} numbers for {task.num_classes} classes"
            )
        if self.trainable == "norm_affine":
            chosen = {id(p) for p in norm_affine(backbone)}
            if not chosen:
                raise RecipeError(
                    "sfda: trainable is norm_affine, but no norm layer of this network has scale and shift"
                )
            for parameter in backbone.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
        device = next(backbone.parameters()).device
        self.register_buffer(
            "shares", torch.zeros(0, task.num_classes, device=device)
        )  # of volumes, by number of the case
        self.register_buffer("visits", torch.zeros(0, device=device))
        self.register_buffer(
            "means", torch.zeros(2, task.num_classes, device=device)
        )  # predicted and expected, for the guard

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in ("shares", "visits"):  # as many cases as had been met
            if prefix + name in state_dict:
                setattr(self, name, torch.zeros_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_modes(self, backbone: nn.Module) -> None:
        """Train; statistics of batch norm as asked for."""
        super().set_modes(backbone)
        if self.norm_stats == "freeze":
            freeze_statistics(backbone)

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``entropy``, ``ratio`` where a prior is known, and ``labelled`` where something is.

        Raises:
            RecipeError: ``kl`` is above 0, and nothing is expected of any image.
        """
        share = batch["unlabelled"]
        prior = share.extras.get("prior")
        if self.kl and prior is None:
            raise RecipeError("sfda: kl needs expected class shares; name a data.prior, or set kl: 0")
        if self.norm_stats == "batch":
            with batch_statistics(backbone):
                logits = backbone(share.image)
        else:
            logits = backbone(share.image)
        known = share.label != IGNORE
        unknown = share.valid & ~known[:, None]
        how = self.ratio if self.kl and prior is not None else None
        mean, ratio = entropy_and_ratio(
            logits, self._weights(prior), how, entropy_valid=unknown, ratio_valid=share.valid
        )
        losses = {"entropy": self.entropy * mean}
        if self.labelled and bool(known.any()):
            losses["labelled"] = self.labelled * segmentation_loss(logits, share.label)
        notes: dict[str, Tensor] = {}
        if self.kl and prior is not None:
            if self.task.ndim == 3:
                ratio = self._of_volumes(ratio, share.geometry.case)
            losses["ratio"] = self.kl * class_ratio_kl(ratio, prior, direction=self.direction, eps=self.eps)
            notes = self._watch(ratio.detach(), prior, progress)
        if progress.step % LOOK_EVERY == LOOK_EVERY - 1:
            self._look(losses["entropy"].detach(), progress)
        return StepOutput(losses, {"unlabelled": logits.detach()}, notes)

    def predictors(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """Return the network, with statistics of the batch where it was adapted with them."""
        return {"student": OnBatchStatistics(backbone) if self.norm_stats == "batch" else backbone}

    # -- shares of volumes ------------------------------------------------------------------------------------------------

    def _of_volumes(self, ratio: Tensor, cases: Tensor) -> Tensor:
        """Return the running shares [B, K] of the volumes that patches are of, with the patches' gradients."""
        missing = int(cases.max()) + 1 - len(self.shares)
        if missing > 0:
            self.shares = torch.cat([self.shares, self.shares.new_zeros(missing, self.shares.shape[1])])
            self.visits = torch.cat([self.visits, self.visits.new_zeros(missing)])
        found = []
        for row, case in zip(ratio, cases.tolist(), strict=True):
            self.visits[case] += 1
            weight = (1 / self.visits[case]).clamp_min(self.memory)
            self.shares[case] += weight * (row.detach() - self.shares[case])
            found.append(self.shares[case].clone() + (row - row.detach()))
        return torch.stack(found)

    # -- guard against collapse -------------------------------------------------------------------------------------------

    def _weights(self, prior: Tensor | None) -> Tensor | None:
        if self.class_weights == "none":
            return None
        if not isinstance(self.class_weights, str):
            return torch.tensor(self.class_weights)
        if prior is None:
            raise RecipeError("sfda: class_weights are inverse_prior, but there is no prior; name a data.prior")
        inverse = 1 / prior.nanmean(0).clamp_min(SMALLEST_PRIOR)
        return inverse / inverse.sum()

    def _watch(self, ratio: Tensor, prior: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Follow what is predicted and what is expected, in the mean over images of which something is."""
        known = ~prior.isnan().any(1)
        if bool(known.any()):
            new = torch.stack([ratio[known].mean(0), prior[known].to(ratio).mean(0)])
            follow_(self.means, new, progress.step)
        names = self.task.classes
        return {f"ratio/{n}": self.means[0, k] for k, n in enumerate(names)} | {
            f"expected/{n}": self.means[1, k] for k, n in enumerate(names)
        }

    def _look(self, entropy: Tensor, progress: Progress) -> None:
        """Warn, once each, of classes that have all but gone, and of predictions that are certain of everything."""
        for k, name in enumerate(self.task.classes):
            predicted, expected = self.means[:, k].tolist()
            if is_gone(predicted, expected):
                self.warn(
                    f"class {name}",
                    f"{name!r} is predicted in {predicted:.2%} of the voxels and expected in {expected:.2%}: it is collapsing; "
                    "lower the rate, or check the prior",
                    progress,
                )
        if self.entropy and float(entropy) < SMALLEST_ENTROPY * self.entropy:
            self.warn(
                "entropy",
                f"the mean entropy is {float(entropy):.1e}: nothing is left to learn from; the predictions may have collapsed",
                progress,
            )
