"""CelebAMask-HQ: 30,000 faces at 1024 x 1024 with 19 classes, background included.

Upstream draws a mask a part, 512 x 512 and black or white; parts that are not seen have no file.
They are merged in the order of upstream's g_mask.py, where later parts cover earlier ones, and
enlarged to the image's size by the nearest pixel. Images keep their bytes.

The splits are upstream's, g_partition.py: 24,183 train, 2,993 val and 2,824 test images by the
number that an image has in CelebA, with CelebA's own borders. Upstream compares them with numbers
that start at 0 although the borders count from 1; so do we, for the sake of the published counts.
No file of CelebA itself is needed. That the counts come out so could not be checked here, nor which
mode upstream's part files have: any will do.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel

from xattn.data.datasets import _files, _masks
from xattn.errors import DataError, UnknownNameError
from xattn.structures import DatasetInfo, Sample

URL = "https://github.com/switchablenorms/CelebAMask-HQ"
BORDERS = {"train": (0, 162771), "val": (162771, 182638), "test": (182638, 202599)}
"""First number in CelebA, from 0, of a split, and the first after it."""

IMAGES_PER_FOLDER = 2000
LAYOUT = """\
CelebAMask-HQ/
  CelebA-HQ-img/N.jpg                                  N = 0..29999
  CelebAMask-HQ-mask-anno/{0..14}/NNNNN_PART.png       2000 images a folder
  CelebA-HQ-to-CelebA-mapping.txt                      "N NUMBER_IN_CELEBA FILE" a line
"""

COLOURS = {
    "background": (0, 0, 0),
    "skin": (204, 0, 0),
    "nose": (76, 153, 0),
    "eye_g": (204, 204, 0),
    "l_eye": (51, 51, 255),
    "r_eye": (204, 0, 204),
    "l_brow": (0, 255, 255),
    "r_brow": (255, 204, 204),
    "l_ear": (102, 51, 0),
    "r_ear": (255, 0, 0),
    "mouth": (102, 204, 0),
    "u_lip": (255, 255, 0),
    "l_lip": (0, 0, 153),
    "hair": (0, 0, 204),
    "hat": (255, 51, 153),
    "ear_r": (0, 204, 204),
    "neck_l": (0, 51, 0),
    "neck": (255, 153, 51),
    "cloth": (0, 204, 0),
}
"""The classes in the order of their ids, which is the order of merging; eye_g are glasses, ear_r is
an earring, neck_l a necklace."""

CLASS_NAMES = tuple(COLOURS)
_TABLE = _masks.id_table({k: k for k in range(len(CLASS_NAMES))})


class Settings(BaseModel, frozen=True, extra="forbid"):
    """The reader has no knobs."""


def describe(root: Path, settings: Settings) -> DatasetInfo:  # noqa: ARG001 (all is fixed)
    """Describe the data set."""
    return DatasetInfo(
        name="celebamask",
        tasks=("segmentation",),
        class_names=CLASS_NAMES,
        palette=tuple(COLOURS.values()),
        splits=tuple(BORDERS),
        ignore_ids=(),
        licence="non-commercial research and education",
        url=URL,
        citation="Lee et al., MaskGAN: Towards Diverse and Interactive Facial Image Manipulation,"
        " CVPR 2020",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:  # noqa: ARG001
    """List the split's images by number; the target is the folder of the parts and their names.

    Raises:
        DataError: the mapping is missing or odd, or an image or all of its parts are missing.
    """
    _files.check_split(root, split, BORDERS)
    numbers = _numbers(root / "CelebA-HQ-to-CelebA-mapping.txt", *BORDERS[split])
    images = [root / "CelebA-HQ-img" / f"{number}.jpg" for number in numbers]
    _files.refuse_missing([image for image in images if not image.is_file()], "images")
    folders = {n: _mask_folder(root, n) for n in numbers}
    parts = {folder: _list_parts(folder) for folder in dict.fromkeys(folders.values())}
    bare = [folder / f"{n:05}_skin.png" for n, folder in folders.items() if n not in parts[folder]]
    _files.refuse_missing(bare, "masks")
    return [
        _files.Entry(str(n), str(image), _part_files(folders[n], n, parts[folders[n]][n]))
        for n, image in zip(numbers, images, strict=True)
    ]


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:  # noqa: ARG001
    """Read an image and merge the parts of its mask.

    Raises:
        DataError: a file is damaged or does not fit its partner; the message names it.
    """
    image = _files.read_image(Path(entry.image))
    merged = np.zeros((0, 0), np.uint8)
    for file in entry.target:
        path = Path(file)
        class_id = CLASS_NAMES.index(path.stem.partition("_")[2])
        seen = _masks.read_part(path)
        if not merged.size:
            merged = np.zeros(seen.shape, np.uint8)
        height, width = seen.shape
        if seen.shape != merged.shape or width * image.size[1] != height * image.size[0]:
            raise DataError(
                f"mask part {path}: {width} x {height} pixels (width x height), expected the size"
                f" of the other parts and the proportions of its image, {image.size[0]} x"
                f" {image.size[1]}"
            )
        merged[seen] = class_id
    enlarged = np.asarray(Image.fromarray(merged).resize(image.size, Image.Resampling.NEAREST))
    mask = _masks.map_ids(enlarged, Path(entry.target[0]).parent, image.size, _TABLE)
    return Sample(entry.key, image.data, image.format, entry.image, mask)


def _part_files(folder: Path, number: int, parts: Iterable[str]) -> tuple[str, ...]:
    """Return the files of a mask's parts in the order in which they are painted."""
    ordered = sorted(parts, key=CLASS_NAMES.index)
    return tuple(str(folder / f"{number:05}_{part}.png") for part in ordered)


def _numbers(path: Path, first: int, end: int) -> list[int]:
    """Return the images, as listed, whose numbers in CelebA are `first` .. `end` - 1."""
    found = []
    lines = _files.read_list(path)
    for line in lines[1:] if lines[0].startswith("idx") else lines:
        fields = line.split()
        if len(fields) < 2 or not (fields[0].isdecimal() and fields[1].isdecimal()):
            raise DataError(f"{path}: expected 'number number_in_celeba file', found '{line}'")
        if first <= int(fields[1]) < end:
            found.append(int(fields[0]))
    return found


def _mask_folder(root: Path, number: int) -> Path:
    return root / "CelebAMask-HQ-mask-anno" / str(number // IMAGES_PER_FOLDER)


def _list_parts(folder: Path) -> dict[int, list[str]]:
    """Return the parts that each image has a file of, in alphabetical order."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected files NNNNN_PART.png in it")
    found: dict[int, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        match = re.fullmatch(r"(\d{5})_(\w+)\.png", name)
        if match and match[2] not in CLASS_NAMES[1:]:
            raise DataError(f"{folder / name}: {UnknownNameError('part', match[2], CLASS_NAMES)}")
        if match:
            found.setdefault(int(match[1]), []).append(match[2])
    return found
