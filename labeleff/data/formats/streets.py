"""Streets: Cityscapes, and the rendered GTAV and SYNTHIA that networks for it are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from labeleff.batch import IGNORE
from labeleff.data.formats.base import DataSet, checked_label, data_folder, required_label
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError
from labeleff.registry import register

CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""Ids of Cityscapes' label files that are trained on, in the order of its training ids; GTAV's files use the same."""
SYNTHIA = {
    3: "road", 4: "sidewalk", 2: "building", 21: "wall", 5: "fence", 7: "pole", 15: "traffic light", 9: "traffic sign",
    6: "vegetation", 1: "sky", 10: "person", 17: "rider", 8: "car", 19: "bus", 12: "motorcycle", 11: "bicycle",
}  # fmt: skip
"""Ids of SYNTHIA's label files that Cityscapes has too, in the same order."""


class Streets(DataSet):
    """Colour images of streets, three channels of 8 bits, every image a patient of its own.

    The first class stands for what is in none of the others. No label holds it: such pixels are unknown (255), in
    training and in evaluation.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        classes: 19: those that Cityscapes is evaluated on; 16: those of them that SYNTHIA has too.
        size: Height and width that images (bilinear) and labels (nearest) are brought to on reading, pixels; null: as they
            come. Evaluation is then at that size too.
        exclude: Images to leave out, by their names as cases.
    """

    name: ClassVar[str]
    ids: ClassVar[dict[int, str]] = CITYSCAPES

    def __init__(
        self, *, path: str, classes: int = 19, size: tuple[int, int] | None = None, exclude: tuple[str, ...] = ()
    ) -> None:
        if classes not in (16, 19):
            raise ValueError(f"classes is {classes}; give 19 or 16")
        if size is not None and (len(size) != 2 or min(size) < 8):
            raise ValueError(f"size is {list(size)}; give height and width, at least 8 pixels each")
        self.path, self.exclude = path, frozenset(exclude)
        self.size = (size[0], size[1]) if size is not None else None
        kept = CITYSCAPES if classes == 19 else SYNTHIA
        self.names = ("unlabelled", *kept.values())
        self.table = np.full(1 << 8, IGNORE, np.uint8)
        for value, name in self.ids.items():
            if name in self.names:
                self.table[value] = self.names.index(name)

    def rows(self, folder: Path) -> Iterator[tuple[str, Path, Path | None, Role]]:
        """Yield name, image, label and role of every image, in order."""
        raise NotImplementedError

    def manifest(self) -> Manifest:
        """Return one row per image; no image is opened.

        Raises:
            DataError: There are no images, or a label is missing.
        """
        folder = data_folder(self.path)
        cases = tuple(
            Case(name, name, (Source(image),), Source(label) if label is not None else None, "", role)
            for name, image, label, role in self.rows(folder)
            if name not in self.exclude
        )
        return Manifest(self.name, cases, self.names, 2, channels=3)

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [3, H, W] uint8."""
        with _opened(case.image[0].path, case) as file:
            image = _decoded(file, case, "RGB")
            if self.size is not None:
                image = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
            return np.ascontiguousarray(np.moveaxis(np.asarray(image), -1, 0))

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [H, W].

        Raises:
            DataError: The file cannot be read, or holds no ids.
        """
        with _opened(required_label(case), case) as file:
            label = Image.fromarray(self.table[self.stored(file, case)])
            if self.size is not None:
                label = label.resize((self.size[1], self.size[0]), Image.Resampling.NEAREST)
            return checked_label(np.asarray(label), case, len(self.names))

    def stored(self, file: Image.Image, case: Case) -> NDArray[np.uint8]:
        """Return the ids of an opened label file [H, W]."""
        if file.mode not in ("L", "P"):
            raise DataError(
                f"case {case.id!r}: {required_label(case)}: is an image of mode {file.mode}; a label file holds one id per pixel"
            )
        return np.asarray(_decoded(file, case, file.mode))

    def fingerprint(self, case: Case) -> str:
        """Return what changes when the image, or the size asked for, changes."""
        return f"{super().fingerprint(case)}|{self.size}"


@register("dataset", "cityscapes")
class Cityscapes(Streets):
    """Cityscapes: ``leftImg8bit/{train,val}/<city>/…_leftImg8bit.png``, ``gtFine/{train,val}/<city>/…_gtFine_labelIds.png``.

    Its 500 validation images are the test, as in the papers: the labels of its own test images are not public.
    """

    name = "cityscapes"

    def rows(self, folder: Path) -> Iterator[tuple[str, Path, Path | None, Role]]:
        """Yield the training and the validation images."""
        roles: tuple[tuple[str, Role], ...] = (("train", "train"), ("val", "test"))
        for part, role in roles:
            images = sorted((folder / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))
            if not images:
                raise DataError(f"{folder / 'leftImg8bit' / part}: no images; expected <city>/NAME_leftImg8bit.png")
            for image in images:
                name = image.name.removesuffix("_leftImg8bit.png")
                label = folder / "gtFine" / part / image.parent.name / f"{name}_gtFine_labelIds.png"
                if not label.is_file():
                    raise DataError(f"case {name!r}: {label}: the label is missing; unpack gtFine beside leftImg8bit")
                yield name, image, label, role


@register("dataset", "gtav")
class Gtav(Streets):
    """GTAV (Playing for Data): ``images/NNNNN.png`` and ``labels/NNNNN.png``, palette images of Cityscapes' ids; all train.

    An image without a label file is unlabelled.
    """

    name = "gtav"

    def rows(self, folder: Path) -> Iterator[tuple[str, Path, Path | None, Role]]:
        """Yield all images."""
        yield from _beside(folder / "images", folder / "labels")


@register("dataset", "synthia")
class Synthia(Streets):
    """SYNTHIA-RAND-CITYSCAPES: ``RGB/NNNNNNN.png`` and ``GT/LABELS/NNNNNNN.png``, colour images of 16 bits; all train.

    The id of a pixel is in the first channel. It has 16 classes; Cityscapes is to be read with ``classes: 16`` beside it.
    """

    name = "synthia"
    ids = SYNTHIA

    def __init__(self, *, path: str, size: tuple[int, int] | None = None, exclude: tuple[str, ...] = ()) -> None:
        super().__init__(path=path, classes=16, size=size, exclude=exclude)

    def rows(self, folder: Path) -> Iterator[tuple[str, Path, Path | None, Role]]:
        """Yield all images."""
        inner = folder / "RAND_CITYSCAPES"
        folder = inner if inner.is_dir() else folder
        yield from _beside(folder / "RGB", folder / "GT" / "LABELS")

    def stored(self, file: Image.Image, case: Case) -> NDArray[np.uint8]:
        """Return the ids of an opened label file [H, W]."""
        if isinstance(file, ImageFile.ImageFile) and file.tile and file.tile[0][3] == "RGB;16B":
            # the decoder keeps one byte of two: the higher one, unless told that the order is the other one
            file.tile = [(*part[:3], "RGB;16L") for part in file.tile]  # type: ignore[misc]  # named only by later releases
            return np.asarray(_decoded(file, case, "RGB"))[..., 0]
        raise DataError(
            f"case {case.id!r}: {required_label(case)}: is not a colour image of 16 bits per channel, as SYNTHIA's labels are"
        )


def _beside(images: Path, labels: Path) -> Iterator[tuple[str, Path, Path | None, Role]]:
    """Yield training images with the labels of the same name in another folder."""
    known = {path.name for path in labels.glob("*.png")}
    found = sorted(images.glob("*.png"))
    for folder, files in ((images, found), (labels, known)):
        if not files:
            raise DataError(f"{folder}: no .png files; expected {images} and {labels} beside it")
    for image in found:
        yield image.stem, image, labels / image.name if image.name in known else None, "train"


def _opened(path: Path, case: Case) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"case {case.id!r}: {path}: not a readable image ({error})") from error


def _decoded(file: Image.Image, case: Case, mode: str) -> Image.Image:
    try:
        return file.convert(mode) if file.mode != mode else file.copy()
    except (OSError, SyntaxError, ValueError) as error:
        name = getattr(file, "filename", "?")
        raise DataError(f"case {case.id!r}: {name}: the image cannot be decoded ({error})") from error
