"""Which file is an image, which is whose label: told from the names in a folder that follows no standard."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from labeleff.data.formats import nifti_files, picture_files
from labeleff.data.manifest import Role
from labeleff.errors import DataError

_LABELS = "labels?|segs?|segmentations?|masks?|gts?|ground_?truths?|annotations?|manual|targets?|contours?"
_IMAGES = "images?|imaging|imgs?|scans?|volumes?|vols?|data|raw|inputs?|pictures?|photos?"
_PART = "tr|va|ts|train|training|val|validation|test"
LABEL_FOLDER = re.compile(rf"(?:({_PART})_?)?(?:{_LABELS})(?:_?({_PART}))?")
IMAGE_FOLDER = re.compile(rf"(?:({_PART})_?)?(?:{_IMAGES})(?:_?({_PART}))?")
_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "va", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
}
_LABEL_NAME = re.compile(rf"(?:(.+)[_\-. ])?(?:{_LABELS})|(?:mask|label|seg|segmentation|gt)[_\-](.+)", re.IGNORECASE)
_IMAGE_NAME = re.compile(
    rf"(?:(.+)[_\-. ])?(?:{_IMAGES})|(?:image|img|volume|vol|scan)[_\-](?=.*\d)(.+)", re.IGNORECASE
)
_SEPARATOR = "_-. "

Key = tuple[tuple[str, ...], str]
"""Folders, without those that only say image or label, and the name without such a word."""


@dataclass(frozen=True)
class Paired:
    """One case of a folder."""

    id: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    role: Role
    group: str = ""
    """The folder that it shares with other cases."""
    masks: tuple[str, ...] = ()
    """The structures that its labels are masks of, one each."""


@dataclass
class Pairing:
    """What a folder holds: its cases, the names of channels and of masks (empty where there is one of each), what is left out."""

    cases: list[Paired] = field(default_factory=list)
    channels: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    path: Path
    key: Key
    is_label: bool
    role: Role | None


def pair(folder: Path) -> Pairing:
    """Return the cases in a folder of NIfTI files, or of pictures.

    A label is known by its folder (``labels``, ``masks``, ``segmentations``, ``gt`` …) or by its name (``…_seg``, ``…_mask``);
    it belongs to the image of the same name. What comes after the name is the channel of an image, or the structure of a mask.

    Raises:
        DataError: There are no images.
    """
    files, found = _read(folder)
    images: dict[Key, _File] = {}
    for file in files:
        if not file.is_label and images.setdefault(file.key, file) is not file:
            other = images[file.key].path.name
            found.left_out.append(f"{file.path.relative_to(folder)}: cannot be told from {other} by its name")
    labels = [file for file in files if file.is_label]
    if not images:
        what = "labels only" if labels else "no NIfTI files, PNG, TIFF or JPEG"
        raise DataError(f"{folder}: {what}; images lie in images/ with labels/ beside it, or as NAME and NAME_label")
    by_name: dict[str, list[Key]] = {}
    for key in images:
        by_name.setdefault(key[1], []).append(key)
    owners = {id(label): _owner(label, images, by_name) for label in labels}
    suffixes = {suffix for label in labels for suffix in owners[id(label)][1]}
    groups = _groups(images, suffixes)
    found.channels = tuple(sorted(suffixes))
    masks: dict[Key, dict[str, _File]] = {}
    for label in labels:
        base, _, mask = owners[id(label)]
        if base is None or base not in groups:
            found.left_out.append(f"{label.path.relative_to(folder)}: a label whose image was not found")
        elif masks.setdefault(base, {}).setdefault(mask, label) is not label:
            other = masks[base][mask].path.name
            found.left_out.append(
                f"{label.path.relative_to(folder)}: a second label beside {other}; raters are named in a recipe"
            )
    _collect(folder, groups, masks, found)
    return found


def volumes_in(folder: Path) -> list[Path]:
    """Return the NIfTI files below a folder that are no labels, as their names and folders tell it, sorted."""
    return [file.path for file in _read(folder)[0] if not file.is_label and nifti_files.is_nifti(file.path)]


def _read(folder: Path) -> tuple[list[_File], Pairing]:
    """Return the files that can be read, and a pairing in which the others are left out."""
    found, other = Pairing(), Counter[str]()
    volumes, pictures = [], []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        if nifti_files.is_nifti(path):
            volumes.append(path)
        elif picture_files.is_picture(path):
            pictures.append(path)
        else:
            other[path.suffix.lower() or path.name] += 1
    if volumes and pictures:
        found.left_out.append(f"{len(pictures)} pictures beside volumes, such as {pictures[0].relative_to(folder)}")
    for suffix, count in sorted(other.items()):
        if suffix not in (".csv", ".json", ".txt", ".md", ".list"):
            found.left_out.append(f"{count} files {suffix}, which are not read")
    return [_file(path, folder) for path in volumes or pictures], found


def _file(path: Path, folder: Path) -> _File:
    *inner, _ = path.relative_to(folder).parts
    stem = nifti_files.stem(path) if nifti_files.is_nifti(path) else path.stem
    kept, is_label, role = [], False, None
    for part in inner:
        word = part.lower().replace("-", "_").replace(" ", "_")
        if word in _ROLES:
            role = _ROLES[word]
            continue
        label = LABEL_FOLDER.fullmatch(word)
        if found := label or IMAGE_FOLDER.fullmatch(word):
            is_label = is_label or label is not None
            role = _ROLES.get(found[1] or found[2] or "", role)
        else:
            kept.append(part)
    if named := _LABEL_NAME.fullmatch(stem):
        is_label, stem = True, named[1] or named[2] or ""
    elif named := _IMAGE_NAME.fullmatch(stem):
        stem = named[1] or named[2] or ""
    return _File(path, ((role or "", *kept), stem), is_label, role)


def _owner(
    label: _File, images: Mapping[Key, _File], by_name: Mapping[str, list[Key]]
) -> tuple[Key | None, tuple[str, ...], str]:
    """Return the case of a label, the endings of its channels, and the structure that it is the mask of."""
    where, stem = label.key
    if label.key in images:
        return label.key, (), ""
    if stem and len(named := by_name.get(stem, [])) == 1:  # in a folder whose name says nothing
        return named[0], (), ""
    endings = tuple(end for (place, name) in images if place == where and (end := _rest(name, stem)) and len(end) <= 12)
    if endings and (stem or len(endings) <= 8):
        return label.key, endings, ""
    for place, name in images:  # labels/NAME/liver
        if where[:-1] == place and name and where[-1] == name:
            return (place, name), (), stem
    longest = max(
        (name for place, name in images if place == where and name and _rest(stem, name)), key=len, default=""
    )
    if longest:  # labels/NAME_liver
        return (where, longest), (), _rest(stem, longest)
    alone = [key for key in images if key[0] == where]
    return (
        (alone[0], (), stem) if len(alone) == 1 and len(where) > 1 else (None, (), "")
    )  # NAME/ct, NAME/segmentations/liver


def _rest(name: str, start: str) -> str:
    """Return what follows a start and a separator, the whole name after an empty start; else nothing."""
    if not start:
        return name
    if name.startswith(start) and len(name) > len(start) + 1 and name[len(start)] in _SEPARATOR:
        return name[len(start) + 1 :]
    return ""


def _groups(images: Mapping[Key, _File], suffixes: set[str]) -> dict[Key, dict[str, _File]]:
    """Return the channel files of every case by their endings."""
    numbered = {name[-4:] for _, name in images if re.search(r"_\d{4}$", name)}
    all_numbered = all(re.search(r"_\d{4}$", name) for _, name in images) and len(numbered) < len(images)
    if not suffixes and all_numbered and numbered == {f"{i:04d}" for i in range(len(numbered))}:
        suffixes |= numbered
    groups: dict[Key, dict[str, _File]] = {}
    for (place, name), file in images.items():
        ending = max(
            (s for s in suffixes if name == s or any(name.endswith(c + s) for c in _SEPARATOR)), key=len, default=""
        )
        base = name[: len(name) - len(ending)].rstrip(_SEPARATOR) if ending else name
        groups.setdefault((place, base), {})[ending] = file
    return groups


def _collect(
    folder: Path, groups: Mapping[Key, dict[str, _File]], masks: Mapping[Key, dict[str, _File]], found: Pairing
) -> None:
    """Fill in the cases, leaving out those that lack a channel."""
    named = sorted({name for own in masks.values() for name in own if name})
    found.masks = tuple(named)
    names = _names(groups)
    shared = Counter(place for place, _ in groups)
    for key, files in groups.items():
        order = found.channels or tuple(files)
        if set(files) != set(order):
            missing = sorted(set(order) - set(files)) or sorted(set(files) - set(order))
            found.left_out.append(
                f"case {names[key]}: has not the channels of the others ({', '.join(map(str, missing))})"
            )
            continue
        own = masks.get(key, {})
        if named and "" in own:
            found.left_out.append(f"{own.pop('').path.relative_to(folder)}: a label beside masks of single structures")
        order_of_masks = sorted(own)
        labels = tuple(own[name].path for name in order_of_masks)
        role = next(iter(files.values())).role or "train"
        group = "_".join(part for part in key[0][1:]) if shared[key[0]] > 1 else ""
        found.cases.append(
            Paired(
                names[key],
                tuple(files[c].path for c in order),
                labels,
                role,
                group,
                tuple(order_of_masks) if named else (),
            )
        )


def _names(groups: Iterable[Key]) -> dict[Key, str]:
    """Return a name for every case: folders and file, without repetition; with its role where two would be called the same."""
    keys = list(groups)

    def name(key: Key, *, role: bool = False) -> str:
        (place, *inner), stem = key
        parts = [
            *([place] if role and place else []),
            *(p for p in inner if not stem.startswith(p)),
            *([stem] if stem else []),
        ]
        return re.sub(r"[/\\\s]+", "_", "_".join(parts)).lstrip(".") or "case"

    count = Counter(name(key) for key in keys)
    return {key: name(key, role=count[name(key)] > 1) for key in keys}
