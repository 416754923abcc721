"""AFMA on SegFormer: attention between the image and the coarsest map corrects the prediction.

Sang et al., "Small-Object Sensitive Segmentation Using Across Feature Map Attention" (TPAMI 2023),
by facts about its authors' code (ShengtianSang/AFMA; no code taken), adapted to SegFormer:
- The level is the coarsest, which CLA's paper names; image and level are filled with zeros up to
  multiples of the patch, since 10 divides neither side.
- SegFormer's logits have a quarter of the image's sides, so that the arg-max is pooled over 8
  instead of 32 cells, and the correction, found for every pixel, is averaged over 4 x 4.
- The classes are done at once instead of one after the other, the two linear maps of a patch as
  their product, and the gold attention is summed from the label map without its one-hot form.
Its loss is the paper's. CLA's authors wanted this comparison and lacked the memory; with AFMA's
own patch of 10 pixels instead of a small one it fits.

Shape suffixes: B batch, K classes, H W rows and columns, C channels, N patches of the image, M of
the level, Q pixels of a patch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.losses import segmentation_cross_entropy
from xattn.models.cla import merge, partition
from xattn.models.objectives import decode_segmentation
from xattn.models.variants import Objective, name, number
from xattn.structures import IGNORE_INDEX, MeanOverRanks

PATCH = 10
"""Side of a patch in pixels of the image, and in cells of the level."""
STRIDE = 32
"""Pixels of the image between two cells of the level."""
_LOGITS_STRIDE = 4
_IMAGE_WIDTH = 64
_CROSS_ENTROPY_WEIGHT = 5.0


class AFMAOutputs(NamedTuple):
    """What the model returns while training.

    Args:
        logits: (B, K, ceil(H / 4), ceil(W / 4)), corrected.
        attention: (B, K, N, M), at least 0.
    """

    logits: Tensor
    attention: Tensor


class AFMA(nn.Module):
    """Attention of image patches to patches of a level, for each class, and its correction.

    Args:
        dim: channels of the level.
        num_classes: K.
        patch: side of a patch.
        stride: pixels between two cells of the level; a multiple of 4.
    """

    def __init__(
        self, dim: int, num_classes: int, patch: int = PATCH, stride: int = STRIDE
    ) -> None:
        super().__init__()
        self.patch, self.stride = patch, stride
        self.image = nn.Sequential(
            nn.Conv2d(3, _IMAGE_WIDTH, 7, padding=3),
            nn.Conv2d(_IMAGE_WIDTH, num_classes, 3, padding=1),
        )
        self.level = nn.Conv2d(dim, num_classes, 1)
        self.widen = nn.Linear(patch**2, 2 * patch**2, bias=False)
        self.narrow = nn.Linear(2 * patch**2, patch**2, bias=False)

    def forward(self, images: Tensor, level: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the corrected logits and the attention, see `AFMAOutputs`.

        Args:
            images: (B, 3, H, W).
            level: (B, C, ceil(H / stride), ceil(W / stride)).
            logits: (B, K, ceil(H / 4), ceil(W / 4)).
        """
        attention = self.attention(images, level)
        return self._correct(logits, attention, (images.shape[2], images.shape[3])), attention

    def attention(self, images: Tensor, level: Tensor) -> Tensor:
        """Return (B, K, N, M): of image patches (rows) and the level's, at least 0."""
        matrix_QQ = self.narrow.weight @ self.widen.weight
        maps = self.image(images), self.level(level) / self.stride**2
        pixels_BKNQ, cells_BKMQ = (
            F.relu(F.linear(self._patches(map_BKHW.permute(0, 2, 3, 1)), matrix_QQ))
            for map_BKHW in maps
        )
        return pixels_BKNQ @ (cells_BKMQ / self.patch**2).transpose(2, 3)

    def _patches(self, map_BHWK: Tensor) -> Tensor:
        """Return (B, K, N, Q)."""
        return partition(map_BHWK, self.patch).permute(0, 3, 1, 2)

    def _correct(self, logits: Tensor, attention_BKNM: Tensor, size: tuple[int, int]) -> Tensor:
        """Return x + x * correction: each image patch mixes the level's patches of predictions."""
        cell = self.stride // _LOGITS_STRIDE
        shares_BHWK = class_shares(logits.argmax(1), logits.shape[1], cell).to(attention_BKNM)
        count = (attention_BKNM != 0).sum(3, keepdim=True).clamp(min=1)
        mixed_BKNQ = (attention_BKNM / count) @ self._patches(shares_BHWK)
        correction = merge(mixed_BKNQ.permute(0, 2, 3, 1), self.patch, size).permute(0, 3, 1, 2)
        return logits + logits * F.avg_pool2d(correction, _LOGITS_STRIDE, ceil_mode=True)

    def count_macs(self, images: Tensor, level: Tensor, logits: Tensor) -> int:
        """Return the multiply-adds for one image, the patch's linear maps one after the other."""
        classes, patch_pixels = logits.shape[1], self.patch**2
        pixels, cells = (maps[0, 0].numel() for maps in (images, level))
        macs = pixels * (7 * 7 * 3 + 1) * _IMAGE_WIDTH
        macs += pixels * (3 * 3 * _IMAGE_WIDTH + 1) * classes
        macs += cells * (level.shape[1] + 1) * classes
        of_image, of_level = (
            -(-maps.shape[2] // self.patch) * -(-maps.shape[3] // self.patch)
            for maps in (images, level)
        )
        macs += (of_image + of_level) * classes * (4 * patch_pixels**2 + patch_pixels)  # and ReLU
        return macs + 2 * of_image * of_level * patch_pixels * classes


class AFMASegmenter(nn.Module):
    """A segmenter whose logits AFMA corrects.

    Args:
        backbone: (B, 3, H, W) images to levels, finest first.
        head: levels to logits at a quarter of the image's sides.
        afma: built for the level.
        level: the level that the image is compared with, from 0.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, afma: AFMA, level: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.afma = afma
        self.level = level

    def forward(self, images: Tensor) -> Tensor | AFMAOutputs:
        """Map (B, 3, H, W) images to logits (B, K, ceil(H / 4), ceil(W / 4)), or to both."""
        maps = self.backbone(images)
        logits, attention = self.afma(images, maps[self.level], self.head(maps))
        return AFMAOutputs(logits, attention) if self.training else logits


def class_shares(ids: Tensor, num_classes: int, cell: int) -> Tensor:
    """Return how much of each cell is of each class.

    Args:
        ids: (B, H, W) ids 0..K-1 or IGNORE_INDEX, which is of none.
        num_classes: K.
        cell: side of a cell, px; those at the right and lower edge may reach beyond the map, where
            there is no class.

    Returns:
        (B, ceil(H / cell), ceil(W / cell), K) float32 in [0, 1].
    """
    batch, height, width = ids.shape
    rows, columns = -(-height // cell), -(-width // cell)
    row = torch.arange(height, device=ids.device)[:, None] // cell
    column = torch.arange(width, device=ids.device) // cell
    image = torch.arange(batch, device=ids.device)[:, None, None]
    index = ((image * rows + row) * columns + column) * num_classes + ids.clamp(max=num_classes - 1)
    shares = torch.zeros(batch * rows * columns * num_classes, device=ids.device)
    part = (ids != IGNORE_INDEX).to(shares.dtype) / cell**2
    shares = shares.scatter_add(0, index.flatten(), part.flatten())
    return shares.view(batch, rows, columns, num_classes)


def gold_attention(
    target: Tensor, num_classes: int, patch: int = PATCH, stride: int = STRIDE
) -> Tensor:
    """Return the attention that the label map has with itself, which AFMA is to learn.

    Args:
        target: (B, H, W) ids 0..K-1 or IGNORE_INDEX.
        num_classes: K.
        patch: side of a patch.
        stride: pixels between two cells of the level.

    Returns:
        (B, K, N, M) float32 in [0, 1]: mean over a patch's positions q of whether pixel q of the
        image's patch is of the class, times the share of the class in cell q of the level's patch.
    """
    shares_BMQK = partition(class_shares(target, num_classes, stride), patch) / patch**2
    # Class 0 stands for what is ignored or beyond the image, and is dropped at the end.
    ids = torch.where(target == IGNORE_INDEX, -1, target) + 1
    ids_BNQ = partition(ids[..., None], patch).squeeze(3)
    shares_BQKM = F.pad(shares_BMQK, (1, 0)).permute(0, 2, 3, 1)
    batch, patches, _ = ids_BNQ.shape
    image = torch.arange(batch, device=ids.device)[:, None, None]
    position = torch.arange(patch**2, device=ids.device)
    looked_up_BNQM = shares_BQKM[image, position, ids_BNQ]
    row = torch.arange(patches, device=ids.device)[:, None]
    index = (image * (num_classes + 1) + ids_BNQ) * patches + row
    gold = shares_BQKM.new_zeros(batch * (num_classes + 1) * patches, shares_BQKM.shape[3])
    gold = gold.index_add(0, index.flatten(), looked_up_BNQM.flatten(0, 2))
    return gold.view(batch, num_classes + 1, patches, -1)[:, 1:]


def _afma_loss(
    outputs: Tensor | AFMAOutputs,
    target: Tensor,
    mean_over_ranks: MeanOverRanks,
    *,
    normalise: Any,
    cross_entropy_weight: float,
    attention_weight: float,
) -> dict[str, Tensor]:
    """Return the weighted cross entropy, of training outputs with the error of the attention."""
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    main = segmentation_cross_entropy(logits, target, normalise, mean_over_ranks)["loss"]
    loss = cross_entropy_weight * main
    if isinstance(outputs, Tensor):
        return {"loss": loss}
    gold = gold_attention(target, logits.shape[1])
    error = F.mse_loss(outputs.attention.float(), gold)
    return {"loss": loss + attention_weight * error, "loss_main": main, "loss_attention": error}


AFMA_SEGMENTATION = Objective(
    _afma_loss,
    decode_segmentation,
    {
        "normalise": name("all", "valid"),
        "cross_entropy_weight": number(_CROSS_ENTROPY_WEIGHT),
        "attention_weight": number(1.0),
    },
)
