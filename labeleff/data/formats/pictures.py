"""A folder of 2-D images: ``images/NAME.png`` and ``labels/NAME.png``; TIFF, JPEG and BMP too."""

from __future__ import annotations

from pathlib import Path

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.files import FileSet, listed_tests, patient_expression, patient_of, visible, with_headers
from labeleff.data.formats.picture_files import SUFFIXES, is_picture
from labeleff.data.manifest import Case, Manifest, Source
from labeleff.errors import DataError
from labeleff.registry import register


@register("dataset", "pictures")
class Pictures(FileSet):
    """Pictures in ``images/``, labels of the same name in ``labels/``; PNG, TIFF, JPEG (images only), BMP. No label: unlabelled.

    Grey or colour is told from the files; where both occur, grey becomes colour. A label holds one whole number per pixel. The
    patient of a case is found in ``patients.csv`` (columns case, patient) where there is one, else in the name. Spacing is not
    known.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        classes: Names, background first.
        values: Stored value of each class, in order, such as 0 and 255; default: 0, 1, 2 and so on.
        ignore: Stored value of pixels that nobody has labelled; 255 too, where no class has it.
        labels: Folder of the labels, relative to the folder.
        test_list: File with the names of the test cases, relative to the folder; one per line.
        patient_pattern: Regular expression whose first group is the patient in a case's name; default: the whole name.
    """

    def __init__(
        self,
        *,
        path: str,
        classes: tuple[str, ...] = ("background", "foreground"),
        values: tuple[int, ...] = (),
        ignore: int | None = None,
        labels: str = "labels",
        test_list: str = "test.list",
        patient_pattern: str = "(.*)",
    ) -> None:
        super().__init__()
        if len(classes) < 2:
            raise ValueError("classes needs at least background and one more name")
        if values and (len(values) != len(classes) or len(set(values)) < len(values)):
            raise ValueError(
                f"values is {list(values)}; give each of the {len(classes)} classes a stored value of its own"
            )
        stored = values or tuple(range(len(classes)))
        if ignore in stored:
            raise ValueError(f"ignore is {ignore}, which is the value of a class")
        pairs = [
            *((value, index) for index, value in enumerate(stored)),
            *(((ignore, 255),) if ignore is not None else ()),
        ]
        if 255 not in dict(pairs):
            pairs.append((255, 255))
        self.values = tuple(pairs)
        self.pattern = patient_expression(patient_pattern)
        self.path, self.classes, self.labels, self.test_list = path, tuple(classes), labels, test_list

    def rows(self) -> Manifest:
        """Return one row per picture in ``images/``; headers are read, pixels are not.

        Raises:
            DataError: There are no images, a listed case is missing, or a label has no image.
        """
        folder = data_folder(self.path)
        images, labels = named(folder / "images"), named(folder / self.labels)
        if not images:
            raise DataError(f"{folder / 'images'}: no pictures ({', '.join(SUFFIXES)})")
        for name in sorted(labels.keys() - images.keys()):
            raise DataError(f"{labels[name]}: a label without an image of the same name in {folder / 'images'}")
        test = listed_tests(folder / self.test_list, images)
        patient = patient_of(folder, self.pattern)
        cases = [
            Case(
                name,
                patient(name),
                (Source(path),),
                Source(labels[name], values=self.values) if name in labels else None,
                "",
                "test" if name in test else "train",
            )
            for name, path in images.items()
        ]
        rows, channels = with_headers(cases, axes=2, where=str(folder))
        return Manifest(folder.name, rows, self.classes, 2, channels)


def named(folder: Path) -> dict[str, Path]:
    """Return the pictures of a folder by their names without suffix.

    Raises:
        DataError: Two differ in the suffix only.
    """
    found: dict[str, Path] = {}
    for path in visible(folder):
        if is_picture(path) and found.setdefault(path.stem, path) != path:
            raise DataError(f"{path}: {found[path.stem].name} is beside it; every picture needs a name of its own")
    return found
