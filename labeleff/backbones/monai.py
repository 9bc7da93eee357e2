"""Networks of MONAI, 2-D and 3-D. MONAI is imported when one is made, since that takes seconds."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from labeleff.backbones.outputs import Unwrapped
from labeleff.batch import Task
from labeleff.registry import register

Norm = Literal["instance", "batch", "group"]


def _norm(norm: Norm) -> tuple[str, dict[str, object]]:
    named: dict[Norm, tuple[str, dict[str, object]]] = {
        "instance": ("INSTANCE", {"affine": True}),
        "batch": ("BATCH", {}),
        "group": ("GROUP", {"num_groups": 4}),
    }
    return named[norm]


@register("backbone", "unet")
def unet(
    task: Task,
    *,
    channels: tuple[int, ...] = (16, 32, 64, 128),
    res_units: int = 2,
    norm: Norm = "instance",
    dropout: float = 0.0,
) -> nn.Module:
    """Residual U-Net (MONAI ``UNet``); its first block already halves the resolution, which makes it cheap.

    Args:
        channels: Channels per level; every level halves the resolution.
        res_units: Residual units per level.
        norm: Normalisation.
        dropout: Probability of dropout in every block.
    """
    from monai.networks.nets import UNet

    if len(channels) < 2:
        raise ValueError("channels needs at least two levels")
    network: nn.Module = UNet(
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=res_units,
        norm=_norm(norm),
        dropout=dropout,
    )
    return network


@register("backbone", "basic_unet")
def basic_unet(
    task: Task,
    *,
    features: tuple[int, int, int, int, int, int] = (16, 32, 64, 128, 256, 16),
    norm: Norm = "instance",
    dropout: float = 0.0,
) -> nn.Module:
    """U-Net with two convolutions per level at full resolution (MONAI ``BasicUNet``).

    Args:
        features: Channels of the five levels and of the last block.
        norm: Normalisation.
        dropout: Probability of dropout in every block.
    """
    from monai.networks.nets import BasicUNet

    network: nn.Module = BasicUNet(
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        features=features,
        norm=_norm(norm),
        dropout=dropout,
    )
    return network


@register("backbone", "vnet")
def vnet(task: Task, *, dropout: float = 0.5) -> nn.Module:
    """V-Net (MONAI ``VNet``): 16 base filters, batch norm, the usual network for the left atrium.

    Args:
        dropout: Probability of dropout, in the deepest blocks and on what is skipped to the decoder.
    """
    from monai.networks.nets import VNet

    network: nn.Module = VNet(
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        dropout_prob_down=dropout,
        dropout_prob_up=(dropout, dropout),
    )
    for module in network.modules():
        if isinstance(module, _DropoutNd):  # MONAI leaves 0.5 in the upper levels of the decoder, whatever is asked for
            module.p = dropout
    return network


@register("backbone", "segresnet")
def segresnet(
    task: Task, *, filters: int = 8, blocks_down: tuple[int, ...] = (1, 2, 2, 4), dropout: float = 0.0
) -> nn.Module:
    """Residual encoder with a light decoder (MONAI ``SegResNet``), group norm.

    Args:
        filters: Channels of the first level; a multiple of 8.
        blocks_down: Residual blocks per level.
        dropout: Probability of dropout after the first convolution.
    """
    from monai.networks.nets import SegResNet

    if filters < 8 or filters % 8:
        raise ValueError(f"filters is {filters}; group norm needs a multiple of 8")
    network: nn.Module = SegResNet(
        spatial_dims=task.ndim,
        init_filters=filters,
        in_channels=task.channels,
        out_channels=task.num_classes,
        dropout_prob=dropout or None,
        blocks_down=blocks_down,
        blocks_up=(1,) * (len(blocks_down) - 1),
        upsample_mode="deconv",
    )
    return network


@register("backbone", "dynunet")
def dynunet(
    task: Task, *, filters: tuple[int, ...] = (16, 32, 64, 128), norm: Norm = "instance", deep_supervision: bool = False
) -> nn.Module:
    """The U-Net of nnU-Net (MONAI ``DynUNet``).

    Args:
        filters: Channels per level.
        norm: Normalisation.
        deep_supervision: Build the extra heads; losses are on the full-resolution one.
    """
    from monai.networks.nets import DynUNet

    if len(filters) < 3:
        raise ValueError("filters needs at least three levels")
    network: nn.Module = DynUNet(
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        kernel_size=[3] * len(filters),
        strides=[1] + [2] * (len(filters) - 1),
        upsample_kernel_size=[2] * (len(filters) - 1),
        filters=filters,
        norm_name=_norm(norm),
        deep_supervision=deep_supervision,
    )
    return Unwrapped(network, task.ndim) if deep_supervision else network
