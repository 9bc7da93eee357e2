"""Transformers of MONAI, 2-D and 3-D. They need the package einops, and MONAI is imported when one is made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

from torch import Tensor, nn

from labeleff.backbones.monai import Size, make
from labeleff.batch import Task
from labeleff.errors import RecipeError
from labeleff.functional.resizing import resized
from labeleff.registry import register

TOKEN = 16
"""Side of the patches that UNETR turns into tokens, voxels."""


def _need_einops(name: str) -> None:
    """Raise where the package that MONAI's transformers rest on is missing.

    Raises:
        RecipeError: It is.
    """
    if find_spec("einops") is None:
        raise RecipeError(f"backbone: {name} needs the package einops, which is not installed: pip install einops")


class TokensToMap(nn.Module):
    """Tokens [B, N, C] as the feature map [B, C, *S] that they were cut from; a module so that taps find it."""

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the map of tokens in the order of a grid *S."""
        return tokens.transpose(1, 2).reshape(*tokens.shape[::2], *grid).contiguous()


@cache
def _any_size() -> type[nn.Module]:
    """Return UNETR for images of any size. Its parameters have the names that MONAI gives them."""
    from monai.networks.nets import UNETR

    class AnySizeUNETR(UNETR):  # type: ignore[misc]  # MONAI has no types
        """UNETR whose embeddings of position are interpolated onto the grid of tokens of the image it is given."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.deepest = TokensToMap()

        def forward(self, x_in: Tensor) -> Tensor:
            """Return logits [B, K, *S] of [B, C, *S], S multiples of 16."""
            if any(n % TOKEN for n in x_in.shape[2:]):
                raise ValueError(f"an image of {list(x_in.shape[2:])} was given; multiples of {TOKEN} are needed")
            grid = [n // TOKEN for n in x_in.shape[2:]]
            embedding = self.vit.patch_embedding
            if tuple(grid) == tuple(self.feat_size):
                tokens = embedding(x_in)
            else:
                tokens = embedding.patch_embeddings(x_in).flatten(2).transpose(1, 2)
                tokens = embedding.dropout(tokens + self.positions(grid))
            hidden = []
            for block in self.vit.blocks:
                tokens = block(tokens)
                hidden.append(tokens)
            # the bottleneck before what is skipped, so that a pass for the encoder alone can stop there
            deepest = self.deepest(self.vit.norm(tokens), grid)
            skips = [TokensToMap.forward(self.deepest, hidden[level], grid) for level in (3, 6, 9)]
            up = self.decoder5(deepest, self.encoder4(skips[2]))
            up = self.decoder4(up, self.encoder3(skips[1]))
            up = self.decoder3(up, self.encoder2(skips[0]))
            logits: Tensor = self.out(self.decoder2(up, self.encoder1(x_in)))
            return logits

        def positions(self, grid: Sequence[int]) -> Tensor:
            """Return the embeddings of position [1, N, C] on a grid; those of the grid they were made for as they are."""
            own: Tensor = self.vit.patch_embedding.position_embeddings
            if tuple(grid) == tuple(self.feat_size):
                return own
            laid_out = own.transpose(1, 2).reshape(1, own.shape[2], *self.feat_size)
            return resized(laid_out, grid, align_corners=False).flatten(2).transpose(1, 2)

    return AnySizeUNETR


@register("backbone", "unetr")
def unetr(
    task: Task,
    *,
    size: Size = "small",
    hidden: int | None = None,
    heads: int | None = None,
    features: int | None = None,
    image: int = 96,
    dropout: float = 0.0,
) -> nn.Module:
    """UNETR (Hatamizadeh et al., WACV 2022, arXiv:2103.10504; MONAI ``UNETR``): twelve layers of attention over 16-voxel patches.

    Patches are multiples of 16. Embeddings of position are interpolated, so that images need not have one size.

    Args:
        size: ``standard``: that of the paper, 768 channels in 12 heads; ``small``: 192 in 6.
        hidden: Channels of a token in place of those of the size.
        heads: Heads of attention in place of those of the size; they divide the channels.
        features: Channels of the decoder at full resolution; default 16.
        image: Side of the images that embeddings of position are laid out for, voxels: a multiple of 16.
        dropout: Probability of dropout in the transformer.
    """
    _need_einops("unetr")
    width = hidden if hidden is not None else {"small": 192, "standard": 768}[size]
    count = heads if heads is not None else {"small": 6, "standard": 12}[size]
    if count < 1 or width % count:
        raise ValueError(f"hidden is {width} and heads {count}; the heads must divide the channels")
    if image < TOKEN or image % TOKEN:
        raise ValueError(f"image is {image}; it must be a multiple of {TOKEN}")
    arguments: dict[str, Any] = {
        "in_channels": task.channels,
        "out_channels": task.num_classes,
        "img_size": (image,) * task.ndim,
        "feature_size": features if features is not None else 16,
        "hidden_size": width,
        "mlp_dim": 4 * width,
        "num_heads": count,
        "dropout_rate": dropout,
        "spatial_dims": task.ndim,
    }
    network = _any_size()(**arguments)
    network.definition = {"_target_": "monai.networks.nets.UNETR", **arguments}  # type: ignore[assignment]
    for name, module in network.named_modules():
        if name.endswith(".norm_cross_attn"):  # of attention that this network has not: no gradient ever comes
            module.requires_grad_(False)
    return network


@register("backbone", "swin_unetr")
def swin_unetr(
    task: Task,
    *,
    size: Size = "small",
    features: int | None = None,
    depths: tuple[int, int, int, int] = (2, 2, 2, 2),
    heads: tuple[int, int, int, int] = (3, 6, 12, 24),
    window: int = 7,
    dropout: float = 0.0,
    version: Literal[1, 2] = 1,
) -> nn.Module:
    """Swin UNETR (Hatamizadeh et al., arXiv:2201.01266; MONAI ``SwinUNETR``): shifted windows of attention in four levels.

    Patches are multiples of 32, and longer than 32: instance norm needs more than one voxel in the deepest level.

    Args:
        size: ``standard``: 48 features, as MONAI's and VoCo's pre-trained weights have them; ``small``: 24.
        features: Features of the first level in place of those of the size; a multiple of 12.
        depths: Layers per level.
        heads: Heads of attention per level; they divide its features.
        window: Side of a window of attention, tokens.
        dropout: Probability of dropout in the transformer.
        version: 2: a residual convolution before each level (Swin UNETR-V2; MONAI ``use_v2``), as VoCo's weights have it.
    """
    _need_einops("swin_unetr")
    width = features if features is not None else {"small": 24, "standard": 48}[size]
    if width < 12 or width % 12:
        raise ValueError(f"features is {width}; a multiple of 12 is needed")
    for level, count in enumerate(heads):
        if count < 1 or width * 2**level % count:
            raise ValueError(
                f"heads is {list(heads)}; {count} does not divide the {width * 2**level} features of level {level}"
            )
    return make(
        "SwinUNETR",
        in_channels=task.channels,
        out_channels=task.num_classes,
        depths=depths,
        num_heads=heads,
        window_size=window,
        feature_size=width,
        drop_rate=dropout,
        attn_drop_rate=dropout,
        use_v2=version == 2,
        spatial_dims=task.ndim,
    )
