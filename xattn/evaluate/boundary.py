"""Boundary F: how much of the outlines of truth and prediction lies within some px of the other.

Measure: Perazzi et al. 2016 (DAVIS), per class as in GSCNN and HILA (spec HILA 5.2), or of the
union of all outlines of an image, as HILA scores ADE20K (5.3). Written from these definitions; the
fault of HILA's code, which compares ADE20K's class k with class k - 1, is not repeated.

An outline pixel is one whose class differs from its right, lower or lower right neighbour. Few
pixels are, so all of it is done on those alone, and on all classes at once: each class that occurs
is a bit of a 32-bit integer, the truth's outlines are one map of such integers, and a predicted
pixel looks its bits up at every offset of a disk, the nearest first, until all are found.

Letters: R radii, K classes, N outline pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from xattn.data.pixels import Positive, Size
from xattn.structures import IGNORE_INDEX

THRESHOLDS = {
    "meant": (0.00088, 0.001875, 0.00375, 0.005),
    "printed": (0.000088, 0.001875, 0.00375, 0.005),
}
"""Fractions of the diagonal: 3, 5, 9, 12 px at 1024x2048. HILA's misprint makes 1 px of the 3."""

_BITS = 31  # classes in an int32, whose sign stays free
_UNIT = 2**40  # F is summed in whole 2^-40, so that no order of images, batches or ranks matters


class BoundaryConfig(BaseModel):
    """Which boundary scores to take. A threshold below 1 is a fraction of the diagonal, else px.

    Args:
        thresholds: of the F of each class: "meant" or "printed" in HILA's paper, or numbers.
        image_thresholds: of the F of all classes' outlines together; HILA's is 3 px on ADE20K.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    thresholds: Literal["meant", "printed"] | tuple[Positive, ...] = "meant"
    image_thresholds: tuple[Positive, ...] = ()

    @property
    def numbers(self) -> tuple[float, ...]:
        """The thresholds of the classes as numbers."""
        named = self.thresholds
        return THRESHOLDS[named] if isinstance(named, str) else named

    def describe(self) -> str:
        """Return the thresholds in words."""
        kinds = (("boundary F", self.numbers), ("image-wise boundary F", self.image_thresholds))
        parts = [f"{name} within {_in_words(numbers)}" for name, numbers in kinds if numbers]
        return "; ".join(parts)


def _in_words(thresholds: Sequence[float]) -> str:
    pixels = ", ".join(f"{threshold:g}" for threshold in thresholds if threshold >= 1)
    parts = ", ".join(f"{threshold:g}" for threshold in thresholds if threshold < 1)
    words = [f"{pixels} px"] if pixels else []
    return " and ".join([*words, f"{parts} of the scored part's diagonal"] if parts else words)


@dataclass(frozen=True, slots=True)
class BoundaryScores:
    """Means over the images of a set, fractions in [0, 1], float64.

    Args:
        f: (K,) for each threshold; an image that lacks a class in both counts as 1 for it.
        image_f: for each threshold of whole images.
    """

    f: dict[float, Tensor]
    image_f: dict[float, float]

    def metrics(self) -> dict[str, float]:
        """Return the means over classes by name; "boundary_F" alone is the first threshold's."""
        means = {threshold: float(f.mean()) for threshold, f in self.f.items()}
        return _by_name("boundary_F", means) | _by_name("image_boundary_F", self.image_f)


def _by_name(name: str, scores: dict[float, float]) -> dict[str, float]:
    named = {f"{name}_{threshold:g}": value for threshold, value in scores.items()}
    return {name: next(iter(scores.values())), **named} if scores else {}


class BoundaryMeter:
    """Sums boundary F over images, exactly: parts add up to the whole bit for bit."""

    def __init__(self, config: BoundaryConfig, num_classes: int, device: torch.device) -> None:
        assert num_classes <= IGNORE_INDEX, num_classes
        self._config, self._num_classes = config, num_classes
        per_class = len(config.numbers), num_classes
        self._sums = torch.zeros(per_class, dtype=torch.int64, device=device)
        self._image_sums = self._sums.new_zeros(len(config.image_thresholds))
        self._images = self._sums.new_zeros(())

    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Count images: class ids (B, H, W), of the target also IGNORE_INDEX."""
        size = target.shape[-2], target.shape[-1]
        radii = [tolerance_px(threshold, size) for threshold in self._config.numbers]
        image_radii = [tolerance_px(t, size) for t in self._config.image_thresholds]
        for predicted, true in zip(prediction, target, strict=True):
            outlines = _outlines(predicted, true)
            f = _class_f(*outlines, self._num_classes, radii)
            self._sums += (f * _UNIT).round().long()
            self._image_sums += (_image_f(*outlines, image_radii) * _UNIT).round().long()
        self._images += len(target)

    def scores(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> BoundaryScores:
        """Return the means over every rank's images; NaN when there are none."""
        images = sum_over_ranks(self._images).double().cpu()
        f = sum_over_ranks(self._sums).double().cpu() / _UNIT / images
        image_f = sum_over_ranks(self._image_sums).double().cpu() / _UNIT / images
        config = self._config
        return BoundaryScores(
            dict(zip(config.numbers, f, strict=True)),
            dict(zip(config.image_thresholds, image_f.tolist(), strict=True)),
        )


def tolerance_px(threshold: float, size: Size) -> float:
    """Return the radius in px of a threshold for an image, or part of one, of `size`."""
    return threshold if threshold >= 1 else math.ceil(threshold * math.hypot(*size))


def class_boundary_f(
    prediction: Tensor, target: Tensor, num_classes: int, radii: Sequence[float]
) -> Tensor:
    """Return the boundary F of each class of one image.

    Args:
        prediction: (H, W) class ids 0..K-1.
        target: (H, W) ids 0..K-1 or IGNORE_INDEX, where neither shows any class.
        num_classes: K, 255 at most.
        radii: within which an outline counts as found, px, Euclidean; at least 0.

    Returns:
        (R, K) float64: 2PR / (P + R) of precision and recall of outline pixels; 1 where neither
        has an outline, 0 where only one has.
    """
    return _class_f(*_outlines(prediction, target), num_classes, radii)


def image_boundary_f(prediction: Tensor, target: Tensor, radii: Sequence[float]) -> Tensor:
    """Return the (R,) boundary F of all classes' outlines in one; see `class_boundary_f`."""
    return _image_f(*_outlines(prediction, target), radii)


@dataclass(frozen=True, slots=True)
class _Outline:
    """The outline pixels of an image.

    Args:
        rows, columns: (N,) where they are, px.
        labels: (4, N) uint8 classes of the pixel, its right, lower and lower right neighbour.
        size: (height, width) of the image.
    """

    rows: Tensor
    columns: Tensor
    labels: Tensor
    size: Size

    def bits(self, table: Tensor) -> Tensor:
        """Return (N,) int32: the classes, by `table` (256,), whose mask changes at each pixel."""
        own, right, lower, diagonal = table[self.labels.long()].unbind()
        changed: Tensor = (own ^ right) | (own ^ lower) | (own ^ diagonal)
        return changed


def _outlines(prediction: Tensor, target: Tensor) -> tuple[_Outline, _Outline]:
    predicted = prediction.to(torch.uint8).masked_fill(target == IGNORE_INDEX, IGNORE_INDEX)
    return _outline(predicted), _outline(target.to(torch.uint8))


def _outline(labels: Tensor) -> _Outline:
    """Find the outlines of (H, W) uint8 labels; beyond the border the last pixel goes on."""
    right = torch.cat([labels[:, 1:], labels[:, -1:]], dim=1)
    lower, diagonal = (torch.cat([part[1:], part[-1:]]) for part in (labels, right))
    neighbours = (labels, right, lower, diagonal)
    changes = (labels != right) | (labels != lower) | (labels != diagonal)
    places = changes.flatten().nonzero()[:, 0]
    return _Outline(
        places // labels.shape[1],
        places % labels.shape[1],
        torch.stack([part.flatten().index_select(0, places) for part in neighbours]),
        (labels.shape[0], labels.shape[1]),
    )


def _class_f(
    predicted: _Outline, true: _Outline, num_classes: int, radii: Sequence[float]
) -> Tensor:
    # A class without an outline in either image has F = 1.
    result = torch.ones(len(radii), num_classes, dtype=torch.float64, device=true.rows.device)
    if not radii:
        return result
    labels = torch.cat([predicted.labels.flatten(), true.labels.flatten()])
    present = torch.bincount(labels, minlength=256)[:IGNORE_INDEX].nonzero()[:, 0]
    for classes in present.split(_BITS) if len(present) else ():
        table = torch.zeros(256, dtype=torch.int32, device=classes.device)
        table[classes] = 1 << torch.arange(len(classes), dtype=torch.int32, device=classes.device)
        marked = (predicted, predicted.bits(table)), (true, true.bits(table))
        result[:, classes] = _f(*marked, len(classes), radii)
    return result


def _image_f(predicted: _Outline, true: _Outline, radii: Sequence[float]) -> Tensor:
    if not radii:
        return torch.ones(0, dtype=torch.float64, device=true.rows.device)
    marked = [torch.ones_like(outline.rows, dtype=torch.int32) for outline in (predicted, true)]
    return _f((predicted, marked[0]), (true, marked[1]), 1, radii)[:, 0]


_Marked = tuple[_Outline, Tensor]  # outline pixels, and the bits of each


def _f(predicted: _Marked, true: _Marked, num_bits: int, radii: Sequence[float]) -> Tensor:
    """Return (R, num_bits) F of every bit."""
    num_predicted, num_true = (_count(bits, num_bits) for _, bits in (predicted, true))
    precision = _hits(predicted, true, num_bits, radii) / num_predicted
    recall = _hits(true, predicted, num_bits, radii) / num_true
    f = 2 * precision * recall / (precision + recall)  # NaN where one is empty, or none is near
    return torch.where((num_predicted == 0) & (num_true == 0), 1.0, f.nan_to_num(0.0))


def _hits(own: _Marked, other: _Marked, num_bits: int, radii: Sequence[float]) -> Tensor:
    """Count, for every radius and bit, the pixels of `own` that have one of `other` that near."""
    outline, missing = own
    margin = math.floor(max(radii))
    stride = outline.size[1] + 2 * margin
    beyond = missing.new_zeros((outline.size[0] + 2 * margin) * stride)
    beyond[_places(other[0], margin, stride)] = other[1]
    places = _places(outline, margin, stride)
    total = _count(missing, num_bits)
    hits = total.new_zeros(len(radii), num_bits, dtype=torch.float64)
    for radius, ring in _rings(radii):
        found = torch.zeros_like(missing)
        for row, column in ring:
            found |= beyond.index_select(0, places + (row * stride + column))
        missing = missing & ~found
        is_left = missing != 0
        missing, places = missing[is_left], places[is_left]
        if radius in radii:
            at = torch.tensor([radius == wanted for wanted in radii], device=hits.device)
            hits[at] = (total - _count(missing, num_bits)).double()
    return hits


def _places(outline: _Outline, margin: int, stride: int) -> Tensor:
    """Return the pixels' indices into a flat map with a margin around the image."""
    return (outline.rows + margin) * stride + outline.columns + margin


def _rings(radii: Sequence[float]) -> Iterator[tuple[float, list[tuple[int, int]]]]:
    """Give ascending radii, all of `radii` among them, each with what its disk adds: (row, column).

    Whole numbers are put between, since what is found needs not be looked for any farther.
    """
    inner = -1.0
    for radius in sorted({*radii, *range(math.floor(max(radii)) + 1)}):
        reach = range(-math.floor(radius), math.floor(radius) + 1)
        ring = [(y, x) for y in reach for x in reach if inner < math.hypot(y, x) <= radius]
        yield radius, ring
        inner = radius


def _count(bits: Tensor, num_bits: int) -> Tensor:
    """Return how many of the (N,) integers have each of the lowest `num_bits` bits."""
    return torch.stack([((bits >> bit) & 1).sum() for bit in range(num_bits)])
