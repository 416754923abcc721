"""COCO 2014 and 2017: boxes of 80 classes, from the instances files.

Class ids 0..79 are the places of the category ids (1..90 with gaps) in their order. A box [x, y,
width, height] becomes corners x, y, x + width, y + height, without rounding; `iscrowd` becomes
`crowd`. Images without an object are kept, with no boxes: that they are empty is known.

The official train files hold two boxes of height 0 (annotations 918 and 2206849; issue 355 of
cocodataset/cocoapi). Such a box cannot be trained on: `Settings.degenerate` says what to do.

minival and valminusminival, the usual halves of val2014, are splits where their files are there.

Format: https://cocodataset.org/#format-data, "Object Detection". The polygons are not kept.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from xattn.data.datasets import _files
from xattn.errors import DataError
from xattn.structures import Box, DatasetInfo, Sample

URL = "https://cocodataset.org"
LAYOUT = """\
coco/
  annotations/instances_{train,val}2017.json
  {train,val}2017/NAME.jpg
or, with year: 2014
  annotations/instances_{train,val}2014.json
  annotations/instances_{minival,valminusminival}2014.json     if wanted; images in val2014/
  {train,val}2014/NAME.jpg
"""
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair"),
    *("couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse"),
    *("remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier"),
    "toothbrush",
)
SPLITS = ("train", "val")
HALVES_OF_VAL2014 = ("minival", "valminusminival")


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the reader.

    Args:
        year: the release.
        prefix: what the names of the annotation files begin with.
        degenerate: what a box without area does: `fail` stops and names it, `drop` leaves it out.
    """

    year: Literal[2014, 2017] = 2017
    prefix: str = "instances"
    degenerate: Literal["fail", "drop"] = "fail"


def describe(root: Path, settings: Settings) -> DatasetInfo:
    """Describe the data set; opens no file."""
    halves = [h for h in HALVES_OF_VAL2014 if _annotation_file(root, h, settings).is_file()]
    return DatasetInfo(
        name="coco",
        tasks=("detection",),
        class_names=CLASSES,
        palette=_files.palette(len(CLASSES), first=1),
        splits=(*SPLITS, *(halves if settings.year == 2014 else ())),
        ignore_ids=(),
        licence="photographs under Flickr's terms of use; annotations CC BY 4.0",
        url=URL,
        citation="Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:
    """List the split's samples in the order of its file; the target is (size, boxes).

    Raises:
        DataError: a file is missing or broken, or the categories are not COCO's.
    """
    _files.check_split(root, split, describe(root, settings).splits)
    half = "val" if split in HALVES_OF_VAL2014 else split
    path, images = _annotation_file(root, split, settings), root / f"{half}{settings.year}"
    _files.refuse_missing([p for p in (path, images) if not p.exists()], "part of COCO")
    instances = read_instances(path)
    check_classes(instances, CLASSES, "those of COCO; read your own with the reader 'folder'")
    return list_entries(instances, images, settings.degenerate)


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:  # noqa: ARG001
    """Read an image; its boxes are in the entry.

    Raises:
        DataError: the image is damaged or not of the size that its boxes were drawn on.
    """
    image = _files.read_image(Path(entry.image))
    size, boxes = entry.target
    if image.size != size:
        raise DataError(
            f"image {entry.image}: {image.size[0]} x {image.size[1]} pixels (width x height), but"
            f" its boxes are for {size[0]} x {size[1]}"
        )
    return Sample(entry.key, image.data, image.format, entry.image, boxes=boxes)


@dataclass(frozen=True, slots=True)
class Instances:
    """An annotation file in COCO's format.

    Args:
        path: the file.
        categories: category id -> name, in the order of the ids.
        images: its records of images, unchecked.
        annotations: its records of objects, unchecked and without their polygons.
    """

    path: Path
    categories: dict[int, str]
    images: list[Any]
    annotations: list[Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the category ids."""
        return tuple(self.categories.values())


def read_instances(path: Path) -> Instances:
    """Read an annotation file in COCO's format and check its categories.

    Raises:
        DataError: the file is missing, is not JSON, or is no file of instances.
    """
    try:
        # The polygons are most of the file; without the hook they would take gigabytes.
        document = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_polygons)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    fields = document if isinstance(document, dict) else {}
    lists: list[Any] = [fields.get(name) for name in _LISTS]
    if not all(isinstance(found, list) for found in lists):
        raise DataError(f"{path}: expected the lists {', '.join(_LISTS)} of COCO's instances")
    images, annotations, categories = lists
    try:
        names = {int(c["id"]): str(c["name"]) for c in categories}
    except _BAD_RECORD as error:
        raise DataError(f"{path}: a category has no number 'id' and 'name' ({error!r})") from error
    if not names or len(names) < len(categories) or len(set(names.values())) < len(names):
        raise DataError(f"{path}: its {len(categories)} categories need ids and names that differ")
    return Instances(path, dict(sorted(names.items())), images, annotations)


def check_classes(instances: Instances, names: tuple[str, ...], whose: str) -> None:
    """Raise a DataError with the first difference unless the categories are `names`."""
    found = instances.class_names
    if found != names:
        pairs = zip(found, names, strict=False)
        differing = (f"'{f}' where '{n}' belongs" for f, n in pairs if f != n)
        first = next(differing, f"{len(found)} instead of {len(names)}")
        raise DataError(f"{instances.path}: its categories ({first}) are not {whose}")


def list_entries(
    instances: Instances, images: Path, degenerate: Literal["fail", "drop"]
) -> list[_files.Entry]:
    """List the images of an annotation file, each with its size in pixels and its boxes.

    Args:
        instances: the annotation file.
        images: the folder that its file names start from.
        degenerate: see `Settings`.

    Raises:
        DataError: an image is missing, an object is of no image or category or not inside its
            image, or a box has no area and that is not to pass.
    """
    sizes, names = _read_images(instances)
    boxes = _read_boxes(instances, sizes, degenerate)
    paths = {image: os.path.join(images, name) for image, name in names.items()}
    missing = [Path(path) for path in paths.values() if not os.path.isfile(path)]
    _files.refuse_missing(missing, f"images of {instances.path.name}")
    found = [
        _files.Entry(_key(names[image]), path, (sizes[image], tuple(boxes.get(image, ()))))
        for image, path in paths.items()
    ]
    _files.check_unique(found)
    return found


_BAD_RECORD = (KeyError, TypeError, ValueError, OverflowError)
_LISTS = ("images", "annotations", "categories")


def _annotation_file(root: Path, split: str, settings: Settings) -> Path:
    return root / "annotations" / f"{settings.prefix}_{split}{settings.year}.json"


def _without_polygons(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)
    return record


def _key(file_name: str) -> str:
    return _files.sample_key(os.path.splitext(file_name)[0])


def _read_images(instances: Instances) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
    """Return image id -> (width, height) in pixels, and image id -> file name."""
    sizes, names = {}, {}
    for number, record in enumerate(instances.images):
        try:
            image = int(record["id"])
            size = (int(record["width"]), int(record["height"]))
            name = str(record["file_name"])
        except _BAD_RECORD as error:
            raise DataError(
                f"{instances.path}: image number {number}: expected id, width, height and"
                f" file_name ({error!r})"
            ) from error
        if image in names:
            raise DataError(f"{instances.path}: two images have the id {image}")
        sizes[image], names[image] = size, name
    if not names:
        raise DataError(f"{instances.path}: no image in it")
    return sizes, names


def _read_boxes(
    instances: Instances, sizes: dict[int, tuple[int, int]], degenerate: Literal["fail", "drop"]
) -> dict[int, list[Box]]:
    """Return image id -> boxes in the order of the file, for images with objects."""
    class_ids = {category: place for place, category in enumerate(instances.categories)}
    boxes: dict[int, list[Box]] = {}
    without_area = []
    for number, record in enumerate(instances.annotations):
        where = f"{instances.path}: annotation number {number}"
        try:
            where = f"{instances.path}: annotation {record['id']}"
            image, category = int(record["image_id"]), int(record["category_id"])
            x, y, width, height = (float(value) for value in record["bbox"])
            crowd = bool(record.get("iscrowd", 0))
            area = float(record["area"]) if "area" in record else None
        except _BAD_RECORD as error:
            raise DataError(
                f"{where}: expected id, image_id, category_id and bbox [x, y, width, height]"
                f" ({error!r})"
            ) from error
        if image not in sizes:
            raise DataError(f"{where}: there is no image {image}")
        if category not in class_ids:
            raise DataError(
                f"{where}: unknown category id {category}; the file has {len(class_ids)} categories"
                f" with ids {min(class_ids)}..{max(class_ids)}"
            )
        if width <= 0 or height <= 0:
            without_area.append(
                f"{record['id']} (image {image}, width {width:g}, height {height:g})"
            )
            continue
        corners = _clip(where, (x, y, x + width, y + height), sizes[image])
        box = Box(class_ids[category], *corners, crowd=crowd, area=area)
        boxes.setdefault(image, []).append(box)
    if without_area and degenerate == "fail":
        others = f" and {len(without_area) - 10} more" if len(without_area) > 10 else ""
        raise DataError(
            f"{instances.path}: boxes without area: annotations {', '.join(without_area[:10])}"
            f"{others}; mend them, or leave them out with the setting degenerate: drop"
        )
    return boxes


def _clip(
    where: str, corners: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Cut off up to a pixel beyond the border, where rounding may lead; more is an error."""
    x1, y1, x2, y2 = corners
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1]))
    beyond = max(abs(a - b) for a, b in zip(corners, inside, strict=True))
    if not (beyond <= 1 and inside[0] < inside[2] and inside[1] < inside[3]):
        raise DataError(
            f"{where}: bbox from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is not inside the image of"
            f" {size[0]} x {size[1]} pixels (width x height)"
        )
    return inside
