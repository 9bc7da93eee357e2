"""Folders in the layouts that people have, generated small."""

import json
import zlib

import h5py
import nibabel as nib
import numpy as np
from PIL import Image

SHAPE = (5, 6, 7)


def rotation(x, y, z):
    """Return a rotation [3, 3] by angles about the three axes, degrees."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.radians([x, y, z])):
        one, two = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[one, one] = turn[two, two] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        turned = turn @ turned
    return turned


def affine(matrix, origin=(10.0, -20.0, 30.0)):
    found = np.eye(4)
    found[:3, :3], found[:3, 3] = matrix, origin
    return found


AFFINES = {
    "plain": affine(np.diag([1.0, 1.0, 1.0])),
    "anisotropic": affine(np.diag([0.625, 0.625, 8.0])),
    "flipped": affine(np.diag([-0.7, -0.7, 3.0])),
    "left-handed": affine(np.diag([-2.0, 1.5, 3.0])),
    "permuted": affine(np.array([[0, 0, 3.0], [-1.25, 0, 0], [0, 0.5, 0]])),
    "oblique": affine(rotation(17, -11, 23) @ np.diag([0.9, 0.9, 5.0])),
    "oblique, left-handed": affine(rotation(-30, 12, 8) @ np.diag([0.8, -1.1, 2.5])),
}


def volume(number=0, classes=3, shape=SHAPE, dtype=np.int16):
    random = np.random.default_rng(number)
    return random.integers(0, 200, shape).astype(dtype), random.integers(0, classes, shape).astype(np.uint8)


def save(path, array, matrix=AFFINES["plain"]):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, matrix), path)
    return path


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def nnunet(folder, *, channels=2, cases=("la_003", "la_001", "la_002"), matrix=AFFINES["plain"], **more):
    for number, name in enumerate(cases):
        for channel in range(channels):
            save(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz", volume(10 * number + channel)[0], matrix)
        save(folder / "labelsTr" / f"{name}.nii.gz", volume(10 * number)[1], matrix)
    spec = {
        "channel_names": {str(c): name for c, name in enumerate(["T2", "ADC", "DWI"][:channels])},
        "labels": {"background": 0, "PZ": 1, "ignore": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(spec | more))
    return folder


def decathlon(folder, *, channels=2, cases=("b_2", "b_1"), tests=("b_3",), matrix=AFFINES["plain"], **more):
    for number, name in enumerate((*cases, *tests)):
        images = [volume(10 * number + channel)[0] for channel in range(channels)]
        part = "Tr" if name in cases else "Ts"
        image = np.stack(images, axis=-1) if channels > 1 else images[0]
        save(folder / f"images{part}" / f"{name}.nii.gz", image, matrix)
        if name in cases:
            save(folder / "labelsTr" / f"{name}.nii.gz", volume(10 * number)[1], matrix)
        (folder / f"images{part}" / f"._{name}.nii.gz").write_bytes(b"left behind by another system")
    spec = {
        "name": "Prostate",
        "tensorImageSize": "4D" if channels > 1 else "3D",
        "modality": {str(c): "MRI" for c in range(channels)},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in cases],
        "test": [f"./imagesTs/{n}.nii.gz" for n in tests],
    }
    (folder / "dataset.json").write_text(json.dumps(spec | more))
    return folder


def acdc(
    folder,
    *,
    patients=(("training", 99), ("training", 28), ("training", 11), ("testing", 101)),
    matrix=AFFINES["plain"],
):
    for part, number in patients:
        place = folder / part / f"patient{number:03d}"
        for frame in (1, 12):
            image, label = volume(100 * number + frame, 4)
            save(place / f"patient{number:03d}_frame{frame:02d}.nii.gz", image, matrix)
            save(place / f"patient{number:03d}_frame{frame:02d}_gt.nii.gz", label, matrix)
        save(place / f"patient{number:03d}_4d.nii.gz", np.zeros((*SHAPE, 3), np.int16), matrix)
        (place / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
    return folder


def named(name):
    """Return the number of the volume that a name stands for."""
    return zlib.crc32(name.encode())


def acdc_h5(folder):
    (folder / "data" / "slices").mkdir(parents=True)
    lists = {"train": ("patient099", "patient038"), "val": ("patient028",), "test": ("patient011",)}
    for part, patients in lists.items():
        names = [f"{patient}_frame{frame:02d}" for patient in patients for frame in (1, 2)]
        (folder / f"{part}.list").write_text("\n".join(names) + "\n")
        for name in names:
            image, label = volume(named(name), 4)
            with h5py.File(folder / "data" / f"{name}.h5", "w") as file:
                file["image"], file["label"] = image.astype(np.float32) / 200, label
                file["scribble"] = np.where(np.indices(SHAPE).sum(0) % 3, 4, label).astype(np.uint8)
    return folder


def left_atrium_h5(folder):
    for number, name in enumerate(("A1", "B2", "C3")):
        image, label = volume(number, 2)
        (folder / name).mkdir(parents=True)
        with h5py.File(folder / name / "mri_norm2.h5", "w") as file:
            file["image"], file["label"] = image.astype(np.float32) / 200, label
    (folder / "train.list").write_text("A1\nB2\n")
    (folder / "test.list").write_text("C3\n")
    return folder


def compact(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("A1", "B2", "C3")):
        image, label = volume(number, 2, dtype=np.uint8)
        np.savez(folder / f"{name}.npz", image=image, label=label)
    (folder / "train.list").write_text("A1\nB2\n")
    (folder / "test.list").write_text("C3\n")
    return folder


def nifti(folder, *, names=("a", "b", "c"), matrix=AFFINES["plain"]):
    for number, name in enumerate(names):
        save(folder / "images" / f"{name}.nii.gz", volume(number)[0], matrix)
        save(folder / "labels" / f"{name}.nii.gz", volume(number)[1], matrix)
    return folder


def pictures(folder, *, names=("a", "b", "c"), size=(9, 8)):
    for number, name in enumerate(names):
        image, label = volume(number, 3, (*size, 1), np.uint8)
        picture(folder / "images" / f"{name}.png", image[..., 0])
        picture(folder / "labels" / f"{name}.png", label[..., 0])
    return folder


def segthor(folder, *, patients=(1, 40, 21, 27, 8), tests=(41,), matrix=AFFINES["plain"]):
    for number in patients:
        place = folder / "train" / f"Patient_{number:02d}"
        save(place / f"Patient_{number:02d}.nii.gz", volume(number)[0], matrix)
        save(place / "GT.nii.gz", volume(number, 5)[1], matrix)
    for number in tests:
        save(folder / "test" / f"Patient_{number:02d}.nii.gz", volume(number)[0], matrix)
    return folder


def btcv(folder, *, numbers=(1, 34, 35), tests=(61,), matrix=AFFINES["plain"]):
    for number in (*numbers, *tests):
        part = folder / "RawData" / ("Testing" if number in tests else "Training")
        save(part / "img" / f"img{number:04d}.nii.gz", volume(number)[0], matrix)
        if number in numbers:
            save(part / "label" / f"label{number:04d}.nii.gz", volume(number, 14)[1], matrix)
    return folder


def nih_pancreas(folder, *, numbers=(1, 2, 25, 63, 64, 82), matrix=AFFINES["plain"], label_matrix=None):
    for number in numbers:
        save(folder / "data" / f"PANCREAS_{number:04d}.nii.gz", volume(number)[0], matrix)
    for number in (*numbers, 70):  # of the cases that were taken back, the labels stayed
        place = folder / "TCIA_pancreas_labels-02-05-2017" / f"label{number:04d}.nii.gz"
        save(place, volume(number, 2)[1], matrix if label_matrix is None else label_matrix)
    return folder


def prostate(folder, *, sites=("RUNMC", "BMC"), matrix=AFFINES["plain"]):
    for site in sites:
        for number in range(3):
            save(folder / site / f"Case{number:02d}.nii.gz", volume(number)[0], matrix)
            save(folder / site / f"Case{number:02d}_segmentation.nii.gz", volume(number, 3)[1], matrix)
    return folder


def mmwhs(folder, *, matrix=AFFINES["plain"]):
    values = np.array([0, 205, 420, 500, 550, 600, 820, 850], np.int16)
    for domain in ("ct", "mr"):
        for number in (1001, 1002):
            name = f"{domain}_train_{number}"
            save(folder / f"{domain}_train" / f"{name}_image.nii.gz", volume(number)[0], matrix)
            save(folder / f"{domain}_train" / f"{name}_label.nii.gz", values[volume(number, 8)[1]], matrix)
    return folder


def ivdm3seg(folder, *, matrix=AFFINES["plain"]):
    for number in ("01", "02"):
        for contrast in ("wat", "inn", "opp", "fat"):
            save(folder / number / f"{number}_{contrast}.nii", volume(int(number))[0], matrix)
        save(folder / number / f"{number}_Labels.nii", volume(int(number), 2)[1], matrix)
    return folder


def prect(folder, *, matrix=AFFINES["plain"]):
    """Four public sets as they come: with labels beside, in folders, or none."""
    btcv(folder / "BTCV", matrix=matrix)
    save(folder / "Totalsegmentator_dataset" / "s0001" / "ct.nii.gz", volume(71)[0], matrix)
    save(folder / "Totalsegmentator_dataset" / "s0001" / "segmentations" / "liver.nii.gz", volume(71, 2)[1], matrix)
    save(folder / "stoic21" / "data" / "17.nii.gz", volume(72)[0], matrix)
    save(folder / "perfusion" / "one.nii.gz", np.zeros((*SHAPE, 4), np.int16), matrix)
    return folder


def streets(folder):
    """Cityscapes' layout: colour images and labels that hold its ids, two of each part."""
    random = np.random.default_rng(0)
    for part, names in (("train", ("a_000000_000019", "a_000001_000019")), ("val", ("b_000000_000019",))):
        for name in names:
            place = f"{part}/{name[0]}/{name}"
            picture(folder / "leftImg8bit" / f"{place}_leftImg8bit.png", random.integers(0, 256, (12, 16, 3), np.uint8))
            picture(folder / "gtFine" / f"{place}_gtFine_labelIds.png", random.integers(0, 34, (12, 16), np.uint8))
    return folder
