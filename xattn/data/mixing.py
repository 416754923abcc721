"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of the samples of a batch.

As timm does it for a whole batch at once ("batch" mode, data/mixup.py of timm 1.0.31), with the
numbers of PVT and HILA: one kind, one share and one box for all samples of a step. With a generator
made from (seed, step) and the partners of `order.mixing_partners`, the same samples are mixed alike
on any number of ranks; timm mixes each rank's batch with its own mirror image, by the rank's draws.
"""

import random
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from xattn.data.pixels import Probability, Size, draw_below, size_of

_Box = tuple[slice, slice]
"""Rows and columns."""


class ClassificationMix(BaseModel):
    """Each image is mixed with its partner, and so are their soft targets.

    Args:
        mixup: both parameters of the Beta distribution of an image's own share in a blend of both;
            0 for no blends.
        cutmix: the same where a box of the partner is pasted into the image; 0 for no boxes.
        switch: probability of a box where both are on.
        probability: that the batch is mixed at all.
        label_smoothing: share of probability spread evenly over all classes; the loss then does not
            smooth again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mixup: float = Field(default=0.8, ge=0, allow_inf_nan=False)
    cutmix: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    switch: Probability = 0.5
    probability: Probability = 1.0
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if self.mixup == 0 and self.cutmix == 0:
            raise ValueError("mixup and cutmix are both 0, expected at least one above 0")
        return self

    def __call__(
        self,
        images: Tensor,
        target: Tensor,
        num_classes: int,
        partners: Sequence[int],
        rng: random.Random,
    ) -> tuple[Tensor, Tensor]:
        """Mix a batch, or the part of it that one rank holds.

        Args:
            images: (B, 3, H, W) float32.
            target: (B,) ids 0..num_classes-1.
            num_classes: K.
            partners: B indices into this batch; what is its own partner stays as it is.
            rng: in the same state on all ranks.

        Returns:
            Images like `images`, and targets (B, K) float32 that sum to one.
        """
        own_share, box = self._draw(size_of(images), rng)
        others = torch.as_tensor(partners, device=images.device)
        soft = soften(target, num_classes, self.label_smoothing)
        if box is not None:
            rows, columns = box
            mixed = images.clone()
            mixed[..., rows, columns] = images[others][..., rows, columns]
        else:
            mixed = torch.lerp(images[others], images, own_share)
        return mixed, torch.lerp(soft[others], soft, own_share)

    def _draw(self, size: Size, rng: random.Random) -> tuple[float, _Box | None]:
        """Return an image's own share and, for CutMix, the box that the partner fills."""
        if rng.random() >= self.probability:
            return 1.0, None
        if self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch):
            box = _draw_box(size, 1 - rng.betavariate(self.cutmix, self.cutmix), rng)
            area = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
            return 1 - area / (size[0] * size[1]), box
        return rng.betavariate(self.mixup, self.mixup), None


def soften(target: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    """Return ids (B,) as probabilities (B, K) float32.

    Args:
        target: ids 0..K-1.
        num_classes: K.
        label_smoothing: share of probability spread evenly over all classes.
    """
    spread = label_smoothing / num_classes
    soft = torch.full((len(target), num_classes), spread, device=target.device)
    return soft.scatter_(1, target[:, None], 1 - label_smoothing + spread)


def _draw_box(size: Size, area: float, rng: random.Random) -> _Box:
    """Return a box of the image's shape that covers the fraction `area`, less what sticks out."""
    spans = []
    for side in size:
        length = int(side * area**0.5)
        middle = draw_below(side, rng)
        start, stop = middle - length // 2, middle + (length + 1) // 2
        spans.append(slice(max(start, 0), min(stop, side)))
    return spans[0], spans[1]
