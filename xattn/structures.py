"""The nouns that travel between the rooms: Sample, DatasetInfo, Batch, Recipe, TokenAttention.

`Sample` and `DatasetInfo` never see torch, so that sharding works where torch is not installed. The
types that hold tensors name them in annotations only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch import device as torch_device

Task = Literal["classification", "segmentation", "detection"]

Counting = Literal["segformer", "fvcore", "products"]
"""How a paper counts multiply-adds, see `evaluate.cost`."""

IGNORE_INDEX = 255
"""Label, in every target tensor, of pixels that neither train nor score."""


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What is known of a data set without opening it.

    Args:
        name: the reader's name.
        tasks: what its samples can train.
        class_names: foreground classes in the order of their ids 0..K-1 (segmentation: all that
            are scored).
        palette: K colours (red, green, blue), 0..255, for drawing.
        splits: the names of its splits; the first one trains.
        ignore_ids: values in the mask files that mean "do not train or score here".
        licence: licence or terms of use in a few words.
        url: where the data set is described or had from; empty for generated data.
        citation: one line.
        layout: the expected tree on disk, as a user would draw it.
    """

    name: str
    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    splits: tuple[str, ...]
    ignore_ids: tuple[int, ...]
    licence: str
    url: str
    citation: str
    layout: str

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return len(self.class_names)


@dataclass(frozen=True, slots=True)
class Box:
    """One object: corners in pixels of the stored image, edges at pixel borders (w = x2 - x1).

    Args:
        class_id: 0..K-1.
        x1, y1, x2, y2: left, top, right and bottom edge.
        difficult: VOC's mark of what need not be found.
        crowd: COCO's mark of a group that is outlined as one.
        area: px squared, by which COCO calls objects small or large: that of the outline, not of
            the box; None where the data set has none.
    """

    class_id: int
    x1: float
    y1: float
    x2: float
    y2: float
    difficult: bool = False
    crowd: bool = False
    area: float | None = None

    @property
    def is_sought(self) -> bool:
        """Whether it is to be learnt and to be found."""
        return not self.difficult and not self.crowd


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with everything known about it, encoded as it is stored.

    Args:
        key: unique in its split, without dots or slashes (a WebDataset key ends at the first dot).
        image: the bytes of a JPEG or PNG file.
        image_format: which of the two.
        source: the raw image file, for error messages.
        mask: the bytes of a single-channel 8-bit PNG of class ids with the image's size.
        label: class id of the whole image.
        boxes: the objects; an empty tuple says that there are none, None that nobody looked.
    """

    key: str
    image: bytes
    image_format: Literal["jpg", "png"]
    source: str
    mask: bytes | None = None
    label: int | None = None
    boxes: tuple[Box, ...] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step takes.

    Args:
        images: (B, 3, H, W) float32, normalised by the ImageNet mean and deviation (uint8 as stored
            where the loader was given no transform).
        target: what the task's loss takes. Segmentation: (B, H, W) int64 with ids 0..K-1 or
            IGNORE_INDEX; classification: (B,) int64, or (B, K) shares of mixed images; detection:
            `BoxTarget`.
        keys: the B sample keys.
        sizes: the B original (height, width) in pixels.
        damaged: what was wrong with samples that others took the place of.
        objects: of detection, all that is marked in each of the B stored images.
    """

    images: Tensor
    target: Any
    keys: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    damaged: tuple[str, ...] = ()
    objects: tuple[tuple[Box, ...], ...] = ()

    def to(self, device: str | torch_device, channels_last: bool = False) -> Batch:
        """Return this batch on `device`; pinned memory is copied without waiting."""
        import torch  # noqa: PLC0415 (this module is imported where torch is not installed)

        memory_format = torch.channels_last if channels_last else torch.preserve_format
        images = self.images.to(device, non_blocking=True, memory_format=memory_format)
        return self._with(images, lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return this batch in page-locked memory, from which a GPU copies."""
        return self._with(self.images.pin_memory(), lambda part: part.pin_memory())

    def _with(self, images: Tensor, change: Callable[[Tensor], Tensor]) -> Batch:
        is_single = not isinstance(self.target, BoxTarget)
        target = change(self.target) if is_single else BoxTarget(*map(change, self.target))
        return replace(self, images=images, target=target)


class BoxTarget(NamedTuple):
    """The objects of a batch, padded to as many an image as the one with most has.

    Args:
        boxes: (B, M, 4) float32 x1, y1, x2, y2 in pixels of the images that the model takes, edges
            at pixel borders; M may be 0.
        labels: (B, M) int64 of 0..K-1, -1 where there is no object.
    """

    boxes: Tensor
    labels: Tensor


MeanOverRanks = Callable[["Tensor"], "Tensor"]
"""Averages a tensor over all ranks without gradient; the identity in a single process."""


def identity_mean(value: Tensor) -> Tensor:
    """Return `value`: the mean over ranks when there is only one."""
    return value


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model with what turns its outputs into a loss and into predictions.

    Args:
        model: plain module with only `forward(images (B, 3, H, W))`.
        loss: (outputs, target, mean_over_ranks) -> named scalars; "loss" is the one to descend, the
            others are reported. The target is a `Batch`'s. A sum over samples or pixels is divided
            by a count that does not depend on how the batch was split over ranks, for which it may
            ask `mean_over_ranks`.
        decode: (outputs, (height, width)) -> prediction. Segmentation: (B, K, height, width);
            classification: (B, K), both logits (of SegViT scores, not below 0);
            detection: torchvision's list of dicts.
        task: what the model is for.
        counting: how the model's paper counts multiply-adds.
    """

    model: nn.Module
    loss: Callable[[Any, Any, MeanOverRanks], dict[str, Tensor]]
    decode: Callable[[Any, tuple[int, int]], Any]
    task: Task
    counting: Counting = "segformer"


BoxXyxyPx = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels of the stored image, from its upper left corner."""


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """How a token's attention spreads over the cells of a finer stage.

    Args:
        stages: the stages whose weights are multiplied, finest first: (2, 3, 4) is the paper's A41.
        box: what `values` cover; there is nothing beyond.
        values: of the cells within `box`, row by row, at least 0.
    """

    stages: tuple[int, ...]
    box: BoxXyxyPx
    values: tuple[tuple[float, ...], ...]

    @property
    def title(self) -> str:
        """The paper's name for it, e.g. "stage 3 & 4"."""
        return f"stage {' & '.join(map(str, self.stages))}"


@dataclass(frozen=True, slots=True)
class TokenAttention:
    """Hierarchical attention of one token of the coarsest exchanging stage.

    Args:
        point: (x, y) that chose the token, px of the stored image.
        box: the token's patch, where its first map lives.
        maps: coarsest first, each with one more stage.
    """

    point: tuple[float, float]
    box: BoxXyxyPx
    maps: tuple[AttentionMap, ...]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What `xattn models` prints about one model.

    Args:
        name: the model's name in `create_model`.
        system: the paper's system, e.g. "HILA".
        task: what it is for.
        num_classes: classes at which the numbers below were counted (the paper's own).
        input: (channels, height, width) at which MACs were counted.
        params: trainable parameters.
        macs: multiply-adds of one forward pass, by the rule that `counting` names.
        counting: the paper's rule.
        paper_params: as printed in the paper, in units; None where it does not say.
        paper_macs: likewise.
        source: paper and table.
        notes: anything a reader must know before comparing.
    """

    name: str
    system: str
    task: Task
    num_classes: int
    input: tuple[int, int, int]
    params: int
    macs: int
    counting: Counting
    paper_params: float | None
    paper_macs: float | None
    source: str
    notes: str = ""


@dataclass(slots=True)
class Progress:
    """Counts of a long job, given to whoever draws a bar or writes a log."""

    done: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
