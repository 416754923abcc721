"""SegViT's loss: a set of masks without matching, for query j is always class j.

Zhang et al., "SegViT" (NeurIPS 2022), equation 4, with the numbers of the authors' code
(zbwxp/SegVit; no code taken). Two differences, neither of which shows in a single process: numbers
of positives are averaged over ranks as there, but so are the class weights by which the cross
entropy is divided; and a batch in which no image has a class is no error.

Shape suffixes: B batch, S taps, N queries and classes, P pairs of an image and a class in it, H W
rows and columns of the target, h w of the masks.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xattn.losses import segmentation_cross_entropy
from xattn.models.objectives import NORMALISE
from xattn.models.segvit import Masks, score_map
from xattn.models.upernet import resize
from xattn.models.variants import Objective, name
from xattn.structures import IGNORE_INDEX, MeanOverRanks

Ignored = Literal["negative", "masked"]

_FOCAL_WEIGHT, _DICE_WEIGHT, _NO_OBJECT_WEIGHT = 20.0, 1.0, 0.1
_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss

# Enlarged logits worked on at once, as many as stay in a CPU's caches or fill a GPU; ours.
_BLOCK_ON_CPU, _BLOCK_ON_GPU = 2**20, 2**26


def mask_loss(
    outputs: Masks, target: Tensor, ignored: Ignored, mean_over_ranks: MeanOverRanks
) -> dict[str, Tensor]:
    """Return cross entropy of the classes, focal and dice loss of the masks, summed over taps.

    Args:
        outputs: logits of N classes at every tap.
        target: (B, H, W) ids 0..N-1 or IGNORE_INDEX, of any integer type.
        ignored: what ignored pixels are to the masks: "negative" of every class, as in the authors'
            code, or "masked" out.
        mean_over_ranks: averages a count over all ranks.

    Returns:
        "loss", and of what it is the sum: "loss_class", "loss_focal", "loss_dice", weighted.
    """
    present_BN = _classes_present(target, outputs.masks.shape[2])
    class_loss = _class_loss(outputs.classes, present_BN, mean_over_ranks)
    image, query = present_BN.nonzero(as_tuple=True)
    positives = mean_over_ranks(present_BN.sum().to(class_loss.dtype)).clamp(min=1.0)
    total, parts = _EnlargedMaskLoss.apply(  # type: ignore[no-untyped-call]
        outputs.masks[image, :, query], target, image, query, ignored
    )
    focal, dice = (parts / positives).unbind()
    return {
        "loss": class_loss + total / positives,
        "loss_class": class_loss.detach(),
        "loss_focal": focal,
        "loss_dice": dice,
    }


def _classes_present(target: Tensor, num_classes: int) -> Tensor:
    """Return (B, N): whether an image has a pixel of a class."""
    ids = target.flatten(1).long()
    ids = ids.where(ids != IGNORE_INDEX, num_classes)
    seen = torch.zeros(len(ids), num_classes + 1, dtype=torch.bool, device=ids.device)
    return seen.scatter_(1, ids, True)[:, :-1]


def _class_loss(logits_BSNK: Tensor, present_BN: Tensor, mean_over_ranks: MeanOverRanks) -> Tensor:
    """Return the weighted mean over images and queries, summed over taps."""
    num_classes = present_BN.shape[1]
    wide = logits_BSNK.to(torch.promote_types(logits_BSNK.dtype, torch.float32))
    own = torch.arange(num_classes, device=present_BN.device)
    wanted_BN = own.where(present_BN, num_classes)
    weight = wide.new_ones(num_classes + 1)
    weight[-1] = _NO_OBJECT_WEIGHT
    total = F.cross_entropy(
        wide.flatten(0, 2),
        wanted_BN[:, None].expand(wide.shape[:3]).flatten(),
        weight,
        reduction="sum",
    )
    return total / mean_over_ranks(weight[wanted_BN].sum())


class _EnlargedMaskLoss(torch.autograd.Function):
    """Focal and dice loss of masks enlarged to the target's size, which are never there as a whole.

    The gradient for the small masks is found together with the sum, some pairs at a time, and is
    all that is kept. Returns the sum, and beside it both parts, through which no gradient flows.
    """

    @staticmethod
    def forward(
        ctx: Any, masks_PShw: Tensor, target: Tensor, image: Tensor, query: Tensor, ignored: Ignored
    ) -> tuple[Tensor, Tensor]:
        wide = masks_PShw.to(torch.promote_types(masks_PShw.dtype, torch.float32))
        limit = _BLOCK_ON_GPU if wide.is_cuda else _BLOCK_ON_CPU
        at_once = max(1, limit // (wide.shape[1] * target[0].numel()))
        parts, gradients = wide.new_zeros(2), [wide[:0]]
        chunks = zip(*(part.split(at_once) for part in (wide, image, query)), strict=True)
        # A batch without any class has one chunk, of no pairs.
        for masks, of_image, of_query in chunks if len(wide) else ():
            ids = target[of_image]
            truth = (ids == of_query[:, None, None])[:, None].to(wide.dtype)
            valid = (ids != IGNORE_INDEX)[:, None].to(wide.dtype) if ignored == "masked" else None
            with torch.enable_grad(), torch.autocast(wide.device.type, enabled=False):
                leaf = masks.detach().requires_grad_()
                losses = _focal_and_dice(resize(leaf, target.shape[1:]), truth, valid)
                gradients += torch.autograd.grad(losses.sum(), leaf)
            parts += losses.detach()
        ctx.save_for_backward(torch.cat(gradients).to(masks_PShw.dtype))
        ctx.mark_non_differentiable(parts)
        return parts.sum(), parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None, None, None]:
        (own,) = ctx.saved_tensors
        return gradient * own, None, None, None, None


def _focal_and_dice(logits_PSHW: Tensor, truth_P1HW: Tensor, valid_P1HW: Tensor | None) -> Tensor:
    """Return (2,): both losses, weighted and summed over pairs and taps."""
    share = logits_PSHW.sigmoid()
    error = (share - truth_P1HW).abs()
    entropy = F.binary_cross_entropy_with_logits(
        logits_PSHW, truth_P1HW.expand_as(logits_PSHW), reduction="none"
    )
    balance = _ALPHA * truth_P1HW + (1 - _ALPHA) * (1 - truth_P1HW)
    focal = balance * error**_GAMMA * entropy
    pixels: Tensor | int = truth_P1HW[0].numel()
    if valid_P1HW is not None:
        focal, share = focal * valid_P1HW, share * valid_P1HW
        pixels = valid_P1HW.sum((2, 3))
    common = (share * truth_P1HW).sum((2, 3))
    dice = 1 - (2 * common + 1) / (share.sum((2, 3)) + truth_P1HW.sum((2, 3)) + 1)
    return torch.stack(
        [_FOCAL_WEIGHT * (focal.sum((2, 3)) / pixels).sum(), _DICE_WEIGHT * dice.sum()]
    )


def _loss(
    outputs: Masks,
    target: Tensor,
    mean_over_ranks: MeanOverRanks,
    *,
    kind: str,
    ignored: Ignored,
    normalise: Any,
) -> dict[str, Tensor]:
    """Return the set loss, or the cross entropy of the score map taken for logits (table 4)."""
    if kind == "mask":
        return mask_loss(outputs, target, ignored, mean_over_ranks)
    scores = score_map(outputs, target.shape[1:])
    return segmentation_cross_entropy(scores, target, normalise, mean_over_ranks)


def _decode(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge (B, N, h, w) scores, no logits but not below 0, bilinearly to (B, N, *size)."""
    return resize(scores, size)


MASKS = Objective(
    _loss,
    _decode,
    {
        "kind": name("mask", "ce"),
        "ignored": name("negative", "masked"),
        "normalise": NORMALISE,
    },
)
