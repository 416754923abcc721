"""Losses, each a sum over a count that does not depend on how a batch was split over ranks.

Shapes: B batch, H W rows and columns, K classes.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xattn.structures import IGNORE_INDEX, MeanOverRanks

Normalise = Literal["all", "valid"]

# Logits in a block: on a CPU few enough to stay in its caches, on a GPU enough to fill it.
_BLOCK_ON_CPU, _BLOCK_ON_GPU = 2**18, 2**26


def segmentation_cross_entropy(
    logits: Tensor, target: Tensor, normalise: Normalise, mean_over_ranks: MeanOverRanks
) -> dict[str, Tensor]:
    """Cross entropy of logits brought bilinearly to the target's size.

    Args:
        logits: (B, K, h, w), any size.
        target: (B, H, W) ids 0..K-1 or IGNORE_INDEX, of any integer type; as many pixels on every
            rank.
        normalise: "all" divides by all pixels, ignored ones included (mmsegmentation 0.x, hence
            the published SegFormer and HILA runs); "valid" by the pixels that are not ignored,
            averaged over ranks, so that a rank with few of them does not weigh as much.
        mean_over_ranks: averages a count over all ranks.

    Returns:
        "loss": a scalar, zero (with zero gradient) where every pixel is ignored.
    """
    assert len(logits) == len(target), (logits.shape, target.shape)
    total: Tensor = _UpsampledCrossEntropy.apply(logits, target.long())  # type: ignore[no-untyped-call]
    if normalise == "all":
        return {"loss": total / target.numel()}
    valid = (target != IGNORE_INDEX).sum().to(total.dtype)
    return {"loss": total / mean_over_ranks(valid).clamp(min=1.0)}


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropy of bilinearly enlarged logits, which are never there as a whole.

    The gradient for the small logits is found together with the sum and is all that is kept: of the
    four (B, K, H, W) tensors that interpolating and comparing as two steps keeps, none.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            wide = logits if logits.dtype == torch.float64 else logits.float()
            factors = [
                large / small
                for large, small in zip(target.shape[1:], logits.shape[2:], strict=True)
            ]
            form = _by_phase if all(factor.is_integer() for factor in factors) else _by_image
            total, gradient = form(wide, target)
        ctx.save_for_backward(gradient.to(logits.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (own,) = ctx.saved_tensors
        return own * gradient, None


def _by_image(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and its gradient, one image at a time, for any two sizes."""
    total, gradients = logits.new_zeros(()), []
    for image, ids in zip(logits.split(1), target.split(1), strict=True):
        with torch.enable_grad():
            leaf = image.detach().requires_grad_()
            large = F.interpolate(leaf, ids.shape[1:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(large, ids, ignore_index=IGNORE_INDEX, reduction="sum")
        gradients += torch.autograd.grad(loss, leaf)
        total += loss.detach()
    return total, torch.cat(gradients)


def _by_phase(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and its gradient where both sides grow by whole factors s.

    Every s-th row and column of the enlarged map is a mixture of the map and its neighbour with one
    weight, so each of the s x s phases is as large as the map and made without gathering.
    """
    total = logits.new_zeros(())
    limit = _BLOCK_ON_GPU if logits.is_cuda else _BLOCK_ON_CPU
    images = max(1, limit // logits[0].numel())
    # Softmax over the outer of the two is vectorised for any number of classes.
    gradients = [
        _phases_of_images(some.contiguous(), ids, limit, total)
        for some, ids in zip(logits.split(images), target.split(images), strict=True)
    ]
    return total, torch.cat(gradients)


def _phases_of_images(logits: Tensor, target: Tensor, limit: int, total: Tensor) -> Tensor:
    """Add the images' loss to `total` and return its gradient.

    Works on a band of rows at a time, of at most `limit` logits.
    """
    height, width = logits.shape[2:]
    scales = target.shape[1] // height, target.shape[2] // width
    padded = F.pad(logits, (1, 1, 1, 1), mode="replicate")  # now every cell has neighbours
    gradient = torch.zeros_like(padded)
    band = max(1, limit // logits[:, :, 0].numel())
    inner = slice(1, width + 1)
    for top in range(0, height, band):
        middle = slice(top + 1, min(top + band, height) + 1)
        ids = target[:, top * scales[0] : (middle.stop - 1) * scales[0]]
        for row, (beside, row_share) in enumerate(_phases(middle, scales[0])):
            mixed = torch.lerp(padded[:, :, middle], padded[:, :, beside], row_share)
            back = torch.zeros_like(mixed)
            for column, (aside, share) in enumerate(_phases(inner, scales[1])):
                phase = torch.lerp(mixed[..., inner], mixed[..., aside], share)
                loss, slope = _cross_entropy(phase, ids[:, row :: scales[0], column :: scales[1]])
                total += loss
                back[..., inner].add_(slope, alpha=1 - share)
                back[..., aside].add_(slope, alpha=share)
            gradient[:, :, middle].add_(back, alpha=1 - row_share)
            gradient[:, :, beside].add_(back, alpha=row_share)
    for side, (edge, next_to_it) in ((2, (0, 1)), (2, (-1, -2)), (3, (0, 1)), (3, (-1, -2))):
        gradient.select(side, next_to_it).add_(gradient.select(side, edge))
    return gradient[:, :, 1:-1, 1:-1]


def _phases(cells: slice, scale: int) -> Iterator[tuple[slice, float]]:
    """Yield, for each phase of an enlargement, the cells' neighbours and the share they have."""
    for phase in range(scale):
        offset = (phase + 0.5) / scale - 0.5
        step = 1 if offset > 0 else -1
        yield slice(cells.start + step, cells.stop + step), abs(offset)


def _cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over pixels that are not ignored, and its gradient."""
    valid = (target != IGNORE_INDEX)[:, None]
    ids = target[:, None].where(valid, 0)
    log_shares = logits.log_softmax(1)
    loss = -(log_shares.gather(1, ids) * valid).sum()
    slope = log_shares.exp_().scatter_add_(1, ids, logits.new_full((), -1.0).expand_as(ids))
    return loss, slope.mul_(valid)


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
