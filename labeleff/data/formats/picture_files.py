"""Reading PNG, TIFF, JPEG and BMP files: as they are, without a guess about what colours mean."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from labeleff.data.formats.base import check_memory
from labeleff.errors import DataError

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
TIFF = (".tif", ".tiff")
CONVERTED = {
    "P": "RGB",
    "PA": "RGB",
    "RGBA": "RGB",
    "LA": "L",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "RGBX": "RGB",
    "RGBa": "RGB",
}
"""What images of other modes are brought to; opacity is dropped."""
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, tifffile.TiffFileError)


def is_picture(path: Path) -> bool:
    """Return whether a file is read here, told by its name."""
    return path.name.lower().endswith(SUFFIXES)


def picture_header(path: Path, case: str) -> tuple[int, tuple[int, int]]:
    """Return channels and (H, W) of a picture; its pixels are not decoded.

    Raises:
        DataError: It cannot be read.
    """
    with suppress(UnidentifiedImageError), _opened(path, case) as file:
        if not _for_tifffile(path, file):
            return len(Image.new(CONVERTED.get(file.mode, file.mode), (1, 1)).getbands()), (file.height, file.width)
    stack = _tiff(path, case, header=True)
    return stack[0], (stack[1], stack[2])


def read_picture(path: Path, case: str) -> NDArray[Any]:
    """Return [C, H, W] as stored: 8 bits as uint8, 16 bits as uint16, else float32. Opacity is dropped, palettes are resolved.

    The pages of a TIFF file of grey pages are channels.

    Raises:
        DataError: It cannot be read, or has colours of 16 bits that the reader would cut to 8.
    """
    pixels = _decoded(path, case, CONVERTED)
    return pixels if pixels.ndim == 3 else pixels[None]


def read_label_picture(path: Path, case: str) -> NDArray[Any]:
    """Return the ids [H, W] in a picture: grey values, palette indices, or colours whose channels are the same.

    Raises:
        DataError: It cannot be read, is compressed with losses, or codes classes as colours.
    """
    if path.name.lower().endswith((".jpg", ".jpeg")):
        raise DataError(f"case {case!r}: {path}: JPEG changes values, so that it cannot hold a label; save it as PNG")
    pixels = _decoded(path, case, {"RGBA": "RGB", "LA": "L", "PA": "P"})
    if pixels.ndim == 3:
        if len(pixels) not in (1, 3) or any((channel != pixels[0]).any() for channel in pixels[1:]):
            raise DataError(
                f"case {case!r}: {path}: {len(pixels)} channels that differ; a label holds one whole number per pixel, no colours"
            )
        pixels = pixels[0]
    return pixels


def brought_to(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return a picture with 1 or 3 channels: grey repeated, or the luminance of colours (0.299 R + 0.587 G + 0.114 B)."""
    if len(pixels) == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=0)
    if len(pixels) == 3 and channels == 1:
        grey = np.tensordot(np.array([0.299, 0.587, 0.114]), pixels.astype(np.float64), axes=1)[None]
        return np.rint(grey).astype(np.uint8) if pixels.dtype == np.uint8 else grey.astype(np.float32)
    return pixels


def _opened(path: Path, case: str) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        if path.name.lower().endswith(TIFF):
            raise  # tifffile reads more kinds
        raise DataError(f"case {case!r}: {path}: not a readable image ({error})") from error
    except _BROKEN as error:
        raise DataError(f"case {case!r}: {path}: not a readable image ({error})") from error


def _for_tifffile(path: Path, file: Image.Image) -> bool:
    """Return whether a TIFF file holds what pillow cuts short: several pages, or colours of 16 bits."""
    return path.name.lower().endswith(TIFF) and (getattr(file, "n_frames", 1) > 1 or _is_deep(file))


def _is_deep(file: Image.Image) -> bool:
    tile: Any = getattr(file, "tile", [])
    return file.mode.startswith("RGB") and bool(tile) and "16" in str(tile[0][3])


def _decoded(path: Path, case: str, converted: dict[str, str]) -> NDArray[Any]:
    """Return [H, W] or [C, H, W]."""
    with suppress(UnidentifiedImageError), _opened(path, case) as file:
        if not _for_tifffile(path, file):
            if _is_deep(file):
                raise DataError(
                    f"case {case!r}: {path}: a PNG of 16 bits per colour would be cut to 8; save it as TIFF, or as 8 bits"
                )
            try:
                mode = converted.get(file.mode, file.mode)
                pixels = np.asarray(file.convert(mode) if mode != file.mode else file)
            except _BROKEN as error:
                raise DataError(f"case {case!r}: {path}: the image cannot be decoded ({error})") from error
            pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0)) if pixels.ndim == 3 else pixels
            return _usual(pixels)
    return _usual(_tiff(path, case))


def _usual(pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    return pixels if pixels.dtype in (np.uint8, np.uint16) else pixels.astype(np.float32)


def _tiff(path: Path, case: str, *, header: bool = False) -> Any:
    """Return [C, H, W] of a TIFF file that pillow does not read, or its shape alone."""
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            check_memory(math.prod(series.shape) * series.dtype.itemsize, f"case {case!r}: {path}")
            axes, shape = series.axes, series.shape
            kept = [i for i, n in enumerate(shape) if n > 1 or axes[i] in "YX"]
            axes, shape = "".join(axes[i] for i in kept), tuple(shape[i] for i in kept)
            if axes[-2:] == "YX" and len(axes) in (2, 3):
                order = None
            elif axes[-3:] == "YXS" and len(axes) == 3:
                order = (2, 0, 1)
            else:
                raise DataError(
                    f"case {case!r}: {path}: a TIFF file with axes {series.axes} {series.shape}; one page, or pages that are "
                    "channels, can be read"
                )
            shape = tuple(shape[i] for i in order) if order else (1,) * (3 - len(shape)) + shape
            if header:
                return shape
            pixels = series.asarray().reshape([series.shape[i] for i in kept])
            return np.ascontiguousarray(pixels.transpose(order) if order else pixels).reshape(shape)
    except (*_BROKEN, IndexError, KeyError) as error:
        raise DataError(f"case {case!r}: {path}: not a readable TIFF file ({error})") from error
