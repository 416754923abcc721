"""COCO-Stuff, things and stuff together: the 10K or the 164K release, with 171 or 182 classes.

10k    v1.1 of 2017: 9,000 train and 1,000 test images; MATLAB masks with 0 unlabelled and the ids
       1..182 of the official labels.txt. (v1.0 of 2016 numbers them otherwise: not supported.)
164k   COCO 2017: 118,287 train and 5,000 val images; PNG masks ("stuffthingmaps") with those ids
       minus one, 0..181, and 255 unlabelled.

Eleven of the 91 COCO things were never drawn. Most papers count the other 171 classes, compacted in
their order; with 182 the ids keep their gaps. Unlabelled pixels are stored as 255. That the eleven
occur in no file is upstream's word (README of nightrome/cocostuff): a file that has one is refused
with 171 classes. The colours are PASCAL VOC's map; upstream names no colours.
"""

import functools
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from xattn.data.datasets import _files, _masks
from xattn.structures import IGNORE_INDEX, DatasetInfo, Sample

URL = "https://github.com/nightrome/cocostuff"
SPLITS = {"10k": ("train", "test"), "164k": ("train", "val")}
LAYOUT = """\
cocostuff-10k-v1.1/                            or, with version 164k:
  images/NAME.jpg                              coco/
  annotations/NAME.mat     S: 0..182             images/{train,val}2017/NAME.jpg
  imageLists/{train,test}.txt   NAME a line      annotations/{train,val}2017/NAME.png   0..181, 255

The 164K images may also lie in {train,val}2017, its masks in stuffthingmaps/{train,val}2017.
"""

LABELS = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
    elephant, bear, zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie,
    suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
    skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon,
    bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
    couch, potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse,
    remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush, banner, blanket,
    branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
    ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
    door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower,
    fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves,
    light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
    plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
    salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick,
    wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other,
    waterdrops, window-blind, window-other, wood
"""
NAMES = tuple(" ".join(name.split()) for name in LABELS.split(","))
NEVER_DRAWN = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
"""Ids, from 1, of the things without any mask: street sign, hat, shoe, eye glasses, plate, ..."""


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the reader.

    Args:
        version: which release lies in the folder.
        classes: 171 without the things that were never drawn, or all 182.
    """

    version: Literal["10k", "164k"] = "164k"
    classes: Literal[171, 182] = 171


def describe(root: Path, settings: Settings) -> DatasetInfo:  # noqa: ARG001 (all is fixed)
    """Describe the data set."""
    ids = _label_ids(settings)
    return DatasetInfo(
        name="cocostuff",
        tasks=("segmentation",),
        class_names=tuple(NAMES[i - 1] for i in ids),
        palette=_files.palette(len(ids), first=1),
        splits=SPLITS[settings.version],
        ignore_ids=(IGNORE_INDEX,),
        licence="photographs under Flickr's terms of use; annotations CC BY 4.0",
        url=URL,
        citation="Caesar, Uijlings, Ferrari, COCO-Stuff: Thing and Stuff Classes in Context, CVPR"
        " 2018",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:
    """List the split's images, in the order of its list (10k) or by name; the target is the mask.

    Raises:
        DataError: the list, a folder or a file is missing.
    """
    _files.check_split(root, split, SPLITS[settings.version])
    if settings.version == "164k":
        year = f"{split}2017"
        images = _files.find_folder([root / "images" / year, root / year])
        masks = _files.find_folder(
            [root / folder / year for folder in ("annotations", "stuffthingmaps")]
        )
        # mmsegmentation's converter leaves its own masks beside the official ones
        return _files.pair_files(images, ".jpg", masks, ".png", skip_end="_labelTrainIds.png")
    names = _files.read_list(root / "imageLists" / f"{split}.txt")
    return _files.pair_listed(names, root / "images", ".jpg", root / "annotations", ".mat")


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:  # noqa: ARG001
    """Read an image and its mask.

    Raises:
        DataError: a file is damaged or does not fit its partner; the message names it.
    """
    return _masks.read_mapped(entry, _table(settings), "S")


def _label_ids(settings: Settings) -> list[int]:
    """Return the ids, from 1, of the classes in their order."""
    ids = range(1, len(NAMES) + 1)
    return [i for i in ids if settings.classes == len(NAMES) or i not in NEVER_DRAWN]


@functools.cache
def _table(settings: Settings) -> NDArray[np.int16]:
    classes = {i: k for k, i in enumerate(_label_ids(settings))}
    if settings.version == "10k":
        return _masks.id_table({0: IGNORE_INDEX} | classes)
    return _masks.id_table({IGNORE_INDEX: IGNORE_INDEX} | {i - 1: k for i, k in classes.items()})
