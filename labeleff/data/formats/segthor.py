"""SegTHOR, organs at risk in CT of the thorax: the challenge of 2019."""

from __future__ import annotations

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.volumes import Challenge, numbered
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError
from labeleff.registry import register

CLASSES = ("background", "oesophagus", "heart", "trachea", "aorta")
TRAIN = (*range(1, 8), 9, 10, *range(11, 21), 22, 24, 25, 26, 28, 30, 31, 33, 36, 38, 39, 40)
VALIDATION = (21, 23, 29, 37)
TEST = (8, 27, 32, 34, 35)
"""Patients as the README of ADELE's authors has them (CVPR 2022), but for patient 27, whom it lists for both of the last two."""


@register("dataset", "segthor")
class SegThor(Challenge):
    """SegTHOR as distributed: ``Patient_NN/Patient_NN.nii.gz`` with ``GT.nii.gz`` beside it, in ``train/`` or anywhere else.

    Labels: 1 oesophagus, 2 heart, 3 trachea, 4 aorta. The 40 labelled patients are divided as ADELE's authors did at random: 31 to
    train, 4 to validate, 5 to test. Patient 27, whom they list for validation and test, is for the test alone. The challenge's
    own test volumes (``Patient_41.nii.gz`` to ``Patient_60.nii.gz``) have no public labels.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        unlabelled_tests: Learn from the challenge's test volumes, unlabelled; else they are left out.
    """

    def rows(self) -> Manifest:
        """Return one row per patient; headers are read, voxels are not.

        Raises:
            DataError: There are no volumes, or a labelled patient lacks its label.
        """
        folder = data_folder(self.path)
        images = numbered(folder, r"Patient_(\d\d)")
        if not images:
            raise DataError(f"{folder}: no volumes; expected Patient_NN/Patient_NN.nii.gz with GT.nii.gz beside it")
        cases, bare = [], []
        for number, image in images.items():
            name, label = f"Patient_{number:02d}", image.with_name(f"GT{image.name[len('Patient_00') :]}")
            role: Role = "test" if number in TEST else "validation" if number in VALIDATION else "train"
            if number > 40:
                bare.append(Case(name, name, (Source(image),)))
            elif not label.is_file():
                raise DataError(f"case {name!r}: {label}: the label is missing beside the image")
            else:
                cases.append(Case(name, name, (Source(image),), Source(label), "", role))
        return self.challenge("segthor", CLASSES, cases, bare, (f"Patient_{number:02d}" for number in TRAIN))
