"""Which classes of a data set are mostly small: the list behind mIoU_small (CLA, section IV).

CLA's paper calls a class small if in more than 60 % of its appearances in the validation set it is
smaller than 32 x 32 pixels, and counts 12 such classes on ADE20K without naming them. It says
neither what one appearance is nor what is smaller; `SmallClassOptions` has the readings. One more,
an annotated instance, is left out: the scene parsing masks do not tell instances apart.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage  # type: ignore[import-untyped]

from xattn.evaluate.inference import SegmentationProtocol
from xattn.structures import IGNORE_INDEX

_SIDE = 32
_AREA = _SIDE * _SIDE
_EIGHT_NEIGHBOURS = np.ones((3, 3), np.int8)

Mask = npt.NDArray[np.integer]


class SmallClassOptions(BaseModel):
    """What an appearance is and when it is small.

    Args:
        unit: one appearance: "image", all pixels of a class in one image, or "component", each part
            of them that hangs together over sides or corners.
        measure: what is small: "area", fewer than 1024 pixels, or "box", a bounding box with both
            sides below 32 pixels.
        share: a class is small if more than this share of its appearances are.
        min_pixels: components below this are specks that occlusion leaves, and do not count.
        resize: how images are shown to a model, if masks are to be measured in the size that they
            have there at its first scale; None measures them as they are stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["image", "component"] = "image"
    measure: Literal["area", "box"] = "area"
    share: float = Field(default=0.6, ge=0, lt=1)
    min_pixels: int = Field(default=1, ge=1)
    resize: SegmentationProtocol | None = None

    def describe(self) -> list[str]:
        """Return the options in words, a line each."""
        unit = "all pixels of a class in one image"
        if self.unit == "component":
            unit = f"an 8-connected component of at least {self.min_pixels} px"
        small = f"fewer than {_AREA} px"
        if self.measure == "box":
            small = f"both sides of the bounding box below {_SIDE} px"
        size = "as stored"
        if self.resize is not None:
            size = f"in the size of: {self.resize.describe()}"
        return [
            f"appearance: {unit}",
            f"small: {small}",
            f"masks: {size}",
            f"listed: more than {self.share:g} of the appearances are small",
        ]


@dataclass(frozen=True, slots=True)
class SmallClass:
    """How often a class appears, and how often small."""

    name: str
    class_id: int
    appearances: int
    small: int
    is_listed: bool = field(default=False)

    @property
    def share(self) -> float:
        """Part of the appearances that are small; 0 for a class that never appears."""
        return self.small / max(self.appearances, 1)


def count_small(
    masks: Iterable[Mask], class_names: tuple[str, ...], options: SmallClassOptions
) -> list[SmallClass]:
    """Count the appearances of every class over a set of masks, which are looked at one by one.

    Args:
        masks: (H, W) ids 0..K-1 or IGNORE_INDEX each.
        class_names: the K names.
        options: what to count.

    Returns:
        Every class by id; a class that never appears is not listed.
    """
    appearances = np.zeros(len(class_names), np.int64)
    small = np.zeros(len(class_names), np.int64)
    for stored in masks:
        mask = stored if options.resize is None else _resize(stored, options.resize)
        ids, is_small = _appearances(mask, options)
        appearances += np.bincount(ids, minlength=len(class_names))
        small += np.bincount(ids[is_small], minlength=len(class_names))
    share = Fraction(str(options.share))  # 0.7 * 90 is below 63 as floats multiply
    return [
        SmallClass(name, class_id, int(count), int(few), int(few) > share * int(count))
        for class_id, (name, count, few) in enumerate(
            zip(class_names, appearances, small, strict=True)
        )
    ]


def list_file(classes: list[SmallClass], source: str, options: SmallClassOptions) -> str:
    """Return the text that `evaluate.small_classes` reads: a listed class a line, options first.

    Args:
        classes: what `count_small` returned.
        source: what the masks are, in words.
        options: by which they were counted.
    """
    listed = sorted((entry for entry in classes if entry.is_listed), key=lambda c: -c.share)
    lines = [f"# {len(listed)} small classes of {source}"]
    lines += [f"# {line}" for line in options.describe()]
    lines += [f"{entry.name}  # {entry.small} of {entry.appearances} are small" for entry in listed]
    return "\n".join(lines) + "\n"


def as_records(classes: list[SmallClass]) -> list[dict[str, object]]:
    """Return the classes for JSON, with their shares."""
    return [{**asdict(entry), "share": round(entry.share, 6)} for entry in classes]


def _resize(mask: Mask, resize: SegmentationProtocol) -> Mask:
    height, width = resize.output_size((mask.shape[0], mask.shape[1]), resize.ratios[0])
    resized = Image.fromarray(mask.astype(np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST
    )
    return np.asarray(resized)


def _appearances(
    mask: Mask, options: SmallClassOptions
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the class of every appearance in a mask, and whether it is small."""
    labels = np.where(mask == IGNORE_INDEX, 0, mask.astype(np.int32) + 1)
    classes = ndimage.find_objects(labels)
    ids, sizes = [], []
    for class_id, window in enumerate(classes):
        if window is None:
            continue
        own = labels[window] == class_id + 1
        found = _measure_whole(own) if options.unit == "image" else _measure_parts(own)
        kept = found[found[:, 0] >= options.min_pixels] if options.unit == "component" else found
        ids.append(np.full(len(kept), class_id))
        sizes.append(kept)
    if not ids:
        return np.zeros(0, np.int64), np.zeros(0, bool)
    measured = np.concatenate(sizes)
    is_small = np.asarray(
        measured[:, 0] < _AREA
        if options.measure == "area"
        else (measured[:, 1:] < _SIDE).all(axis=1)
    )
    return np.concatenate(ids), is_small


def _measure_whole(own: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return (1, 3): pixels, rows and columns of a class that touches all sides of its window."""
    return np.array([[np.count_nonzero(own), *own.shape]])


def _measure_parts(own: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return (parts, 3): pixels, rows and columns of each connected part."""
    parts, count = ndimage.label(own, _EIGHT_NEIGHBOURS)
    pixels = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    boxes = [
        (rows.stop - rows.start, columns.stop - columns.start)
        for rows, columns in ndimage.find_objects(parts)
    ]
    return np.column_stack([pixels, np.array(boxes, np.int64).reshape(-1, 2)])
