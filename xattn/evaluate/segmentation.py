"""mIoU over a whole set, exact however the set was split over workers.

64-bit counts are all the state; those of parts add up to those of the whole. Spec: HILA 5.1
(intersections and unions summed over the set, mean over classes) and 5.4 (distance crops).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xattn.data.pixels import Size
from xattn.evaluate.boundary import BoundaryConfig, BoundaryMeter, BoundaryScores
from xattn.structures import IGNORE_INDEX

SumOverRanks = Callable[[Tensor], Tensor]

DISTANCE_CROP_UP_PX = 50
"""How far above the middle the distance crops lie on Cityscapes: about the vanishing point."""


@dataclass(frozen=True, slots=True)
class SegmentationScores:
    """What a confusion matrix says.

    Args:
        iou: (K,) intersection over union of each class in [0, 1], NaN where neither truth nor
            prediction holds the class.
        accuracy: (K,) recall of each class, NaN where the truth lacks it.
        pixels: (K,) truth pixels of each class.
        pixel_accuracy: fraction of scored pixels that are right.
        boundary: means of the boundary F, where it was asked for.
        crops: the scores within each distance crop, by its (height, width), px.
    """

    iou: Tensor
    accuracy: Tensor
    pixels: Tensor
    pixel_accuracy: float
    boundary: BoundaryScores | None = None
    crops: Mapping[Size, "SegmentationScores"] = field(default_factory=dict)

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that occur."""
        return float(self.iou.nanmean())

    @property
    def mean_accuracy(self) -> float:
        """Mean of `accuracy` over the classes of the truth."""
        return float(self.accuracy.nanmean())


class SegmentationMeter:
    """Counts what `SegmentationScores` are made of.

    Args:
        num_classes: K.
        device: where predictions come from.
        boundary: the boundary scores to take, if any.
        crops: (height, width) of the distance crops that are scored beside the whole, px.
    """

    def __init__(
        self,
        num_classes: int,
        device: torch.device,
        boundary: BoundaryConfig | None = None,
        crops: Sequence[Size] = (),
    ) -> None:
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._boundary = BoundaryMeter(boundary, num_classes, device) if boundary else None
        self._crops = {crop: SegmentationMeter(num_classes, device, boundary) for crop in crops}

    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Count images: class ids (B, H, W), of the target also IGNORE_INDEX."""
        self._confusion += confusion_matrix(prediction, target, len(self._confusion))
        if self._boundary is not None:
            self._boundary.add(prediction, target)
        for crop, meter in self._crops.items():
            part = (..., *distance_crop((target.shape[-2], target.shape[-1]), crop))
            meter.add(prediction[part], target[part])

    def scores(self, sum_over_ranks: SumOverRanks) -> SegmentationScores:
        """Return the scores over every rank's images."""
        return replace(
            score(sum_over_ranks(self._confusion)),
            boundary=self._boundary.scores(sum_over_ranks) if self._boundary else None,
            crops={crop: meter.scores(sum_over_ranks) for crop, meter in self._crops.items()},
        )


def distance_crop(size: Size, crop: Size) -> tuple[slice, slice]:
    """Return the rows and columns of a distance crop: centred, then moved up.

    Args:
        size: (height, width) of the image, px.
        crop: (height, width) of the crop, px; one that holds the image is no crop, and one that
            would begin above the image begins at its first row.
    """
    if crop[0] >= size[0] and crop[1] >= size[1]:
        return slice(0, size[0]), slice(0, size[1])
    top = max((size[0] - crop[0]) // 2 - DISTANCE_CROP_UP_PX, 0)
    left = max((size[1] - crop[1]) // 2, 0)
    return slice(top, top + crop[0]), slice(left, left + crop[1])


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (truth, prediction), with one bincount on the tensors' device.

    Args:
        prediction: class ids 0..K-1, any shape.
        target: ids 0..K-1 or IGNORE_INDEX, same shape.
        num_classes: K.

    Returns:
        (K, K) int64, rows are the truth; ignored pixels are not counted.
    """
    valid = target != IGNORE_INDEX
    cells = target[valid].long() * num_classes + prediction[valid].long()
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def score(confusion: Tensor) -> SegmentationScores:
    """Turn a (K, K) confusion matrix, rows the truth, into scores (float64)."""
    counts = confusion.double().cpu()
    right, truth, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    # 0 / 0 is NaN on purpose: a class that does not occur has no score.
    return SegmentationScores(
        iou=right / (truth + predicted - right),
        accuracy=right / truth,
        pixels=truth.long(),
        pixel_accuracy=float(right.sum() / counts.sum().clamp(min=1)),
    )
