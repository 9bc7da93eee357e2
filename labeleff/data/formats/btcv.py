"""BTCV, thirteen organs in abdominal CT: Beyond the Cranial Vault, the challenge of 2015."""

from __future__ import annotations

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.volumes import Challenge, numbered
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError
from labeleff.registry import register

CLASSES = (
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip
TRAIN = (*range(1, 11), *range(21, 35))
TEST = tuple(range(35, 41))
"""The 24 and 6 of ``dataset_0.json``, which MONAI's tutorials and VoCo's authors use. There the 6 are called validation."""


@register("dataset", "btcv")
class Btcv(Challenge):
    """BTCV as distributed: ``imgNNNN.nii.gz`` and ``labelNNNN.nii.gz``, anywhere below the folder.

    So ``RawData/Training/img``, ``RawData/Training/label`` and ``RawData/Testing/img`` as unpacked, or ``imagesTr``, ``labelsTr``
    and ``imagesTs`` as MONAI has them. Of the 30 labelled volumes 24 are to train and 6 (0035 to 0040) to test: the split of
    ``dataset_0.json``, on whose 6 cases VoCo's figures are, chosen there and measured there. The challenge's own 20 test volumes
    (0061 to 0080) have no public labels.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        unlabelled_tests: Learn from the challenge's test volumes, unlabelled; else they are left out.
    """

    def rows(self) -> Manifest:
        """Return one row per volume; headers are read, voxels are not.

        Raises:
            DataError: There are no volumes, or one of the 30 lacks its label.
        """
        folder = data_folder(self.path)
        images, labels = numbered(folder, r"img(\d{4})"), numbered(folder, r"label(\d{4})")
        if not images:
            raise DataError(f"{folder}: no volumes; expected imgNNNN.nii.gz and labelNNNN.nii.gz in folders below it")
        cases, bare = [], []
        for number, image in images.items():
            name = f"img{number:04d}"
            if number in (*TRAIN, *TEST):
                if number not in labels:
                    raise DataError(f"case {name!r}: there is no label{number:04d}.nii.gz below {folder}")
                role: Role = "test" if number in TEST else "train"
                cases.append(Case(name, name, (Source(image),), Source(labels[number]), "", role))
            else:
                bare.append(Case(name, name, (Source(image),)))
        return self.challenge("btcv", CLASSES, cases, bare, (f"img{number:04d}" for number in TRAIN))
