"""Default boxes: where they lie, which object each one stands for, what that costs.

Liu et al., "SSD" (ECCV 2016), sections 2.1 and 2.2, with the numbers of its code: sizes and steps
in pixels, offsets divided by variances of 0.1 and 0.2, widths and heights of default boxes cut at
the image's. Order of default boxes as in torchvision and amdegroot/ssd.pytorch (no code taken): map
by map, row by row, cell by cell; in a cell the two squares, then each ratio and its inverse.
Matching, mining and loss work on all images at once.

Boxes are in pixels of the 300 x 300 input: `xyxy` corners, `cxcywh` centre and size. Shape
suffixes: B batch, M objects of an image (padded), P default boxes, K classes.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xattn.errors import ConfigError
from xattn.structures import BoxTarget, MeanOverRanks

BoxSizes = Literal["voc", "coco"]

INPUT_SIDE_PX = 300
_CELLS = (38, 19, 10, 5, 3, 1)
_STEPS_PX = (8, 16, 32, 64, 100, 300)
_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
_SIZES_PX = {  # of a map's smaller square; the larger one's is the mean (geometric) with the next
    "voc": (30, 60, 111, 162, 213, 264, 315),
    "coco": (21, 45, 99, 153, 207, 261, 315),
}
BOXES_PER_CELL = tuple(2 + 2 * len(ratios) for ratios in _RATIOS)

_CENTRE_VARIANCE, _SIZE_VARIANCE = 0.1, 0.2
_LARGEST_LOG_RATIO = math.log(1000 / 16)  # no box is infinite: torchvision's limit
_MATCHING_IOU = 0.5
_LOW_BITS = 2**32 - 1
_LEAST_SCORE = 0.01
_NMS_IOU = 0.45
_CANDIDATES_PER_CLASS = 400  # of an image, before the suppression: SSD's code, and torchvision
_KEPT_PER_IMAGE = 200


class MultiBoxOutputs(NamedTuple):
    """What SSD says of every default box.

    Args:
        offsets: (B, P, 4), see `encode`.
        logits: (B, P, K + 1), the background first.
        defaults_cxcywh: (P, 4) the default boxes, px.
    """

    offsets: Tensor
    logits: Tensor
    defaults_cxcywh: Tensor


def check_input_side(key: str, size: int) -> None:
    """Raise a ConfigError that names `key` if a side, px, is not the one that detectors take."""
    if size != INPUT_SIDE_PX:
        raise ConfigError(
            f"{key}: found {size}, expected {INPUT_SIDE_PX}, which the default boxes are made for"
        )


def default_boxes(sizes: BoxSizes = "voc") -> Tensor:
    """Return SSD300's 8,732 default boxes, (P, 4) cxcywh, px, float32.

    Args:
        sizes: those for PASCAL VOC, or the smaller ones for COCO (torchvision's too).
    """
    levels = []
    for level, cells in enumerate(_CELLS):
        small, large = _SIZES_PX[sizes][level : level + 2]
        shapes = [(small, small), (math.sqrt(small * large),) * 2]
        for ratio in _RATIOS[level]:
            root = math.sqrt(ratio)
            shapes += [(small * root, small / root), (small / root, small * root)]
        centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * _STEPS_PX[level]
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        places = torch.stack([x, y], -1)[:, :, None].expand(-1, -1, len(shapes), -1)
        sides = torch.tensor(shapes, dtype=torch.float64).clamp(max=INPUT_SIDE_PX)
        levels.append(torch.cat([places, sides.expand_as(places)], -1).flatten(0, 2))
    return torch.cat(levels).float()


def to_corners(boxes_cxcywh: Tensor) -> Tensor:
    """Return (..., 4) boxes as corners."""
    centres, halves = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centres - halves, centres + halves], -1)


def encode(boxes_xyxy: Tensor, defaults_cxcywh: Tensor) -> Tensor:
    """Return how boxes lie to default boxes, as regression targets (section 2.2, equation 2).

    Args:
        boxes_xyxy: (B, P, 4), each with an area.
        defaults_cxcywh: (P, 4).

    Returns:
        (B, P, 4): shift of the centre in tenths of the default box's sides, logarithm of the ratio
        of the sides in fifths.
    """
    centres = (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:]) / 2
    sides = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    shifts = (centres - defaults_cxcywh[:, :2]) / (defaults_cxcywh[:, 2:] * _CENTRE_VARIANCE)
    ratios = (sides / defaults_cxcywh[:, 2:]).log() / _SIZE_VARIANCE
    return torch.cat([shifts, ratios], -1)


def decode(offsets: Tensor, defaults_cxcywh: Tensor) -> Tensor:
    """Return the boxes (B, P, 4) xyxy that `encode` gave these offsets (B, P, 4) for.

    No side is more than 62.5 times that of the default box.
    """
    scale = defaults_cxcywh[:, 2:]
    centres = defaults_cxcywh[:, :2] + offsets[..., :2] * (scale * _CENTRE_VARIANCE)
    sides = scale * (offsets[..., 2:] * _SIZE_VARIANCE).clamp(max=_LARGEST_LOG_RATIO).exp()
    return to_corners(torch.cat([centres, sides], -1))


def decode_boxes(outputs: MultiBoxOutputs) -> Tensor:
    """Return the box of every default box, (B, P, 4) xyxy, px of the input, cut at its border."""
    boxes_BP4 = decode(outputs.offsets.float(), outputs.defaults_cxcywh)
    return boxes_BP4.clamp(0, INPUT_SIDE_PX)


def match(boxes_xyxy: Tensor, labels: Tensor, defaults_cxcywh: Tensor) -> Tensor:
    """Choose the object that each default box has to predict (section 2.2).

    It is the one with the largest IoU, if that is 0.5 or more; but every object gets the default
    box with which its own IoU is largest. Where several want the same one, the last of them gets
    it, as in amdegroot's code.

    Args:
        boxes_xyxy: (B, M, 4); those without an area are no objects.
        labels: (B, M), negative where there is no object.
        defaults_cxcywh: (P, 4).

    Returns:
        (B, P) int64: 0..M-1, or -1 for background.
    """
    batch, count = len(labels), len(defaults_cxcywh)
    exists = (labels >= 0) & (boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all(-1)
    images, numbers = exists.nonzero(as_tuple=True)
    iou_NP = _iou(boxes_xyxy[images, numbers], to_corners(defaults_cxcywh))
    rows, places = (iou_NP >= _MATCHING_IOU).nonzero(as_tuple=True)
    # What an object is given comes before all that it has an IoU with, the last object's first.
    values = torch.cat([iou_NP[rows, places], 2.0 + numbers])
    rows = torch.cat([rows, torch.arange(len(numbers), device=numbers.device)])
    places = images[rows] * count + torch.cat([places, iou_NP.argmax(1)])
    keys = torch.full((batch * count,), -1, device=labels.device)
    keys.scatter_reduce_(0, places, _sorting_keys(values, numbers[rows]), "amax")
    return (-keys & _LOW_BITS).where(keys >= 0, -1).view(batch, count)


def _sorting_keys(values: Tensor, numbers: Tensor) -> Tensor:
    """Return int64 keys in the order of `values`; of equal ones the lowest number is largest.

    Args:
        values: float32, 0 or more.
        numbers: int64 of 0..2^32-1, which `-key & _LOW_BITS` gives back.
    """
    # Without a sign, the bits of floats are in the order of the floats.
    return values.view(torch.int32).long() * 2**32 - numbers


def _iou(boxes_xyxy: Tensor, defaults_xyxy: Tensor) -> Tensor:
    """Return (N, P), the intersection over union of (N, 4) and (P, 4) boxes."""
    # A plane a coordinate: the last axis is then the long one, which is vectorised.
    x1, y1, x2, y2 = boxes_xyxy[..., None].unbind(1)
    left, top, right, bottom = defaults_xyxy.T.contiguous()
    width = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_(min=0)
    height = torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_(min=0)
    intersection = width.mul_(height)
    union = ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top)).sub_(intersection)
    return intersection.div_(union)


def multibox_loss(
    outputs: MultiBoxOutputs, target: BoxTarget, mean_over_ranks: MeanOverRanks, *, negatives: int
) -> dict[str, Tensor]:
    """Smooth L1 of the offsets of matched default boxes plus cross entropy (equations 1 to 3).

    The cross entropy is that of the matched ones and, in each image, of `negatives` times as many
    others: those that are least seen as background. Both sums are divided by the number of matched
    default boxes, averaged over ranks.

    Args:
        outputs: of the model.
        target: objects, padded.
        mean_over_ranks: averages a count over all ranks.
        negatives: background boxes for each matched one.

    Returns:
        "loss", "loss_boxes" and "loss_classes": scalars, zero where no image has an object.
    """
    with torch.autocast(outputs.logits.device.type, enabled=False):
        return _multibox_loss(outputs, target, mean_over_ranks, negatives)


def _multibox_loss(
    outputs: MultiBoxOutputs, target: BoxTarget, mean_over_ranks: MeanOverRanks, negatives: int
) -> dict[str, Tensor]:
    offsets, logits, defaults = outputs
    matched = match(*target, defaults)
    is_matched = matched >= 0
    images, places = is_matched.nonzero(as_tuple=True)
    numbers = matched[images, places]
    of_boxes = F.smooth_l1_loss(
        offsets[images, places].float(),
        encode(target.boxes[images, numbers], defaults[places]),
        reduction="sum",
    )
    others, is_scored = _hardest(logits.detach().float(), is_matched, negatives)
    # One indexing for both kinds: the gradient of each is as large as the logits.
    rows = torch.arange(len(others), device=others.device).repeat_interleave(others.shape[1])
    images, places = torch.cat([images, rows]), torch.cat([places, others.flatten()])
    classes = F.pad(target.labels[images[: len(numbers)], numbers] + 1, (0, len(rows)))
    weights = F.pad(is_scored.flatten().float(), (len(numbers), 0), value=1.0)
    losses = F.cross_entropy(logits[images, places].float(), classes, reduction="none")
    # One in all of many ranks is a mean below 1; without any both sums are 0.
    positives = mean_over_ranks(is_matched.sum().float())
    positives = positives.where(positives > 0, 1.0)
    of_boxes = of_boxes / positives
    of_classes = (losses * weights).sum() / positives
    return {"loss": of_boxes + of_classes, "loss_boxes": of_boxes, "loss_classes": of_classes}


def _hardest(logits: Tensor, is_matched: Tensor, negatives: int) -> tuple[Tensor, Tensor]:
    """Choose the unmatched default boxes that are least seen as background.

    Args:
        logits: (B, P, K + 1).
        is_matched: (B, P).
        negatives: how many for each matched one.

    Returns:
        Numbers of default boxes, (B, N) for the N of the image with most, worst first and of equals
        the first one first, and whether each is among its own image's, (B, N).
    """
    numbers = torch.arange(logits.shape[1], device=logits.device)
    keys = _sorting_keys(logits.log_softmax(-1)[..., 0].abs(), numbers)
    counts = is_matched.sum(1, keepdim=True)
    counts = torch.minimum(negatives * counts, len(numbers) - counts)
    hardest = keys.masked_fill_(is_matched, -_LOW_BITS).topk(int(counts.max())).indices
    return hardest, numbers[: hardest.shape[1]] < counts


def decode_detections(outputs: MultiBoxOutputs, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Turn outputs into detections: scores above 0.01, each class suppressed at IoU 0.45, best 200.

    Args:
        outputs: of the model.
        size: (height, width) of the image whose pixels the boxes are to be in.

    Returns:
        An image's "boxes" (N, 4) xyxy, px, cut at its border, "scores" (N,) descending and "labels"
        (N,) int64 of 0..K-1.
    """
    # Imported by who detects: torchvision takes longer to import than torch itself.
    from torchvision.ops import batched_nms  # noqa: PLC0415

    boxes_BP4 = decode_boxes(outputs)
    scores_BKP = outputs.logits.float().softmax(-1)[..., 1:].transpose(1, 2)
    most = min(_CANDIDATES_PER_CLASS, scores_BKP.shape[2])
    scores_BKN, places_BKN = scores_BKP.topk(most, dim=2)
    scale = boxes_BP4.new_tensor([size[1], size[0]]).repeat(2) / INPUT_SIDE_PX
    detections = []
    for boxes_P4, scores_KN, places_KN in zip(boxes_BP4, scores_BKN, places_BKN, strict=True):
        labels, numbers = (scores_KN > _LEAST_SCORE).nonzero(as_tuple=True)
        scores, boxes = scores_KN[labels, numbers], boxes_P4[places_KN[labels, numbers]]
        kept = batched_nms(boxes, scores, labels, _NMS_IOU)[:_KEPT_PER_IMAGE]
        detections.append(
            {"boxes": boxes[kept] * scale, "scores": scores[kept], "labels": labels[kept]}
        )
    return detections
