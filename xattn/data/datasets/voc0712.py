"""PASCAL VOC 07+12, the usual detection set: train with trainval of both years, test on 2007.

16,551 training and 4,952 test images with boxes of VOC's 20 classes. A key is YEAR_NAME. Files,
boxes and flags are those of the reader `voc`, which each year's folder is read with.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from xattn.data.datasets import _files, voc
from xattn.structures import DatasetInfo, Sample

URL = voc.URL
PARTS = {
    "train": (("2007", "trainval"), ("2012", "trainval")),
    "test": (("2007", "test"),),
}
LAYOUT = """\
VOCdevkit/
  VOC2007/ImageSets/Main/{trainval,test}.txt      both archives of 2007 in one folder
  VOC2012/ImageSets/Main/trainval.txt
  VOC{2007,2012}/JPEGImages/NAME.jpg
  VOC{2007,2012}/Annotations/NAME.xml
"""


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the reader.

    Args:
        degenerate: what a box of one pixel or none does: `fail` names it, `drop` leaves it out.
    """

    degenerate: Literal["fail", "drop"] = "fail"


def describe(root: Path, settings: Settings) -> DatasetInfo:
    """Describe the data set; opens no file."""
    info = voc.describe(root, _voc_settings(settings))
    return replace(info, name="voc0712", splits=tuple(PARTS), layout=LAYOUT)


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:
    """List the split's samples year by year in the order of their lists.

    Raises:
        DataError: a list or a file that it names is missing.
    """
    _files.check_split(root, split, PARTS)
    lists = [root / f"VOC{year}/ImageSets/Main/{part}.txt" for year, part in PARTS[split]]
    _files.refuse_missing([path for path in lists if not path.is_file()], "split lists")
    return [
        replace(entry, key=f"{year}_{entry.key}")
        for year, part in PARTS[split]
        for entry in voc.entries(root / f"VOC{year}", part, _voc_settings(settings))
    ]


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:
    """Read an image and its boxes as `voc` does.

    Raises:
        DataError: a file is damaged or contradicts another; the message names it.
    """
    return voc.read(entry, info, _voc_settings(settings))


def _voc_settings(settings: Settings) -> voc.Settings:
    return voc.Settings(task="detection", degenerate=settings.degenerate)
