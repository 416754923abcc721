"""Losses, each a sum over a count that does not depend on how a batch was split over ranks."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from xattn.structures import IGNORE_INDEX, MeanOverRanks

Normalise = Literal["all", "valid"]


def segmentation_cross_entropy(
    logits: Tensor, target: Tensor, normalise: Normalise, mean_over_ranks: MeanOverRanks
) -> dict[str, Tensor]:
    """Cross entropy of logits brought bilinearly to the target's size.

    Args:
        logits: (B, K, h, w), any size.
        target: (B, H, W) ids 0..K-1 or IGNORE_INDEX; as many pixels on every rank.
        normalise: "all" divides by all pixels, ignored ones included (mmsegmentation 0.x, hence
            the published SegFormer and HILA runs); "valid" by the pixels that are not ignored,
            averaged over ranks, so that a rank with few of them does not weigh as much.
        mean_over_ranks: averages a count over all ranks.

    Returns:
        "loss": a scalar, zero (with zero gradient) where every pixel is ignored.
    """
    logits = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
    if normalise == "all":
        return {"loss": total / target.numel()}
    valid = (target != IGNORE_INDEX).sum().to(total.dtype)
    return {"loss": total / mean_over_ranks(valid).clamp(min=1.0)}


def classification_cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float
) -> dict[str, Tensor]:
    """Mean cross entropy over the batch.

    Args:
        logits: (B, K).
        target: (B,) ids 0..K-1, or (B, K) shares of the classes, which are not smoothed again; as
            many on every rank.
        label_smoothing: share of probability spread evenly over all classes, in [0, 1).

    Returns:
        "loss": a scalar.
    """
    smoothing = label_smoothing if target.ndim == 1 else 0.0
    return {"loss": F.cross_entropy(logits, target, label_smoothing=smoothing)}
