"""Run a recipe over a data set and count: the protocols of training's validation and of `evaluate`.

Each rank takes its own part of the set, without padding; counts are summed over the ranks, so every
image counts once on any number of workers.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from xattn.evaluate.segmentation import SegmentationScores, confusion_matrix, score
from xattn.structures import Batch, Recipe

SumOverRanks = Callable[[Tensor], Tensor]


class ProtocolConfig(BaseModel):
    """What a model is scored on.

    Args:
        split: the split to score.
        batch: images at once, where their sizes agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    batch: int = Field(default=8, gt=0)


@dataclass(frozen=True, slots=True)
class ClassificationScores:
    """A classifier's answers: (K, K) confusion, rows the truth, and hits in the top five."""

    confusion: Tensor
    in_top5: int

    @property
    def images(self) -> int:
        """Number of images scored."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Fraction of images whose best class is right."""
        return float(self.confusion.diagonal().sum()) / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Fraction of images whose class is among the five best."""
        return self.in_top5 / max(self.images, 1)


@torch.inference_mode()
def score_segmentation(
    recipe: Recipe,
    batches: Iterable[Batch],
    num_classes: int,
    device: torch.device,
    sum_over_ranks: SumOverRanks,
    on_batch: Callable[[Batch, Tensor], None] = lambda _batch, _prediction: None,
) -> SegmentationScores:
    """Score a segmentation recipe on this rank's batches and sum over the ranks.

    Args:
        recipe: its model is put into eval mode and left there.
        batches: images and truth; the prediction is resized to the truth's size.
        num_classes: K.
        device: where the model is.
        sum_over_ranks: adds a tensor over the ranks.
        on_batch: called with each batch and its prediction (B, H, W) of class ids at truth size.
    """
    recipe.model.eval()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for batch in batches:
        on_device = batch.to(device)
        height, width = on_device.target.shape[-2:]
        logits = recipe.decode(recipe.model(on_device.images), (height, width))
        prediction = logits.argmax(dim=1)
        confusion += confusion_matrix(prediction, on_device.target, num_classes)
        on_batch(batch, prediction)
    return score(sum_over_ranks(confusion))


@torch.inference_mode()
def score_classification(
    recipe: Recipe,
    batches: Iterable[Batch],
    num_classes: int,
    device: torch.device,
    sum_over_ranks: SumOverRanks,
    on_batch: Callable[[Batch, Tensor], None] = lambda _batch, _prediction: None,
) -> ClassificationScores:
    """Score a classifier as `score_segmentation` does; `on_batch` gets the logits (B, K)."""
    recipe.model.eval()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    in_top5 = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        on_device = batch.to(device)
        logits = recipe.model(on_device.images)
        confusion += confusion_matrix(logits.argmax(dim=1), on_device.target, num_classes)
        best = logits.topk(min(5, num_classes), dim=1).indices
        in_top5 += (best == on_device.target[:, None]).any(dim=1).sum()
        on_batch(batch, logits)
    return ClassificationScores(sum_over_ranks(confusion).cpu(), int(sum_over_ranks(in_top5)))


def headline(scores: SegmentationScores | ClassificationScores) -> tuple[str, float]:
    """Return the name and value of the one number by which runs of a task are compared."""
    if isinstance(scores, SegmentationScores):
        return "mIoU", scores.mean_iou
    return "top1", scores.top1


def metrics_of(scores: SegmentationScores | ClassificationScores) -> Mapping[str, float]:
    """Return every scalar of the scores by its name."""
    if isinstance(scores, SegmentationScores):
        return {
            "mIoU": scores.mean_iou,
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_accuracy": scores.mean_accuracy,
        }
    return {"top1": scores.top1, "top5": scores.top5}
