"""PASCAL VOC 2007-2012, and every data set in its layout.

One raw folder serves three tasks; `Settings.task` chooses which target a sample carries and what
the class names are:

segmentation    mask; ids of SegmentationClass as they are: background, `classes`, `stuff_classes`
detection       boxes of `classes`, from Annotations
classification  label: the class of the image's largest box by area (the first of equals)

Split `train_aug` are VOC 2012's 1,464 train images and 9,118 of SBD (Hariharan et al. 2011): 10,582
with VOC's own mask where there is one, otherwise SBD's, which have no borders.

Format: Everingham et al., "The PASCAL Visual Object Classes Challenge 2012 Development Kit",
sections 4 and 8. Boxes in the files count pixels from 1 and include both ends: there x1..x2 covers
the pixel edges x1 - 1 .. x2 here. A box may be a pixel wide or high; one that is a single pixel is
a click by mistake and counts as degenerate, as does one whose ends are swapped.
"""

from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from pydantic import BaseModel

from xattn.data.datasets import _files, _masks
from xattn.errors import DataError, UnknownNameError
from xattn.structures import IGNORE_INDEX, Box, DatasetInfo, Sample, Task

URL = "http://host.robots.ox.ac.uk/pascal/VOC/"
LICENCE = "photographs under Flickr's terms of use; annotations free for research"
CITATION = "Everingham et al., The Pascal Visual Object Classes (VOC) Challenge, IJCV 2010"
LAYOUT = """\
VOC2012/
  JPEGImages/NAME.jpg
  SegmentationClass/NAME.png               palette indices: 0 background, 255 border (ignored)
  SegmentationClassAug/NAME.png            the same ids, for the split train_aug (trainaug.txt)
  Annotations/NAME.xml
  ImageSets/Segmentation/{train,val}.txt   NAME a line
  ImageSets/Main/{train,val,test}.txt      NAME a line, for boxes and labels
"""

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
SPLITS = ("train", "val", "trainval", "test", "train_aug")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the reader.

    Args:
        task: which target the samples carry.
        classes: names of the objects, in the order of their mask ids 1..K.
        stuff_classes: names of the mask ids after those, which have no boxes.
        degenerate: what a box of one pixel or none does: `fail` stops and names it, `drop` leaves
            it out.
    """

    task: Task = "segmentation"
    classes: tuple[str, ...] = CLASSES
    stuff_classes: tuple[str, ...] = ()
    degenerate: Literal["fail", "drop"] = "fail"


def describe(root: Path, settings: Settings) -> DatasetInfo:
    """Describe the data set for its task; its splits are those that have a list file."""
    is_segmentation = settings.task == "segmentation"
    things = settings.classes
    names = ("background", *things, *settings.stuff_classes) if is_segmentation else things
    found = tuple(split for split in SPLITS if _list_file(root, split, settings).is_file())
    return DatasetInfo(
        name="voc",
        tasks=(settings.task,),
        class_names=names,
        palette=_files.palette(len(names), first=0 if is_segmentation else 1),
        splits=found or SPLITS,
        ignore_ids=(IGNORE_INDEX,),
        licence=LICENCE,
        url=URL,
        citation=CITATION,
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:
    """List the split's samples in the order of its list; the target is the mask or annotation.

    Raises:
        DataError: the list or a file that it names is missing.
    """
    _files.check_split(root, split, describe(root, settings).splits)
    is_segmentation = settings.task == "segmentation"
    folder, suffix, what = (
        ("SegmentationClass", "png", "mask") if is_segmentation else ("Annotations", "xml", "boxes")
    )
    found = []
    for name in _files.read_list(_list_file(root, split, settings)):
        stem = root / "JPEGImages" / name
        paths = (stem.with_name(stem.name + suffix) for suffix in IMAGE_SUFFIXES)
        image = _files.find_file(paths, f"image of '{name}'")
        target = root / folder / f"{name}.{suffix}"
        if is_segmentation and split == "train_aug" and not target.is_file():
            target = root / "SegmentationClassAug" / f"{name}.{suffix}"
        _files.find_file([target], f"{what} of {image.name}")
        found.append(_files.Entry(_files.sample_key(name), str(image), str(target)))
    _files.check_unique(found)
    return found


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:
    """Read an image with its mask, its boxes or the class of its largest box.

    Raises:
        DataError: a file is damaged or contradicts another; the message names it.
    """
    if settings.task == "segmentation":
        return _masks.read_segmentation(entry, info)
    image, annotation = _files.read_image(Path(entry.image)), Path(entry.target)
    boxes = _read_boxes(annotation, image.size, settings)
    if settings.task == "detection":
        return Sample(entry.key, image.data, image.format, entry.image, boxes=boxes)
    label = _largest(boxes, annotation)
    return Sample(entry.key, image.data, image.format, entry.image, label=label)


def _list_file(root: Path, split: str, settings: Settings) -> Path:
    folder = root / "ImageSets" / ("Segmentation" if settings.task == "segmentation" else "Main")
    usual = folder / "trainaug.txt"
    return usual if split == "train_aug" and usual.is_file() else folder / f"{split}.txt"


def _largest(boxes: tuple[Box, ...], path: Path) -> int:
    """Return the class of the box with the largest area."""
    if not boxes:
        raise DataError(f"annotation {path}: no object, so the image has no class; take it out")
    return max(boxes, key=lambda box: (box.x2 - box.x1) * (box.y2 - box.y1)).class_id


def _read_boxes(path: Path, size: tuple[int, int], settings: Settings) -> tuple[Box, ...]:
    """Read the objects of one annotation file.

    Args:
        path: an XML file.
        size: (width, height) of the image in pixels.
        settings: names the classes, and says what happens to degenerate boxes.
    """
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(f"annotation {path}: not readable as XML ({error})") from error
    boxes = (_read_box(path, number, node, size, settings) for number, node in enumerate(objects))
    return tuple(box for box in boxes if box is not None)


def _read_box(
    path: Path,
    number: int,
    node: ElementTree.Element,
    size: tuple[int, int],
    settings: Settings,
) -> Box | None:
    where = f"annotation {path}: object {number}"
    name = (node.findtext("name") or "").strip()
    if name not in settings.classes:
        raise DataError(f"{where}: {UnknownNameError('class', name, settings.classes)}")
    corners = [node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        xmin, ymin, xmax, ymax = (float(corner or "") for corner in corners)
    except ValueError as error:
        raise DataError(f"{where}: bndbox {corners} is not four numbers") from error
    found = f"bndbox xmin {xmin:g} ymin {ymin:g} xmax {xmax:g} ymax {ymax:g}"
    if xmin > xmax or ymin > ymax or (xmin == xmax and ymin == ymax):
        if settings.degenerate == "drop":
            return None
        raise DataError(
            f"{where}: {found} holds a pixel at most; mend it, or leave such boxes out with the"
            " setting degenerate: drop"
        )
    # Some labelling tools count from 0: one pixel beyond the border is cut off, more is an error.
    x1, y1 = max(xmin - 1, 0.0), max(ymin - 1, 0.0)
    x2, y2 = min(xmax, float(size[0])), min(ymax, float(size[1]))
    beyond = max(x1 - (xmin - 1), y1 - (ymin - 1), xmax - x2, ymax - y2)
    if not (beyond <= 1 and x1 < x2 and y1 < y2):
        raise DataError(
            f"{where}: {found} is not inside the image of {size[0]} x {size[1]} pixels"
            " (width x height)"
        )
    difficult = (node.findtext("difficult") or "0").strip() == "1"
    return Box(settings.classes.index(name), x1, y1, x2, y2, difficult=difficult)
