"""Cityscapes with fine labels and 19 classes, images of 2048 x 1024.

2,975 images to train, 500 to validate, 1,525 to test. The files hold label ids 0..33; the 19 that
are scored become train ids here (upstream's table, cityscapesScripts labels.py), all others 255.
Licence plates, -1 in that table, are not drawn in the label files. The test labels are secret:
upstream's files for them hold void alone, so that split is listed only where they lie, and scores
nothing.
"""

from pathlib import Path

from pydantic import BaseModel

from xattn.data.datasets import _files, _masks
from xattn.structures import IGNORE_INDEX, DatasetInfo, Sample

URL = "https://www.cityscapes-dataset.com"
SPLITS = ("train", "val", "test")
LABEL_IDS = range(34)
IMAGE_END, MASK_END = "_leftImg8bit.png", "_gtFine_labelIds.png"
LAYOUT = """\
cityscapes/
  leftImg8bit/{train,val,test}/CITY/NAME_leftImg8bit.png
  gtFine/{train,val,test}/CITY/NAME_gtFine_labelIds.png   label ids 0..33
"""

CLASSES = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
"""Label id and colour of each class, in the order of the train ids."""

_TABLE = _masks.id_table(
    dict.fromkeys(LABEL_IDS, IGNORE_INDEX)
    | {label_id: k for k, (label_id, _) in enumerate(CLASSES.values())}
)


class Settings(BaseModel, frozen=True, extra="forbid"):
    """The reader has no knobs."""


def describe(root: Path, settings: Settings) -> DatasetInfo:  # noqa: ARG001
    """Describe the data set; the test split is listed if it has label files."""
    has_test = any((root / "gtFine" / "test").glob(f"*/*{MASK_END}"))
    return DatasetInfo(
        name="cityscapes",
        tasks=("segmentation",),
        class_names=tuple(CLASSES),
        palette=tuple(colour for _, colour in CLASSES.values()),
        splits=SPLITS if has_test else SPLITS[:2],
        ignore_ids=(IGNORE_INDEX,),
        licence="non-commercial research and teaching, after registration",
        url=URL,
        citation="Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding,"
        " CVPR 2016",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:
    """List the split's images by city and name; the target is the mask.

    Raises:
        DataError: a folder is missing or empty, or a file has no partner.
    """
    _files.check_split(root, split, describe(root, settings).splits)
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    return _files.pair_files(images, IMAGE_END, masks, MASK_END)


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:  # noqa: ARG001
    """Read an image and its mask.

    Raises:
        DataError: a file is damaged or does not fit its partner; the message names it.
    """
    return _masks.read_mapped(entry, _TABLE)
