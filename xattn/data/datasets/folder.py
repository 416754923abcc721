"""Your own images in folders: classes, masks or boxes.

`Settings.task` says what lies beside the images:

classification  one folder a split, in it one folder a class. Classes are the folders of the train
                split in alphabetical order (of code points, so that no locale can change the ids).
                Another split may lack a class but not add one. A sample's key is CLASS_NAME,
                because different classes often use the same names.
segmentation    a mask of the same name for each image: 8-bit PNG, grey or palette, whose values
                are the places in `classes`, or `ignore` where nothing trains or scores
detection       boxes in the format of COCO (classes are the categories, in the order of their ids)
                or of PASCAL VOC; see those readers

Files without an image suffix are passed over.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from xattn.data.datasets import _files, _masks, coco, voc
from xattn.errors import DataError, UnknownNameError
from xattn.structures import DatasetInfo, Sample, Task

URL = ""
USUAL_SPLITS = ("train", "val", "test")
LAYOUT = """\
root/                                  task: classification
  train/CLASS/*.{jpg,jpeg,png}
  val/CLASS/*.{jpg,jpeg,png}
  test/CLASS/*.{jpg,jpeg,png}          any number of further splits
root/                                  task: segmentation
  images/{train,val,...}/NAME.jpg      or .jpeg, .png
  masks/{train,val,...}/NAME.png
root/                                  task: detection, format: coco
  {train,val,...}.json                 images, annotations and categories
  images/{train,val,...}/NAME.jpg      what file_name says
root/                                  task: detection, format: voc
  JPEGImages/NAME.jpg                  or .jpeg, .png
  Annotations/NAME.xml
  ImageSets/Main/{train,val,test}.txt  NAME a line
"""
KNOBS = {
    "classification": {"task"},
    "segmentation": {"task", "classes", "ignore"},
    "detection": {"task", "format", "classes", "degenerate"},
}


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the reader; one that the task does not use is an error.

    Args:
        task: what the folders mean.
        classes: names in the order of the class ids; segmentation and format `voc` need them,
            elsewhere the data have them.
        ignore: mask value that means "do not train or score here".
        format: of the boxes.
        degenerate: what a box without area does: `fail` stops and names it, `drop` leaves it out.
    """

    task: Task = "classification"
    classes: tuple[str, ...] = ()
    ignore: int = Field(255, ge=0, le=255)
    format: Literal["coco", "voc"] = "coco"
    degenerate: Literal["fail", "drop"] = "fail"

    @model_validator(mode="after")
    def _check_knobs(self) -> Self:
        unused = sorted(self.model_fields_set - KNOBS[self.task])
        if unused:
            raise ValueError(f"{unused[0]}: has no meaning for the task '{self.task}'")
        is_named = self.task == "segmentation" or (self.task, self.format) == ("detection", "voc")
        if is_named and not self.classes:
            raise ValueError("classes: expected the names of the classes in the order of their ids")
        if self.classes and not is_named:
            raise ValueError("classes: the format 'coco' names them in its categories")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: a name occurs twice")
        if self.task == "segmentation" and self.ignore < len(self.classes):
            raise ValueError(f"ignore: {self.ignore} is the id of '{self.classes[self.ignore]}'")
        return self


def describe(root: Path, settings: Settings) -> DatasetInfo:
    """Describe the data set from its settings and the names of its folders.

    Raises:
        DataError: there is no train split, or it does not tell the classes.
    """
    if _is_voc(settings):
        info = voc.describe(root, _voc_settings(settings))
        return replace(
            info, name="folder", licence="the owner's", url=URL, citation="", layout=LAYOUT
        )
    home = _home(root, settings)
    splits = _files.list_folders(home)
    usual = [split for split in USUAL_SPLITS if split in splits]
    if "train" not in usual:
        raise DataError(f"{home}: no folder 'train' in it; {_expected(settings)}")
    names = _class_names(root, settings)
    return DatasetInfo(
        name="folder",
        tasks=(settings.task,),
        class_names=names,
        palette=_files.palette(len(names), first=0 if settings.task == "segmentation" else 1),
        splits=(*usual, *(split for split in splits if split not in usual)),
        ignore_ids=(settings.ignore,) if settings.task == "segmentation" else (),
        licence="the owner's",
        url=URL,
        citation="",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:
    """List a split's samples: in the order of the boxes' files, else by class and file name.

    Raises:
        DataError: a class is unknown, a file is missing, there is no image or two files share
            their key.
    """
    if _is_voc(settings):
        return voc.entries(root, split, _voc_settings(settings))
    info = describe(root, settings)
    _files.check_split(root, split, info.splits)
    if settings.task == "detection":
        _files.refuse_missing(_absent(root / f"{split}.json"), "boxes of a split")
        instances = coco.read_instances(root / f"{split}.json")
        coco.check_classes(instances, info.class_names, "those of train.json")
        return coco.list_entries(instances, root / "images" / split, settings.degenerate)
    home = _home(root, settings) / split
    if settings.task == "segmentation":
        found = _list_masked(home, root / "masks" / split)
    else:
        found = _list_classes(home, info.class_names)
    if not found:
        raise DataError(f"{home}: no image in it; {_expected(settings)}")
    _files.check_unique(found)
    return found


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:
    """Read an image and what belongs to it.

    Raises:
        DataError: a file is damaged or does not fit its partner; the message names it.
    """
    if _is_voc(settings):
        return voc.read(entry, info, _voc_settings(settings))
    if settings.task == "detection":
        return coco.read(entry, info, coco.Settings())
    if settings.task == "segmentation":
        return _masks.read_segmentation(entry, info)
    return _files.read_labelled(entry)


def _home(root: Path, settings: Settings) -> Path:
    """Return the folder that has a folder of images for each split."""
    return root if settings.task == "classification" else root / "images"


def _class_names(root: Path, settings: Settings) -> tuple[str, ...]:
    if settings.task == "segmentation":
        return settings.classes
    if settings.task == "detection":
        _files.refuse_missing(_absent(root / "train.json"), "boxes of a split")
        return coco.read_instances(root / "train.json").class_names
    names = tuple(_files.list_folders(root / "train"))
    if not names:
        raise DataError(f"{root / 'train'}: no class folder in it; {_expected(settings)}")
    return names


def _list_classes(folder: Path, names: tuple[str, ...]) -> list[_files.Entry]:
    """List the images of folders that are classes."""
    found = []
    for name in _files.list_folders(folder):
        if name not in names:
            unknown = UnknownNameError("class", name, names)
            raise DataError(f"{folder / name}: {unknown} (classes are those of 'train')")
        for file in _files.list_images(folder / name):
            path = folder / name / file
            key = _files.sample_key(f"{name}/{path.stem}")
            found.append(_files.Entry(key, str(path), names.index(name)))
    return found


def _list_masked(image_folder: Path, mask_folder: Path) -> list[_files.Entry]:
    """List the images of a split with the paths of their masks; each must have the other."""
    _files.refuse_missing(_absent(mask_folder), "folder of masks")
    images = [image_folder / name for name in _files.list_images(image_folder)]
    masks = [mask_folder / f"{image.stem}.png" for image in images]
    there = set(_files.list_images(mask_folder))
    _files.refuse_missing([mask for mask in masks if mask.name not in there], "masks")
    alone = sorted(there - {mask.name for mask in masks})
    wanted = [(image_folder / name).with_suffix(".jpg") for name in alone]
    _files.refuse_missing(wanted, "images of masks")
    return [
        _files.Entry(_files.sample_key(image.stem), str(image), str(mask))
        for image, mask in zip(images, masks, strict=True)
    ]


def _absent(path: Path) -> list[Path]:
    return [] if path.exists() else [path]


def _expected(settings: Settings) -> str:
    train = "train/CLASS" if settings.task == "classification" else "images/train"
    return f"expected {train}/*.jpg"


def _is_voc(settings: Settings) -> bool:
    return settings.task == "detection" and settings.format == "voc"


def _voc_settings(settings: Settings) -> voc.Settings:
    return voc.Settings(task="detection", classes=settings.classes, degenerate=settings.degenerate)
