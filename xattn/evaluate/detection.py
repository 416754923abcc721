"""Average precision of boxes by PASCAL VOC's rules and by COCO's, and files for their tools.

VOC (development kit 2007 and 2010): detections of a class go by descending score, equal ones as
they come; each takes the object of its class and image with which its IoU is largest, if that is
the threshold or more. The first to take an object is right, later ones are wrong; one that takes a
difficult object is neither, and difficult objects are not to be found. Since the choice does not
depend on other detections, nothing here goes by image or detection. COCO's figures come from
faster-coco-eval, which counts as pycocotools does.

Boxes are x1, y1, x2, y2 in pixels of the stored image, edges at pixel borders, so that the width is
x2 - x1. VOC's own corners are numbers of pixels, from 1, both inside the box: theirs are ours with
1 added to x1 and y1, and its IoU, whose widths are xmax - xmin + 1, is ours. Only where both sides'
boxes are such corners as they stand (amdegroot's evaluation) is `inclusive` to be set.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from xattn.errors import DataError
from xattn.storage import write_text
from xattn.structures import Box

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

COCO_FIGURES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
COCO_CATEGORY_IDS = tuple(
    number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
)
"""COCO's own id of each of its classes."""
_RECALLS = np.arange(11) * 0.1
"""The eleven points, rounded as in the tools that published numbers come from: that of 0.3 is a bit
above 0.3, so that 3 of 10 objects do not reach it (likewise 0.6 and 0.7)."""


@dataclass(frozen=True, slots=True)
class Found:
    """Detections of a set of images.

    Args:
        images: (N,) numbers of the images.
        labels: (N,) class ids 0..K-1.
        scores: (N,).
        boxes: (N, 4).
    """

    images: Whole
    labels: Whole
    scores: Floats
    boxes: Floats


@dataclass(frozen=True, slots=True)
class Objects:
    """What there is to be found.

    Args:
        images: (N,) numbers of the images.
        labels: (N,) class ids 0..K-1.
        boxes: (N, 4).
        difficult: (N,) whether it neither has to be found nor may not be.
    """

    images: Whole
    labels: Whole
    boxes: Floats
    difficult: Flags


@dataclass(frozen=True, slots=True)
class SeenImage:
    """What a detector found in one image, and what there is.

    Args:
        key: of the image, unique among those that are scored.
        size: (height, width), px.
        found: "boxes" (N, 4) in pixels of the stored image, "scores" (N,), "labels" (N,).
        objects: all that is marked.
    """

    key: str
    size: tuple[int, int]
    found: Mapping[str, Tensor]
    objects: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class VocScores:
    """Average precision of each class, in [0, 1].

    Args:
        ap_11: (K,) mean over the recalls 0, 0.1 .. 1 of the best precision at or beyond (VOC 2007);
            NaN where there is no object but difficult ones.
        ap_area: (K,) area under the precision made monotone from the right (since VOC 2010).
        objects: (K,) objects that are not difficult.
    """

    ap_11: Floats
    ap_area: Floats
    objects: Whole

    @property
    def map_11(self) -> float:
        """Mean of `ap_11` over the classes that occur; NaN if none does."""
        return _mean(self.ap_11)

    @property
    def map_area(self) -> float:
        """Mean of `ap_area` over the classes that occur; NaN if none does."""
        return _mean(self.ap_area)


@dataclass(frozen=True, slots=True)
class DetectionScores:
    """A detector's scores by both protocols.

    Args:
        voc: at an IoU of 0.5.
        coco: by the names in `COCO_FIGURES`; NaN where there is nothing of that size.
        images: number of images scored.
    """

    voc: VocScores
    coco: Mapping[str, float]
    images: int

    def metrics(self) -> dict[str, float]:
        """Return every figure that there is, by its name."""
        named = {"mAP_50": self.voc.map_area, "mAP_50_11": self.voc.map_11, **self.coco}
        return {name: value for name, value in named.items() if not math.isnan(value)}


def detection_scores(images: Sequence[SeenImage], num_classes: int) -> DetectionScores:
    """Score a detector on a set of images by the protocols of VOC and of COCO.

    The order of the images does not count. To VOC's rules a crowd is a difficult object; COCO's
    know no difficult ones, which have to be found as others.

    Raises:
        DataError: no image has an object that is to be found.
    """
    images = sorted(images, key=lambda image: image.key)
    found = found_in([image.found for image in images])
    voc = voc_scores(found, objects_in([image.objects for image in images]), num_classes)
    if not voc.objects.any():
        raise DataError(f"none of {len(images)} images has an object to be found")
    numbers, classes = range(1, len(images) + 1), range(1, num_classes + 1)
    truth = coco_truth(images, numbers, {number: str(number) for number in classes})
    coco = coco_scores(truth, coco_results(found, numbers, classes))
    return DetectionScores(voc, coco, len(images))


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def found_in(detections: Iterable[Mapping[str, Tensor]]) -> Found:
    """Gather a recipe's decoded detections, an image each, which are numbered from 0."""
    parts = list(detections)
    counts = [len(part["scores"]) for part in parts]
    return Found(
        images=np.repeat(np.arange(len(parts)), counts),
        labels=_column([part["labels"] for part in parts]).astype(np.int64),
        scores=_column([part["scores"] for part in parts]),
        boxes=_column([part["boxes"].reshape(-1) for part in parts]).reshape(-1, 4),
    )


def _column(parts: Sequence[Tensor]) -> Floats:
    arrays = [part.detach().double().cpu().numpy() for part in parts]
    return np.concatenate(arrays) if arrays else np.zeros(0)


def objects_in(boxes: Iterable[Sequence[Box]]) -> Objects:
    """Gather the objects of images, a sequence each, which are numbered from 0.

    A crowd counts as difficult: it need not be found, and its members are not false.
    """
    rows = [(image, box) for image, own in enumerate(boxes) for box in own]
    corners = [(box.x1, box.y1, box.x2, box.y2) for _, box in rows]
    return Objects(
        images=np.array([image for image, _ in rows], dtype=np.int64),
        labels=np.array([box.class_id for _, box in rows], dtype=np.int64),
        boxes=np.array(corners, dtype=np.float64).reshape(-1, 4),
        difficult=np.array([not box.is_sought for _, box in rows], dtype=np.bool_),
    )


def voc_scores(
    found: Found,
    objects: Objects,
    num_classes: int,
    *,
    iou: float = 0.5,
    inclusive: bool = False,
) -> VocScores:
    """Score detections by VOC's rules.

    Args:
        found: detections, in any order.
        objects: of the same images.
        num_classes: K.
        iou: what a detection has to reach, in (0, 1].
        inclusive: whether the last pixel belongs to a box: adds 1 to every width and height.
    """
    best, largest = _best_object(found, objects, num_classes, 1.0 if inclusive else 0.0)
    takes = largest >= iou
    is_difficult = np.zeros_like(takes)
    is_difficult[takes] = objects.difficult[best[takes]]
    order = np.lexsort((-found.scores, found.labels))
    order = order[~is_difficult[order]]
    taken = np.where(takes[order], best[order], -1)
    _, firsts = np.unique(taken, return_index=True)
    is_right = np.zeros(len(order), dtype=np.bool_)
    is_right[firsts] = True
    is_right &= taken >= 0
    counts = np.bincount(objects.labels[~objects.difficult], minlength=num_classes)
    borders = np.searchsorted(found.labels[order], np.arange(num_classes + 1))
    pairs = [
        _average_precisions(is_right[start:end], int(count))
        for start, end, count in zip(borders[:-1], borders[1:], counts, strict=True)
    ]
    ap_11, ap_area = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return VocScores(ap_11, ap_area, counts)


def _best_object(
    found: Found, objects: Objects, num_classes: int, extra: float
) -> tuple[Whole, Floats]:
    """Return each detection's object with the largest IoU (the first such one), and that IoU.

    Where its image has none of its class, the object is -1 and the IoU 0.
    """
    place = np.argsort(keys := objects.images * num_classes + objects.labels, kind="stable")
    wanted = found.images * num_classes + found.labels
    starts = np.searchsorted(keys[place], wanted, "left")
    counts = np.searchsorted(keys[place], wanted, "right") - starts
    best = np.full(len(wanted), -1, dtype=np.int64)
    largest = np.zeros(len(wanted))
    some = counts > 0
    if not some.any():
        return best, largest
    # All pairs of a detection and an object of its class and image, detection by detection.
    begins = np.cumsum(counts) - counts
    detection = np.repeat(np.arange(len(wanted)), counts)
    partner = place[np.arange(len(detection)) - begins[detection] + starts[detection]]
    overlap = _iou(found.boxes[detection], objects.boxes[partner], extra)
    largest[some] = np.maximum.reduceat(overlap, begins[some])
    winners = (overlap == largest[detection]).nonzero()[0]
    who, firsts = np.unique(detection[winners], return_index=True)
    best[who] = partner[winners[firsts]]
    return best, largest


def _iou(ours: Floats, theirs: Floats, extra: float) -> Floats:
    """Return (N,), the IoU of N pairs of boxes, to whose sides `extra` is added."""
    low = np.maximum(ours[:, :2], theirs[:, :2])
    high = np.minimum(ours[:, 2:], theirs[:, 2:])
    intersection = np.clip(high - low + extra, 0, None).prod(1)
    union = sum((box[:, 2:] - box[:, :2] + extra).prod(1) for box in (ours, theirs)) - intersection
    result: Floats = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return result


def _average_precisions(is_right: Flags, count: int) -> tuple[float, float]:
    """Return the 11-point and the area AP of one class.

    Args:
        is_right: (N,) of its detections, by descending score.
        count: objects to be found.
    """
    if count == 0:
        return float("nan"), float("nan")
    right = np.cumsum(is_right)
    precision = right / np.arange(1, len(right) + 1)
    best_beyond = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(right / count, _RECALLS)
    at_points = best_beyond[reached[reached < len(right)]]
    return float(at_points.sum() / len(_RECALLS)), float(best_beyond[is_right].sum() / count)


def write_voc_files(
    folder: Path, found: Found, keys: Sequence[str], class_names: Sequence[str], split: str
) -> None:
    """Write detections as VOC's development kit reads them: comp4_det_SPLIT_CLASS.txt a class.

    A slash in the name of a class, which no name of a file may have, is %2F there, and a space in
    the name of an image, which would end it, %20.

    Args:
        folder: is made if need be.
        found: image n is that of `keys[n]`.
        keys: VOC's names of the images.
        class_names: K.
        split: e.g. "test".
    """
    corners = found.boxes + np.array([1, 1, 0, 0])  # numbers of pixels, from 1
    order = np.lexsort((-found.scores, found.labels))
    borders = np.searchsorted(found.labels[order], np.arange(len(class_names) + 1))
    for class_id, name in enumerate(class_names):
        lines = [
            f"{keys[found.images[n]].replace(' ', '%20')} {found.scores[n]:.6f} "
            + " ".join(f"{corner:.6f}" for corner in corners[n])
            for n in order[borders[class_id] : borders[class_id + 1]]
        ]
        text = "".join(f"{line}\n" for line in lines)
        write_text(folder / f"comp4_det_{split}_{name.replace('/', '%2F')}.txt", text)


def coco_results(
    found: Found, image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return detections as a COCO results file holds them (`json.dump` writes it).

    Args:
        found: image n and class k are those of `image_ids[n]` and `category_ids[k]`.
        image_ids: COCO's.
        category_ids: COCO's, K.
    """
    sizes = found.boxes[:, 2:] - found.boxes[:, :2]
    boxes = np.concatenate([found.boxes[:, :2], sizes], 1).tolist()
    columns = zip(
        found.images.tolist(), found.labels.tolist(), boxes, found.scores.tolist(), strict=True
    )
    return [
        {
            "image_id": image_ids[image],
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
        }
        for image, label, box, score in columns
    ]


def coco_truth(
    images: Sequence[SeenImage], image_ids: Sequence[int], categories: Mapping[int, str]
) -> dict[str, Any]:
    """Return what an instances file of COCO holds for the objects of these images.

    Args:
        images: whose found boxes do not count here.
        image_ids: one each.
        categories: id to name, in the order of the classes.
    """
    category_ids = list(categories)
    annotations = [
        {
            "image_id": image_id,
            "category_id": category_ids[box.class_id],
            "bbox": [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1],
            "area": (box.x2 - box.x1) * (box.y2 - box.y1) if box.area is None else box.area,
            "iscrowd": int(box.crowd),
        }
        for image_id, image in zip(image_ids, images, strict=True)
        for box in image.objects
    ]
    return {
        "images": [
            {"id": number, "file_name": image.key, "height": image.size[0], "width": image.size[1]}
            for number, image in zip(image_ids, images, strict=True)
        ],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
        "annotations": [{"id": n, **row} for n, row in enumerate(annotations, start=1)],
    }


def coco_scores(
    truth: Path | Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return COCO's twelve figures, by the names in `COCO_FIGURES`.

    Args:
        truth: an instances file, or what it holds; sizes are told by its `area`, crowds by its
            `iscrowd`.
        results: as of `coco_results`.

    Returns:
        Each in [0, 1], NaN where the truth has nothing of that size.

    Raises:
        DataError: the file cannot be read, or a result is of an image that it has not.
    """
    # Imported by who scores: it has compiled parts.
    from faster_coco_eval import COCO, COCOeval_faster  # noqa: PLC0415

    content = _read_json(truth) if isinstance(truth, Path) else dict(truth)
    strange = {row["image_id"] for row in results} - {row["id"] for row in content["images"]}
    if strange:
        raise DataError(f"results: image {min(strange)} is not among those of the truth")
    coco = COCO(content)
    found = (
        coco.loadRes([dict(row) for row in results])
        if results
        else COCO({**content, "annotations": []})
    )
    scorer = COCOeval_faster(coco, found, "bbox", print_function=lambda *_: None)
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    return {
        name: float(value) if value >= 0 else float("nan")
        for name, value in zip(COCO_FIGURES, scorer.stats, strict=True)
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as COCO annotations: {error}") from None
    return content
