"""PASCAL-Context: VOC 2010 images with every pixel labelled, 59 classes or 60 with background.

Two sources of labels, looked for in this order:

PNG     SegmentationClassContext with ids 0 background, 1..59 in `CLASSES`' alphabetical order, as
        mmsegmentation's converter writes them: 4,996 train and 5,104 val images. (Files in another
        order, as upstream's 59_context_labels, cannot be told apart: do not rename them to it.)
MATLAB  the official trainval/NAME.mat with ids of 459 classes, matched to the 59 by the names in
        the official labels.txt; all others are background. Without the converter's lists VOC's own
        serve, which have two train images and one val image more.

With 59 classes the background is stored as 255. That both sources give the same masks could not be
checked here on real files. The colours are PASCAL VOC's map.
"""

import functools
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from xattn.data.datasets import _files, _masks
from xattn.errors import DataError
from xattn.structures import IGNORE_INDEX, DatasetInfo, Sample

URL = "https://cs.stanford.edu/~roozbeh/pascal-context/"
SPLITS = ("train", "val")
LAYOUT = """\
VOC2010/
  JPEGImages/NAME.jpg
  ImageSets/SegmentationContext/{train,val}.txt   NAME a line; without it ImageSets/Main/...
  SegmentationClassContext/NAME.png               0 background, 1..59; or instead of it:
  trainval/NAME.mat                               LabelMap: 1..459
  labels.txt                                      "22: bench" a line
"""

CLASSES = """
    aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus,
    cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor,
    flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate,
    platform, pottedplant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table,
    track, train, tree, truck, tvmonitor, wall, water, window, wood
"""
NAMES = ("background", *(name.strip() for name in CLASSES.split(",")))
"""The names at the ids of the PNG masks."""


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the reader.

    Args:
        classes: 60 with the background as class 0, or 59 without it.
    """

    classes: Literal[59, 60] = 60


def describe(root: Path, settings: Settings) -> DatasetInfo:  # noqa: ARG001 (all is fixed)
    """Describe the data set."""
    first = len(NAMES) - settings.classes
    return DatasetInfo(
        name="pascal_context",
        tasks=("segmentation",),
        class_names=NAMES[first:],
        palette=_files.palette(settings.classes, first=first),
        splits=SPLITS,
        ignore_ids=(IGNORE_INDEX,),
        licence="photographs under Flickr's terms of use; annotations free for research",
        url=URL,
        citation="Mottaghi et al., The Role of Context for Object Detection and Semantic"
        " Segmentation in the Wild, CVPR 2014",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:  # noqa: ARG001
    """List the split's samples in the order of its list; the target is the PNG or MATLAB file.

    Raises:
        DataError: the list, or a file that it names, is missing.
    """
    _files.check_split(root, split, SPLITS)
    folder, end = root / "SegmentationClassContext", ".png"
    if not folder.is_dir() and (root / "trainval").is_dir():
        folder, end = root / "trainval", ".mat"
        _files.find_file([root / "labels.txt"], "list of the 459 class names")
    lists = (root / "ImageSets" / kind / f"{split}.txt" for kind in ("SegmentationContext", "Main"))
    names = _files.read_list(_files.find_file(lists, f"list of the split '{split}'"))
    return _files.pair_listed(names, root / "JPEGImages", ".jpg", folder, end)


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:  # noqa: ARG001
    """Read an image and its mask.

    Raises:
        DataError: a file is damaged or does not fit its partner; the message names it.
    """
    path = Path(entry.target)
    labels = path.parent.parent / "labels.txt" if path.suffix == ".mat" else None
    return _masks.read_mapped(entry, _table(settings, labels), "LabelMap")


@functools.cache
def _table(settings: Settings, labels: Path | None) -> NDArray[np.int16]:
    """Return the lookup table of the PNG masks, or of the MATLAB files with the list `labels`."""
    first = len(NAMES) - settings.classes
    classes = {i: i - first if i >= first else IGNORE_INDEX for i in range(len(NAMES))}
    if labels is None:
        return _masks.id_table(classes)
    ids = _read_labels(labels)
    others = dict.fromkeys([0, *ids.values()], classes[0])
    return _masks.id_table(others | {ids[NAMES[i]]: classes[i] for i in range(1, len(NAMES))})


def _read_labels(path: Path) -> dict[str, int]:
    """Return the ids of the 459 names."""
    ids = {}
    for line in _files.read_list(path):
        number, _, name = line.partition(":")
        if not number.strip().isdecimal() or int(number) > 65535:
            raise DataError(f"{path}: expected 'number: name', found '{line}'")
        ids[name.strip()] = int(number)
    missing = [name for name in NAMES[1:] if name not in ids]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of the 59 class names are not in it: {', '.join(missing[:10])}"
        )
    return ids
