"""mIoU over a whole set, exact however the set was split over workers.

One confusion matrix of 64-bit counts is all the state; matrices of parts add up to the matrix of
the whole. Spec: HILA 5.1 (intersections and unions summed over the set, mean over classes).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.structures import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class SegmentationScores:
    """What a confusion matrix says.

    Args:
        iou: (K,) intersection over union of each class in [0, 1], NaN where neither truth nor
            prediction holds the class.
        accuracy: (K,) recall of each class, NaN where the truth lacks it.
        pixels: (K,) truth pixels of each class.
        pixel_accuracy: fraction of scored pixels that are right.
    """

    iou: Tensor
    accuracy: Tensor
    pixels: Tensor
    pixel_accuracy: float

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that occur."""
        return float(self.iou.nanmean())

    @property
    def mean_accuracy(self) -> float:
        """Mean of `accuracy` over the classes of the truth."""
        return float(self.accuracy.nanmean())


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
