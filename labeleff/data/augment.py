"""Random augmentation: parameters are drawn per sample on the CPU, arrays are changed per batch on the device.

The geometry of a sample is one affine map in the normalised coordinates of ``grid_sample`` (``align_corners=False``,
x fastest), from output to input, so that it can be replayed on any other array of the same patch. What comes from
outside the patch is unknown: its label is IGNORE and it is not valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from labeleff.batch import IGNORE, Batch, Geometry, beside


@dataclass(frozen=True)
class Augment:
    """Random augmentation of training patches, drawn per sample, the same for images and labels.

    Args:
        probability: Share of samples that get the rotation, scaling and shift; the others keep their grid.
        rotate: Largest rotation, degrees, about every axis (3-D: about the last axis only if ``in_plane``).
        scale: Largest relative change of size: 0.15 draws from [0.85, 1.15].
        shift: Largest shift, share of the patch.
        flip: Axes of the patch that may be mirrored, each with probability 1/2.
        rot90: Rotate by a random multiple of 90 degrees in the first two axes (they must be equally long).
        in_plane: 3-D: rotate about the last axis only.
        gain: Largest relative change of contrast.
        offset: Largest shift of intensity, standard deviations of the image.
        gamma: Largest relative change of the exponent.
        noise: Largest standard deviation of added Gaussian noise.
        blur: Largest standard deviation of Gaussian blur, voxels.
    """

    probability: float = 1.0
    rotate: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    flip: tuple[int, ...] = ()
    rot90: bool = False
    in_plane: bool = True
    gain: float = 0.0
    offset: float = 0.0
    gamma: float = 0.0
    noise: float = 0.0
    blur: float = 0.0


def draw(
    spec: Augment, generator: np.random.Generator, patch: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the affine map [d, d + 1] and the intensity parameters [5] of one sample.

    Args:
        spec: How much of what.
        generator: The sample's own.
        patch: Shape of the patch; maps are rigid in voxels, whatever the patch's proportions.
    """
    d = len(patch)
    matrix, move = np.eye(d), np.zeros(d)
    if generator.random() < spec.probability:
        for i, j in ((0, 1),) if d == 2 or spec.in_plane else ((0, 1), (0, 2), (1, 2)):
            matrix = matrix @ _turn(d, i, j, np.deg2rad(generator.uniform(-spec.rotate, spec.rotate)))
        matrix = matrix * (1 / (1 + generator.uniform(-spec.scale, spec.scale)))
        move = generator.uniform(-spec.shift, spec.shift, d) * 2
    if spec.rot90:
        matrix = matrix @ np.round(_turn(d, 0, 1, np.pi / 2 * generator.integers(4)))
    for axis in spec.flip:
        if generator.random() < 0.5:
            matrix[:, axis] *= -1
    # voxels -> normalised coordinates, then from array order to the x-fastest order of grid_sample
    lengths = np.asarray(patch, float)
    matrix = matrix * lengths[None, :] / lengths[:, None]
    affine = np.concatenate([matrix[::-1, ::-1], move[::-1, None]], axis=1)
    intensity = np.array(
        [
            1 + generator.uniform(-spec.gain, spec.gain),
            generator.uniform(-spec.offset, spec.offset),
            1 + generator.uniform(-spec.gamma, spec.gamma),
            generator.uniform(0, spec.noise),
            generator.uniform(0, spec.blur),
        ]
    )
    return affine.astype(np.float32), intensity.astype(np.float32)


def _turn(d: int, i: int, j: int, angle: float) -> NDArray[np.float64]:
    matrix = np.eye(d)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def apply(batch: Batch) -> Batch:
    """Return the batch with the geometry and intensity that its samples were given; the input is left as it is."""
    geometry = batch.geometry
    image, label, given, valid, soft = batch.image, batch.label, batch.given, batch.valid, batch.soft
    moved = _moved(geometry.affine)
    if len(moved):
        grid = _grid(beside(geometry.affine[moved], image), image.shape[2:])
        image, moved = image.clone(), beside(moved, image)
        image[moved] = F.grid_sample(batch.image[moved], grid, mode="bilinear", align_corners=False)
        maps = [label[moved], *([given[moved]] if given is not label else [])]
        # zeros outside: labels are shifted so that zero means IGNORE, validity so that it means invalid
        stack = torch.stack([m.float() - IGNORE for m in maps] + [valid[moved, 0].float()], dim=1)
        warped = F.grid_sample(stack, grid, mode="nearest", align_corners=False)
        label, valid = label.clone(), valid.clone()
        label[moved] = (warped[:, 0] + IGNORE).long()
        valid[moved, 0] = warped[:, -1] > 0.5
        if given is not batch.label:
            given = given.clone()
            given[moved] = (warped[:, 1] + IGNORE).long()
        if soft is not None:  # taking the nearest voxel's shares is averaging the raters' nearest labels
            soft = soft.clone()
            soft[moved] = F.grid_sample(soft[moved], grid, mode="nearest", align_corners=False)
    unedited = batch.given is batch.label
    image = _intensity(image, geometry)
    return batch._replace(image=image, label=label, given=label if unedited else given, valid=valid, soft=soft)


def replay(array: Tensor, geometry: Geometry, *, mode: Literal["bilinear", "nearest"] = "bilinear") -> Tensor:
    """Return [B, C, *S] with the geometry of a batch applied again; zero outside. ``bilinear`` is trilinear in 3-D."""
    moved = _moved(geometry.affine)
    if not len(moved):
        return array
    result = array.clone()
    grid = _grid(beside(geometry.affine[moved], array), array.shape[2:])
    moved = beside(moved, array)
    result[moved] = F.grid_sample(array[moved].float(), grid, mode=mode, align_corners=False).to(array.dtype)
    return result


def _moved(affine: Tensor) -> Tensor:
    identity = torch.eye(affine.shape[1], affine.shape[2], device=affine.device)
    return torch.nonzero((affine != identity).flatten(1).any(1)).squeeze(1)


def _grid(affine: Tensor, spatial: torch.Size) -> Tensor:
    return F.affine_grid(affine, [len(affine), 1, *spatial], align_corners=False)


def _intensity(image: Tensor, geometry: Geometry) -> Tensor:
    """Blur, gamma, gain and offset, then noise, each where it was drawn."""
    gain, offset, gamma, noise, blur = geometry.intensity.unbind(1)
    per_sample = (-1,) + (1,) * (image.ndim - 1)

    def each(drawn: Tensor) -> Tensor:
        return beside(drawn, image).view(per_sample)

    if bool((blur > 0).any()):
        image = _blur(image, blur)
    if bool((gamma != 1).any()):
        low = image.flatten(1).amin(1).view(per_sample)
        reach = (image.flatten(1).amax(1).view(per_sample) - low).clamp_min(1e-6)
        image = ((image - low) / reach).clamp(0, 1) ** each(gamma) * reach + low
    if bool((gain != 1).any()) or bool((offset != 0).any()):
        image = image * each(gain) + each(offset)
    if bool((noise > 0).any()):
        grain = torch.empty_like(image)
        for row, key in zip(grain, geometry.sample.tolist(), strict=True):
            row.normal_(generator=torch.Generator(image.device).manual_seed(key))
        image = image + grain * each(noise)
    return image


def _blur(image: Tensor, sd: Tensor) -> Tensor:
    """Return every sample blurred by a Gaussian of its own standard deviation, voxels."""
    largest, sd = float(sd.max()), beside(sd, image)
    if image.ndim == 4:
        from kornia.filters import gaussian_blur2d

        size = 2 * int(np.ceil(3 * largest)) + 1
        size = min(size, 2 * ((min(image.shape[2:]) - 1) // 2) + 1)
        wide = sd.clamp_min(1e-3).unsqueeze(1).expand(-1, 2)
        blurred: Tensor = gaussian_blur2d(image, (size, size), wide)
        return blurred
    reach = min(int(np.ceil(3 * largest)), min(image.shape[2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, device=image.device)
    kernel = torch.softmax(-(offsets**2) / (2 * sd.clamp_min(1e-3).unsqueeze(1) ** 2), dim=1)
    samples, channels = image.shape[:2]
    flat = image.reshape(1, samples * channels, *image.shape[2:])
    weight = kernel.repeat_interleave(channels, 0)
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = 2 * reach + 1
        padding = [0] * 6
        padding[4 - 2 * axis] = padding[5 - 2 * axis] = reach
        padded = F.pad(flat, padding, mode="replicate")
        flat = F.conv3d(padded, weight.view(-1, 1, *shape), groups=samples * channels)
    return flat.reshape(image.shape)
