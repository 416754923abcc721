"""Losses and decodings that several families share, as `variants.Objective`s."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from xattn.losses import classification_cross_entropy, segmentation_cross_entropy
from xattn.models.multibox import decode_detections, multibox_loss
from xattn.models.variants import Objective, count, name, number, rate
from xattn.structures import MeanOverRanks

_AUXILIARY_WEIGHT = 0.4  # mmsegmentation's configuration of UPerNet for Swin


def _classification_loss(
    outputs: Tensor, target: Tensor, _mean_over_ranks: MeanOverRanks, *, label_smoothing: float
) -> dict[str, Tensor]:
    return classification_cross_entropy(outputs, target, label_smoothing)


def _segmentation_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    target: Tensor,
    mean_over_ranks: MeanOverRanks,
    *,
    normalise: Any,
    auxiliary_weight: float = 0.0,
) -> dict[str, Tensor]:
    """Return the cross entropy of the logits, or, of a pair, the first's and the second's sum."""
    if isinstance(outputs, Tensor):
        return segmentation_cross_entropy(outputs, target, normalise, mean_over_ranks)
    main, auxiliary = (
        segmentation_cross_entropy(logits, target, normalise, mean_over_ranks)["loss"]
        for logits in outputs
    )
    loss = main + auxiliary_weight * auxiliary
    return {"loss": loss, "loss_main": main, "loss_auxiliary": auxiliary}


def _decode_classification(outputs: Tensor, _size: tuple[int, int]) -> Tensor:
    return outputs


def decode_segmentation(outputs: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge (B, K, h, w) scores bilinearly to (B, K, *size)."""
    return F.interpolate(outputs, size, mode="bilinear", align_corners=False)


# The ImageNet recipe smooths (PVT's, which SegFormer's authors point to).
CLASSIFICATION = Objective(
    _classification_loss, _decode_classification, {"label_smoothing": rate(0.1)}
)

# mmsegmentation 0.x, which trained the published segmenters, divides by all pixels.
NORMALISE = name("all", "valid")

SEGMENTATION = Objective(_segmentation_loss, decode_segmentation, {"normalise": NORMALISE})

AUXILIARY_SEGMENTATION = Objective(
    _segmentation_loss,
    decode_segmentation,
    {"normalise": NORMALISE, "auxiliary_weight": number(_AUXILIARY_WEIGHT)},
)

# Three to one: SSD (Liu et al. 2016, section 2.2).
DETECTION = Objective(multibox_loss, decode_detections, {"negatives": count(3)})
