"""Weights that others have published, under the names of our networks.

The names and shapes in ``published/*.json`` were taken by constructing the publishers' own modules, each with its
repository and commit. They are what tests load through, and what a refusal recognises a file by; no weights are kept here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

FOLDER = Path(__file__).parent / "published"
_SWIN = re.compile(r"(|.*?\.)((?:patch_embed|layers[1-4]c?)\..*)")
_PLAIN = re.compile(r"(.*?)(?:encoder\.stages\.(\d+)\.0|decoder\.stages\.(\d+))\.convs\.(\d)\.(.*)")


def _once(name: str) -> str:
    """Return the first name of a layer: nnU-Net's blocks hold theirs under two, and its decoders hold the encoder."""
    name = name.replace("decoder.encoder.", "encoder.")
    return name.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")


@dataclass(frozen=True)
class Release:
    """What the files of one publication hold.

    Args:
        name: Of the list.
        files: Names of the files, one per width.
        source: Repository, commit or version, and module of the publishers that the list was taken from.
        backbone: Name and options of the backbone here that takes them.
        widths: Features of the first level, f.
        entries: Names, and shapes in which lengths may be multiples of f.
    """

    name: str
    files: tuple[str, ...]
    source: tuple[Mapping[str, str], ...]
    backbone: Mapping[str, Any]
    widths: tuple[int, ...]
    entries: Mapping[str, tuple[int | str, ...]]

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all entries for a number of features of the first level."""

        def length(given: int | str) -> int:
            return given if isinstance(given, int) else int(given[:-1] or 1) * width

        return {name: tuple(map(length, shape)) for name, shape in self.entries.items()}


@cache
def releases() -> tuple[Release, ...]:
    """Return what is known of published files."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        plain = json.loads(path.read_text())
        entries = {name: tuple(shape) for name, shape in plain["entries"].items()}
        found.append(
            Release(
                path.stem,
                tuple(plain["files"]),
                tuple(plain["source"]),
                plain["backbone"],
                tuple(plain["widths"]),
                entries,
            )
        )
    return tuple(found)


def recognised(state: Mapping[str, Tensor]) -> str:
    """Return in a few words which published file a state is like and what takes it; empty where none is known."""
    shapes = {name.removeprefix("module."): tuple(tensor.shape) for name, tensor in state.items()}
    likely = []
    for release in releases():
        for number, width in enumerate(release.widths):
            known = {name.removeprefix("module."): shape for name, shape in release.shapes(width).items()}
            same = sum(shapes.get(name) == shape for name, shape in known.items())
            if same > 0.9 * len(known):
                likely.append((same, release, number))
    if not likely:
        return ""
    _, release, number = max(likely, key=lambda found: found[0])
    options = {**release.backbone}
    if len(release.widths) > 1:
        options["features"] = release.widths[number]
    inside = ", ".join(f"{key}: {value}" for key, value in options.items())
    named = f"it is like {release.files[number]} of {release.source[0]['repository']}"
    return f"{named}, which goes into backbone: {{{inside}}} in 3-D with a start_share that it can fill"


def translated(names: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """Return by names of a file the names under which our networks have what they stand for; most are the same.

    MONAI's self-supervised weights are those of a Swin transformer alone, with layers named as it was first published;
    VoCo's may call it ``swin_vit``. A plain U-Net of nnU-Net is MONAI's DynUNet under other names, and its residual one has
    some of its layers under several.

    Args:
        names: Those of the file.
        own: Those of the network. What has a name there is left alone.
    """
    names, own = list(names), list(own)
    if any(".swinViT." in f".{name}" for name in own) and not any(".swinViT." in f".{name}" for name in names):
        return {name: _of_swin(name) for name in names}
    if any(name.endswith("input_block.conv1.conv.weight") for name in own):
        return _of_plain(names)
    if any(name.endswith("encoder.stem.convs.0.conv.weight") for name in own):
        return {name: _once(name) for name in names}
    return {name: name for name in names}


def _of_swin(name: str) -> str:
    name = name.replace("swin_vit.", "swinViT.").replace(".mlp.fc", ".mlp.linear")
    if ".swinViT." not in f".{name}" and (found := _SWIN.fullmatch(name)):
        return f"{found[1]}swinViT.{found[2]}"
    return name


def _of_plain(names: list[str]) -> dict[str, str]:
    """Return names of DynUNet for those of nnU-Net's plain U-Net; others stay."""
    found = {name: match for name in names if (match := _PLAIN.fullmatch(_once(name)))}
    stages = [int(match[2]) for match in found.values() if match[2]]
    if not stages:
        return {name: name for name in names}
    deepest = max(stages)

    def level(match: re.Match[str]) -> str:
        if match[3]:
            return f"upsamples.{match[3]}.conv_block"
        number = int(match[2])
        return "input_block" if not number else "bottleneck" if number == deepest else f"downsamples.{number - 1}"

    result = {}
    for name in names:
        if match := found.get(name):
            layer, _, kind = match[5].partition(".")
            number = int(match[4]) + 1
            after = f"conv{number}.conv.{kind}" if layer == "conv" else f"norm{number}.{kind}"
            result[name] = f"{match[1]}{level(match)}.{after}"
        else:
            result[name] = re.sub(r"decoder\.transpconvs\.(\d+)\.", r"upsamples.\1.transp_conv.conv.", name).replace(
                f"decoder.seg_layers.{deepest - 1}.", "output_block.conv.conv."
            )
    return result
