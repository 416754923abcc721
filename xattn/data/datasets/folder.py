"""Classification from folders: one folder a split, in it one folder a class.

Classes are the folders of the train split in alphabetical order (of code points, so that no locale
can change the ids). Another split may lack a class but not add one. Files without an image suffix
are passed over. A sample's key is CLASS_NAME, because different classes often use the same names.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from xattn.data.datasets import _files
from xattn.errors import DataError, UnknownNameError
from xattn.structures import DatasetInfo, Sample

URL = ""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
USUAL_SPLITS = ("train", "val", "test")
LAYOUT = """\
root/
  train/CLASS/*.{jpg,jpeg,png}
  val/CLASS/*.{jpg,jpeg,png}
  test/CLASS/*.{jpg,jpeg,png}     any number of further splits
"""


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the reader.

    Args:
        task: what the folders mean.
    """

    task: Literal["classification"] = "classification"


def describe(root: Path, settings: Settings) -> DatasetInfo:
    """Describe the data set from the names of its folders.

    Raises:
        DataError: there is no train split or it has no class.
    """
    splits = _subfolders(root)
    usual = [split for split in USUAL_SPLITS if split in splits]
    if "train" not in usual:
        raise DataError(f"{root}: no folder 'train' in it; expected train/CLASS/*.jpg")
    names = _subfolders(root / "train")
    if not names:
        raise DataError(f"{root / 'train'}: no class folder in it; expected train/CLASS/*.jpg")
    return DatasetInfo(
        name="folder",
        tasks=(settings.task,),
        class_names=tuple(names),
        palette=_files.palette(len(names), first=1),
        splits=(*usual, *(split for split in splits if split not in usual)),
        ignore_ids=(),
        licence="the owner's",
        url=URL,
        citation="",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:
    """List a split's samples, class by class, files in alphabetical order.

    Raises:
        DataError: a class is unknown, there is no image or two files share their key.
    """
    info = describe(root, settings)
    _files.check_split(root, split, info.splits)
    found = []
    for name in _subfolders(root / split):
        if name not in info.class_names:
            unknown = UnknownNameError("class", name, info.class_names)
            raise DataError(f"{root / split / name}: {unknown} (classes are those of 'train')")
        label = info.class_names.index(name)
        for path in sorted((root / split / name).iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
                key = _files.sample_key(f"{name}/{path.stem}")
                found.append(_files.Entry(key, str(path), label))
    if not found:
        raise DataError(f"{root / split}: no image in it; expected {split}/CLASS/*.jpg")
    _files.check_unique(found)
    return found


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:  # noqa: ARG001
    """Read an image; its label is the entry's target.

    Raises:
        DataError: the file is damaged.
    """
    image = _files.read_image(Path(entry.image))
    return Sample(entry.key, image.data, image.format, entry.image, label=entry.target)


def _subfolders(path: Path) -> list[str]:
    """Return the sorted names of the folders in `path` that are not hidden."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
