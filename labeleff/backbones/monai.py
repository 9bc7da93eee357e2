"""Networks of MONAI, 2-D and 3-D. MONAI is imported when one is made, since that takes seconds."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from labeleff.backbones.outputs import Unwrapped
from labeleff.batch import Task
from labeleff.registry import register

Norm = Literal["instance", "batch", "group"]
Size = Literal["small", "standard"]


def _norm(norm: Norm) -> tuple[str, dict[str, object]]:
    named: dict[Norm, tuple[str, dict[str, object]]] = {
        "instance": ("INSTANCE", {"affine": True}),
        "batch": ("BATCH", {}),
        "group": ("GROUP", {"num_groups": 4}),
    }
    return named[norm]


def make(name: str, **arguments: Any) -> nn.Module:
    """Return a network of MONAI; how it was made is kept in its attribute ``definition``, for whoever writes it down.

    Args:
        name: A class of ``monai.networks.nets``.
        arguments: Those of its constructor.
    """
    from monai.networks import nets

    network: nn.Module = getattr(nets, name)(**arguments)
    network.definition = {"_target_": f"monai.networks.nets.{name}", **arguments}  # type: ignore[assignment]
    return network


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
    if len(channels) < 2:
        raise ValueError("channels needs at least two levels")
    return make(
        "UNet",
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=res_units,
        norm=_norm(norm),
        dropout=dropout,
    )


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
    return make(
        "BasicUNet",
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        features=features,
        norm=_norm(norm),
        dropout=dropout,
    )


@register("backbone", "vnet")
def vnet(task: Task, *, dropout: float = 0.5) -> nn.Module:
    """V-Net (MONAI ``VNet``): 16 base filters, batch norm, the usual network for the left atrium.

    Args:
        dropout: Probability of dropout, in the deepest blocks and on what is skipped to the decoder.
    """
    network = make(
        "VNet",
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        dropout_prob_down=dropout,
        dropout_prob_up=(dropout, dropout),
    )
    _set_dropout(network, dropout)  # MONAI leaves 0.5 in the upper levels of the decoder, whatever is asked for
    return network


def _set_dropout(network: nn.Module, dropout: float) -> None:
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = dropout


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
    if filters < 8 or filters % 8:
        raise ValueError(f"filters is {filters}; group norm needs a multiple of 8")
    return make(
        "SegResNet",
        spatial_dims=task.ndim,
        init_filters=filters,
        in_channels=task.channels,
        out_channels=task.num_classes,
        dropout_prob=dropout or None,
        blocks_down=blocks_down,
        blocks_up=(1,) * (len(blocks_down) - 1),
        upsample_mode="deconv",
    )


@register("backbone", "dynunet")
def dynunet(
    task: Task,
    *,
    filters: tuple[int, ...] = (16, 32, 64, 128),
    norm: Norm = "instance",
    deep_supervision: bool = False,
    bias: bool = False,
) -> nn.Module:
    """The U-Net of nnU-Net (MONAI ``DynUNet``).

    Args:
        filters: Channels per level.
        norm: Normalisation.
        deep_supervision: Build the extra heads; losses are on the full-resolution one.
        bias: Transposed convolutions have one, as those of nnU-Net itself and of its published weights.
    """
    if len(filters) < 3:
        raise ValueError("filters needs at least three levels")
    network = make(
        "DynUNet",
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        kernel_size=[3] * len(filters),
        strides=[1] + [2] * (len(filters) - 1),
        upsample_kernel_size=[2] * (len(filters) - 1),
        filters=filters,
        norm_name=_norm(norm),
        deep_supervision=deep_supervision,
        trans_bias=bias,
    )
    return Unwrapped(network, task.ndim) if deep_supervision else network


@register("backbone", "attention_unet")
def attention_unet(
    task: Task, *, size: Size = "small", channels: tuple[int, ...] | None = None, dropout: float = 0.0
) -> nn.Module:
    """U-Net with gates of attention on what is skipped (MONAI ``AttentionUnet``), batch norm.

    Args:
        size: ``small``: 16, 32, 64, 128 channels; ``standard``: 64 … 1024 in five levels.
        channels: Channels per level in place of those of the size; every level halves the resolution.
        dropout: Probability of dropout in every block.
    """
    presets: dict[Size, tuple[int, ...]] = {"small": (16, 32, 64, 128), "standard": (64, 128, 256, 512, 1024)}
    chosen = channels if channels is not None else presets[size]
    if len(chosen) < 2 or min(chosen) < 2:
        raise ValueError(f"channels is {list(chosen)}; at least two levels of at least 2 channels are needed")
    network = make(
        "AttentionUnet",
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        channels=chosen,
        strides=(2,) * (len(chosen) - 1),
        dropout=dropout,
    )
    _set_dropout(network, dropout)  # MONAI leaves out the blocks that enlarge
    return network


@register("backbone", "mednext")
def mednext(
    task: Task,
    *,
    size: Size = "small",
    filters: int | None = None,
    kernel: Literal[3, 5, 7] = 3,
    deep_supervision: bool = False,
) -> nn.Module:
    """MedNeXt (Roy et al., MICCAI 2023, arXiv:2303.09975; MONAI ``MedNeXt``): four levels of residual blocks, group norm.

    Args:
        size: ``standard``: S of the paper, 32 filters and two blocks per level; ``small``: 16 and one.
        filters: Channels of the first level in place of those of the size.
        kernel: Width of the depth-wise convolutions, voxels.
        deep_supervision: Build the extra heads; losses are on the full-resolution one.
    """
    width = filters if filters is not None else {"small": 16, "standard": 32}[size]
    blocks = {"small": 1, "standard": 2}[size]
    if width < 1:
        raise ValueError(f"filters is {width}; at least 1 is needed")
    network = make(
        "MedNeXt",
        spatial_dims=task.ndim,
        init_filters=width,
        in_channels=task.channels,
        out_channels=task.num_classes,
        kernel_size=kernel,
        deep_supervision=deep_supervision,
        use_residual_connection=True,
        blocks_down=[blocks] * 4,
        blocks_bottleneck=blocks,
        blocks_up=[blocks] * 4,
    )
    return Unwrapped(network, task.ndim) if deep_supervision else network


Encoder = Literal[
    "efficientnet-b0",
    "efficientnet-b1",
    "efficientnet-b2",
    "efficientnet-b3",
    "efficientnet-b4",
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
]


@register("backbone", "flexible_unet")
def flexible_unet(
    task: Task,
    *,
    encoder: Encoder = "efficientnet-b0",
    decoder: tuple[int, int, int, int, int] = (256, 128, 64, 32, 16),
    dropout: float = 0.0,
) -> nn.Module:
    """U-Net around an encoder of image classification (MONAI ``FlexibleUNet``), batch norm; nothing is downloaded.

    Weights start at random; ``start: FILE`` takes them from a file. EfficientNet's own stochastic depth is off.

    Args:
        encoder: The encoder, 2-D or 3-D; it halves the resolution five times.
        decoder: Channels of the decoder, coarsest first.
        dropout: Probability of dropout in the decoder.
    """
    network = make(
        "FlexibleUNet",
        spatial_dims=task.ndim,
        in_channels=task.channels,
        out_channels=task.num_classes,
        backbone=encoder,
        pretrained=False,
        decoder_channels=decoder,
        dropout=dropout,
    )
    _set_dropout(network, dropout)  # the encoder brings its own, of a head that classifies
    for name, module in network.named_modules():
        if getattr(module, "drop_connect_rate", None):
            module.drop_connect_rate = 0.0
        if name in ("encoder._conv_head", "encoder._bn1", "encoder._fc"):  # of that head too: no gradient ever comes
            module.requires_grad_(False)
    return network
