"""Run a recipe over a data set and count: the protocols of training's validation and of `evaluate`.

Each rank takes its own part of the set, without padding; counts are summed over the ranks, so every
image counts once on any number of workers.

A segmentation model sees an image whole or in sliding windows, at one scale or several, with or
without its mirror image (spec HILA 5.1, SegViT 5.2). Windows lie as in mmsegmentation: every
`stride`, the last one moved back to the border. Their logits are averaged where they overlap, then
resized (bilinear) to the truth's size; of several views the probabilities are averaged.
Where a model decodes to scores (SegViT's, which are not below 0 and no logits), windows average
those and views their softmax, as its authors' framework does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from xattn.data.pixels import Positive, Size
from xattn.data.transforms import SegmentationEval
from xattn.evaluate.boundary import BoundaryConfig
from xattn.evaluate.detection import DetectionScores, SeenImage, detection_scores
from xattn.evaluate.segmentation import (
    SegmentationMeter,
    SegmentationScores,
    SumOverRanks,
    confusion_matrix,
)
from xattn.structures import Batch, Recipe, Task


class ProtocolConfig(BaseModel):
    """What a model is scored on.

    Args:
        split: the split to score.
        batch: images at once, where their sizes agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    batch: int = Field(default=8, gt=0)


class SlidingWindow(BaseModel):
    """Parts of an image that a model sees one by one.

    Args:
        crop: (height, width) of a window, px; that of a smaller image is the image.
        stride: (rows, columns) from one window to the next, px, at most `crop`.
        batch: windows at once; at least one of each image of the batch is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop: Size
    stride: Size
    batch: int = Field(default=4, gt=0)

    @model_validator(mode="after")
    def _check_no_gaps(self) -> Self:
        if self.stride[0] > self.crop[0] or self.stride[1] > self.crop[1]:
            raise ValueError(
                f"stride is {list(self.stride)}, expected at most crop, {list(self.crop)}"
            )
        return self

    def places(self, size: Size) -> list[tuple[slice, slice]]:
        """Return the rows and columns of every window of an image of `size`, row by row."""
        sides = (
            [slice(start, start + crop) for start in window_starts(length, crop, stride)]
            for length, crop, stride in zip(size, self.crop, self.stride, strict=True)
        )
        return list(product(*sides))


class SegmentationProtocol(SegmentationEval):
    """How a segmentation model is shown an image for its final score.

    Args:
        shortest: the image, already scaled by a ratio, is scaled up until its short side has this,
            px, whatever `base` says: for models that take no window smaller than their crop.
        ratios: scales whose predictions are averaged; they multiply `base`.
        flip: whether each scale is also seen in the mirror.
        average: what is averaged over scales and mirror images.
        window: parts that each of them is seen in; None for the whole image at once.
    """

    shortest: int | None = Field(default=None, gt=0)
    ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    flip: bool = False
    average: Literal["probabilities", "logits"] = "probabilities"
    window: SlidingWindow | None = None

    @model_validator(mode="after")
    def _check_shortest(self) -> Self:
        if self.shortest is not None and self.size is not None:
            raise ValueError(f"shortest is {self.shortest}, expected none beside size")
        return self

    @property
    def num_views(self) -> int:
        """Number of scales and mirror images."""
        return len(self.ratios) * (2 if self.flip else 1)

    @property
    def of_loader(self) -> SegmentationEval | None:
        """What the loader does to an image: all for a single view, else nothing."""
        return self if self.num_views == 1 else None

    def prepare(self, image: Tensor, ratio: float | None = None) -> Tensor:
        """Return the image resized and normalised; without a ratio by the first one."""
        return super().prepare(image, self.ratios[0] if ratio is None else ratio)

    def output_size(self, size: Size, ratio: float = 1.0) -> Size:
        """Return the (height, width) that an image of `size` gets at a scale, px."""
        fitted = super().output_size(size, ratio)
        if self.shortest is None or min(fitted) >= self.shortest:
            return fitted
        bound = self.model_copy(update={"base": (self.shortest, _NO_LIMIT), "shortest": None})
        return bound.output_size(size)

    def describe(self) -> str:
        """Return the protocol in words, resizing in brackets."""
        how = "whole image"
        if self.window is not None:
            crop, stride = (" x ".join(map(str, s)) for s in (self.window.crop, self.window.stride))
            how = f"windows of {crop} every {stride} px, logits averaged"
        views = "single scale"
        if self.ratios != (1.0,):
            views = f"scales {', '.join(f'{ratio:g}' for ratio in self.ratios)}"
        views += " and mirrored" if self.flip else ""
        views += f", {self.average} averaged" if self.num_views > 1 else ""
        resizing = self.model_dump(
            mode="json", exclude_none=True, include={*SegmentationEval.model_fields, "shortest"}
        )
        shown = ", ".join(f"{name} {value}" for name, value in resizing.items())
        return f"{how}, {views} ({shown})"


PLAIN = SegmentationProtocol()
"""Each image whole and once."""

_NO_LIMIT = 2**31  # px


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Return where windows begin on a side of `length` px: 0, stride, ..., the last at the border.

    A side that is not longer than `crop` has one window, from 0.
    """
    last = max(length - crop, 0)
    return [min(number * stride, last) for number in range(-(-last // stride) + 1)]


def segment(recipe: Recipe, images: Tensor, size: Size, protocol: SegmentationProtocol) -> Tensor:
    """Return what a model says of every pixel by a protocol.

    Args:
        recipe: its model is in eval mode.
        images: (B, 3, H, W) on the model's device: of a protocol of one view float32 as `prepare`
            makes them, of several uint8 RGB.
        size: (height, width) of the result, px.
        protocol: windows and views.

    Returns:
        (B, K, height, width): logits, or the mean probabilities if the protocol averages these.
    """
    if protocol.num_views == 1:
        return _logits(recipe, images, size, protocol.window)
    assert images.dtype == torch.uint8, images.dtype
    total: Tensor | None = None
    for ratio in protocol.ratios:
        # One by one: as the loader does, and so alike in any batch.
        view = torch.stack([protocol.prepare(image, ratio) for image in images])
        for is_mirrored in (False, True)[: 2 if protocol.flip else 1]:
            logits = _logits(recipe, view.flip(-1) if is_mirrored else view, size, protocol.window)
            scores = logits.flip(-1) if is_mirrored else logits
            if protocol.average == "probabilities":
                scores = scores.softmax(dim=1)
            total = scores if total is None else total.add_(scores)
    assert total is not None
    return total.div_(protocol.num_views)


def _logits(recipe: Recipe, images: Tensor, size: Size, window: SlidingWindow | None) -> Tensor:
    """Return the logits (B, K, *size) of prepared images."""
    if window is None:
        whole: Tensor = recipe.decode(recipe.model(images), size)
        return whole
    logits = slide(recipe, images, window)
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def slide(recipe: Recipe, images: Tensor, window: SlidingWindow) -> Tensor:
    """Return the logits of prepared images seen in windows, averaged where these overlap.

    Args:
        recipe: its model is in eval mode.
        images: (B, 3, H, W) float32, normalised.
        window: the windows; at most max(`window.batch`, B) are in the model at once.

    Returns:
        (B, K, H, W).
    """
    height, width = images.shape[-2:]
    places = window.places((height, width))
    at_once = max(1, window.batch // len(images))
    counts = images.new_zeros(height, width)
    total: Tensor | None = None
    for first in range(0, len(places), at_once):
        chunk = places[first : first + at_once]
        parts = _window_logits(recipe, images, chunk)
        if total is None:
            total = parts.new_zeros(len(images), parts.shape[1], height, width)
        for place, part in zip(chunk, parts.split(len(images)), strict=True):
            total[(..., *place)] += part
            counts[place] += 1
    assert total is not None
    return total.div_(counts)


def _window_logits(recipe: Recipe, images: Tensor, places: Sequence[tuple[slice, slice]]) -> Tensor:
    """Return the logits (P x B, K, h, w) of some windows, those of one place together."""
    windows = torch.cat([images[(..., *place)] for place in places])
    logits: Tensor = recipe.decode(recipe.model(windows), (windows.shape[-2], windows.shape[-1]))
    return logits


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
    *,
    protocol: SegmentationProtocol = PLAIN,
    boundary: BoundaryConfig | None = None,
    crops: Sequence[Size] = (),
) -> SegmentationScores:
    """Score a segmentation recipe on this rank's batches and sum over the ranks.

    Args:
        recipe: its model is put into eval mode and left there.
        batches: images (as `segment` takes them) and truth; the prediction has the truth's size.
        num_classes: K.
        device: where the model is.
        sum_over_ranks: adds a tensor over the ranks.
        on_batch: called with each batch and its prediction (B, H, W) of class ids at truth size.
        protocol: windows and views; the default shows each image whole and once.
        boundary: the boundary scores to take, if any.
        crops: distance crops to score beside the whole image, (height, width), px.
    """
    recipe.model.eval()
    meter = SegmentationMeter(num_classes, device, boundary, crops)
    for batch in batches:
        on_device = batch.to(device)
        height, width = on_device.target.shape[-2:]
        prediction = segment(recipe, on_device.images, (height, width), protocol).argmax(dim=1)
        meter.add(prediction, on_device.target)
        on_batch(batch, prediction)
    return meter.scores(sum_over_ranks)


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


@torch.inference_mode()
def score_detection(
    recipe: Recipe,
    batches: Iterable[Batch],
    num_classes: int,
    device: torch.device,
    gather_over_ranks: Callable[[list[SeenImage]], list[list[SeenImage]]],
    on_batch: Callable[[Batch, list[SeenImage]], None] = lambda _batch, _seen: None,
) -> DetectionScores:
    """Score a detector on the images of all ranks; these must have different keys.

    Args:
        recipe: its model is put into eval mode and left there.
        batches: this rank's.
        num_classes: K.
        device: where the model is.
        gather_over_ranks: returns the lists of all ranks.
        on_batch: called with each batch and what was found in its images.

    Raises:
        DataError: no image has an object that is to be found.
    """
    recipe.model.eval()
    seen: list[SeenImage] = []
    for batch in batches:
        found = detect(recipe, batch.images.to(device), batch.sizes)
        own = [
            SeenImage(*row)
            for row in zip(batch.keys, batch.sizes, found, batch.objects, strict=True)
        ]
        on_batch(batch, own)
        seen += own
    return detection_scores(
        [image for part in gather_over_ranks(seen) for image in part], num_classes
    )


def detect(recipe: Recipe, images: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
    """Return what a detector finds in each image, on the CPU.

    Args:
        recipe: its model is in eval mode.
        images: (B, 3, H, W) float32, normalised, on the model's device.
        sizes: the B (height, width) in whose pixels the boxes are to be.

    Returns:
        "boxes" (N, 4) xyxy, "scores" (N,) descending, "labels" (N,).
    """
    # In fractions of the image, since images of all sizes share a batch.
    decoded = recipe.decode(recipe.model(images), (1, 1))
    return [
        {
            **{name: value.cpu() for name, value in found.items()},
            "boxes": found["boxes"].cpu() * torch.tensor([width, height, width, height]),
        }
        for found, (height, width) in zip(decoded, sizes, strict=True)
    ]


HEADLINE: Mapping[Task, str] = {
    "segmentation": "mIoU",
    "classification": "top1",
    "detection": "mAP_50",
}
"""The metric by which runs of a task are compared."""

Scores = SegmentationScores | ClassificationScores | DetectionScores


def metrics_of(scores: Scores) -> Mapping[str, float]:
    """Return every scalar of the scores by its name; those of a crop end with its size."""
    if isinstance(scores, DetectionScores):
        return scores.metrics()
    if isinstance(scores, ClassificationScores):
        return {"top1": scores.top1, "top5": scores.top5}
    named = {
        "mIoU": scores.mean_iou,
        "pixel_accuracy": scores.pixel_accuracy,
        "mean_accuracy": scores.mean_accuracy,
    }
    if scores.boundary is not None:
        named |= scores.boundary.metrics()
    for (height, width), part in scores.crops.items():
        named |= {f"{name}_{height}x{width}": value for name, value in metrics_of(part).items()}
    return named
