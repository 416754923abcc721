"""The boxes that an evaluation kept of a picture: read, counted and drawn.

Both files are lists of objects with "class_id" and "box", x1, y1, x2, y2 in pixels of the image:

    <key>.truth.json        also "difficult" and "crowd", which say that it need not be found
    <key>.prediction.json   also "score"
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xattn.errors import DataError
from xattn.report.boxes import draw_boxes
from xattn.report.overlay import Colour

SHOWN_SCORE = 0.3
"""Detections below it are neither drawn nor counted: an evaluation keeps them down to 0.01."""

RIGHT_IOU = 0.5

_LINE_PX = 3  # a page shows the picture at about half its size


@dataclass(frozen=True, slots=True)
class PictureBoxes:
    """The boxes of one picture.

    Args:
        boxes: (N, 4) x1, y1, x2, y2, px.
        labels: (N,) class ids 0..K-1.
        scores: (N,); None for true boxes.
        faint: (N,) those that need not be found; None for predicted boxes.
    """

    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64] | None = None
    faint: npt.NDArray[np.bool_] | None = None


def read_truth(path: Path, num_classes: int) -> PictureBoxes:
    """Read the true boxes of a picture.

    Raises:
        DataError: the file breaks its format, or holds an unknown class.
    """
    boxes, labels, flags = _read(path, num_classes, lambda e: bool(e["difficult"] or e["crowd"]))
    return PictureBoxes(boxes, labels, faint=np.array(flags, np.bool_))


def read_prediction(path: Path, num_classes: int) -> PictureBoxes:
    """Read the boxes that were predicted with `SHOWN_SCORE` or more; raises as `read_truth`."""
    boxes, labels, scores = _read(path, num_classes, lambda e: float(e["score"]))
    shown = (column := np.array(scores, np.float64)) >= SHOWN_SCORE
    return PictureBoxes(boxes[shown], labels[shown], scores=column[shown])


def _read(
    path: Path, num_classes: int, third: Callable[[Mapping[str, Any]], Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], list[Any]]:
    """Return boxes, labels and what `third` makes of each entry."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        boxes = np.array([_corners(entry) for entry in entries], np.float64).reshape(-1, 4)
        labels = np.array([int(entry["class_id"]) for entry in entries], np.int64)
        values = [third(entry) for entry in entries]
        if not np.isfinite(boxes).all():
            raise ValueError("a corner is not a finite number")
        if len(unknown := labels[(labels < 0) | (labels >= num_classes)]):
            raise ValueError(f"class_id is {unknown[0]}, expected 0..{num_classes - 1}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"{path}: not a file of boxes ({type(error).__name__}: {error}); repeat `dvc repro`"
        ) from None
    return boxes, labels, values


def _corners(entry: Mapping[str, Any]) -> list[float]:
    x1, y1, x2, y2 = map(float, entry["box"])
    return [x1, y1, x2, y2]


def count_right(prediction: PictureBoxes, truth: PictureBoxes) -> tuple[int, int]:
    """Return how many predictions are right by VOC's rules at IoU 0.5, and how many objects are.

    Each prediction goes to the object of its class with which its IoU is largest; of those that
    reach an object one is right. Objects that need not be found count neither way.
    """
    assert truth.faint is not None
    objects = int((~truth.faint).sum())
    if not objects or not len(prediction.labels):
        return 0, objects
    same = prediction.labels[:, None] == truth.labels
    iou = np.where(same, _iou(prediction.boxes[:, None], truth.boxes), 0.0)
    reached = iou.argmax(1)[iou.max(1) >= RIGHT_IOU]
    return len(set(reached[~truth.faint[reached]].tolist())), objects


def _iou(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> Any:
    """Return the intersection over union of (..., 4) boxes; 0 for two without area."""
    low = np.maximum(ours[..., :2], theirs[..., :2])
    high = np.minimum(ours[..., 2:], theirs[..., 2:])
    common = (high - low).clip(0).prod(-1)
    union = sum((box[..., 2:] - box[..., :2]).prod(-1) for box in (ours, theirs)) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def draw_small(
    image: Image.Image,
    boxes: PictureBoxes,
    class_names: Sequence[str],
    palette: Sequence[Colour],
    size_px: int,
) -> Image.Image:
    """Draw boxes on an image whose longer side is first made `size_px` or less, without words."""
    small = image.copy()
    small.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    factor = np.array([small.width / image.width, small.height / image.height] * 2)
    return draw_boxes(
        np.asarray(small),
        boxes.boxes * factor,
        boxes.labels,
        boxes.scores,
        class_names,
        palette,
        faint=boxes.faint,
        words=False,
        line_px=_LINE_PX,
    )
