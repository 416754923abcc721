"""UPerNet's head: pyramid pooling on the coarsest level, a feature pyramid, one fusing convolution.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (ECCV 2018), section 3.1, as
mmsegmentation 0.x has it, with the auxiliary FCN head that Swin's segmenters are trained with.
Written from the paper and from numbers of that code (no code taken). Same function and parameters,
with one difference: a 3x3 convolution of a map that was upsampled to more than twice its sides is
computed from the small map, see `convolve_resized`. Of the 236 G multiply-adds of Swin-T's
segmenter at 512 x 512 pixels, the fusing convolution takes 155; so computed it takes 82.

Shape suffixes: B batch, H W rows and columns, C channels that come in, E those that go out.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = Sequence[int]

_LARGEST_ENLARGEMENT = 4
"""Pixels for one up to which a map is upsampled as it is. Chosen by measuring 512 channels to 128 x
128 on two CPU cores: four for one take 1.4 s by `convolve_resized` and 1.1 s literally, sixteen 0.6
and 1.1 s, sixty-four 0.2 and 1.1 s."""


def resize(map_BCHW: Tensor, size: Size) -> Tensor:
    """Resize a map bilinearly; a map of that size is returned as it is."""
    if tuple(map_BCHW.shape[2:]) == tuple(size):
        return map_BCHW
    return F.interpolate(map_BCHW, size, mode="bilinear", align_corners=False)


def _shifted_resizing(size: int, to_size: int, like: Tensor) -> Tensor:
    """Return (to_size, 3 * size): resize a line bilinearly, then shift it by +1, 0 and -1.

    Column k * size + i is what source i gives to each target when the line was moved by k - 1
    places, with zeros moving in: the three taps of a convolution.
    """
    precision = torch.promote_types(like.dtype, torch.float32)
    lines = torch.eye(size, dtype=precision, device=like.device)[None, :, :, None]
    resized = resize(lines, (to_size, 1))[0, :, :, 0]
    padded = F.pad(resized, (1, 1))  # (size, to_size + 2)
    shifted = [padded[:, tap : tap + to_size] for tap in range(3)]
    return torch.cat(shifted).t().to(like.dtype)


def convolve_resized(map_BCHW: Tensor, weight: Tensor, size: Size) -> Tensor:
    """Resize a map bilinearly, then convolve it 3x3 with zero padding, in the opposite order.

    Both are linear: every tap's 1x1 convolution comes first, on the small map; resizing and
    shifting its results, and adding them up, are two products with narrow matrices.

    Args:
        map_BCHW: small.
        weight: (E, C, 3, 3).
        size: rows and columns of the result.

    Returns:
        (B, E, *size), channels_last in memory.
    """
    height, width = map_BCHW.shape[2:]
    taps = weight.permute(2, 3, 0, 1).flatten(0, 2)  # (3 * 3 * E, C)
    parts = F.linear(map_BCHW.permute(0, 2, 3, 1), taps).unflatten(3, (3, 3, -1))
    parts = parts.permute(0, 3, 1, 4, 2, 5).flatten(3, 4)  # (B, 3, H, 3 * W, E)
    rows = _shifted_resizing(width, size[1], parts) @ parts  # (B, 3, H, size[1], E)
    out = _shifted_resizing(height, size[0], parts) @ rows.flatten(1, 2).flatten(2)
    out_BHWE: Tensor = out.unflatten(2, (size[1], -1))
    return out_BHWE.permute(0, 3, 1, 2)


class ConvBNReLU(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; the sides stay as they are.

    Args:
        in_dim: channels that come in.
        dim: channels that go out.
        kernel: side of the kernel; odd.
    """

    def __init__(self, in_dim: int, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(dim)  # decayed in the reference: its name holds no "norm"
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map (B, in_dim, H, W) to (B, dim, H, W)."""
        return self.finish(self.conv(map_BCHW))

    def finish(self, convolved_BCHW: Tensor) -> Tensor:
        """Return what follows the convolution."""
        return F.relu(self.bn(convolved_BCHW))

    def of_resized(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the module's output for the maps resized to the first one's size and joined.

        Args:
            maps: (B, C_l, H_l, W_l) each; the C_l add up to `in_dim`.
        """
        size = maps[0].shape[2:]
        near, near_slices, far = [], [], []
        slices = self.conv.weight.split([level.shape[1] for level in maps], dim=1)
        for level_BCHW, slice_EC33 in zip(maps, slices, strict=True):
            if size.numel() > _LARGEST_ENLARGEMENT * level_BCHW.shape[2:].numel():
                far.append(convolve_resized(level_BCHW, slice_EC33, size))
            else:
                near.append(resize(level_BCHW, size))
                near_slices.append(slice_EC33)
        conv, weight = self.conv, torch.cat(near_slices, 1)
        convolved = F.conv2d(
            torch.cat(near, 1), weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        return self.finish(sum(far, start=convolved))

    def macs(self, pixels: int) -> int:
        """Return the multiply-adds for that many pixels (rule: `evaluate.cost`)."""
        return pixels * (self.conv.weight.numel() + 3 * self.conv.out_channels)


class UPerHead(nn.Module):
    """Bring all levels to `width` channels, the coarsest with its surroundings, and fuse them.

    Args:
        dims: channels of the levels, finest first.
        width: channels E.
        num_classes: outputs.
        dropout: rate at which whole channels are dropped before the classifier.
        pools: sides of the maps that the coarsest level is averaged to.
    """

    def __init__(
        self,
        dims: Sequence[int],
        width: int,
        num_classes: int,
        dropout: float,
        pools: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__()
        self.pools = tuple(pools)
        self.pooled = nn.ModuleList(ConvBNReLU(dims[-1], width, 1) for _ in pools)
        self.context = ConvBNReLU(dims[-1] + width * len(pools), width, 3)
        self.laterals = nn.ModuleList(ConvBNReLU(dim, width, 1) for dim in dims[:-1])
        self.smooths = nn.ModuleList(ConvBNReLU(width, width, 3) for _ in dims[:-1])
        self.fuse = ConvBNReLU(width * len(dims), width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        _init_classifier(self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map levels (B, C_l, H_l, W_l), finest first, to (B, num_classes, H_1, W_1) logits."""
        sums = [self._surroundings(maps[-1])]
        for level_BCHW, lateral in zip(maps[-2::-1], self.laterals[::-1], strict=True):
            sums.insert(0, lateral(level_BCHW) + resize(sums[0], level_BCHW.shape[2:]))
        smoothed = [smooth(level) for smooth, level in zip(self.smooths, sums[:-1], strict=True)]
        fused = self.fuse.of_resized([*smoothed, sums[-1]])
        out: Tensor = self.classifier(self.dropout(fused))
        return out

    def _surroundings(self, coarsest_BCHW: Tensor) -> Tensor:
        """Return (B, E, H, W): the coarsest level beside its averages over ever smaller parts."""
        parts = [
            conv(F.adaptive_avg_pool2d(coarsest_BCHW, pool))
            for conv, pool in zip(self.pooled, self.pools, strict=True)
        ]
        return self.context.of_resized([coarsest_BCHW, *parts])

    def count_macs(self, maps: Sequence[Tensor]) -> int:
        """Return the multiply-adds for one image as papers count: convolved after upsampling."""
        pixels = [level.shape[2] * level.shape[3] for level in maps]
        macs = self.context.macs(pixels[-1]) + self.fuse.macs(pixels[0])
        for conv, pool in zip(self.pooled, self.pools, strict=True):
            macs += cast(ConvBNReLU, conv).macs(pool**2)
        for modules in (self.laterals, self.smooths):
            for conv, count in zip(modules, pixels[:-1], strict=True):
                macs += cast(ConvBNReLU, conv).macs(count)
        return macs + pixels[0] * self.classifier.out_channels * (self.classifier.in_channels + 1)


def _init_classifier(classifier: nn.Conv2d) -> None:
    """Initialise as mmsegmentation does."""
    nn.init.normal_(classifier.weight, std=0.01)
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)


class FCNHead(nn.Module):
    """One 3x3 convolution on one level, then a classifier (Long et al. 2015, as in mmsegmentation).

    Args:
        dim: channels of the level.
        width: channels in between.
        num_classes: outputs.
        dropout: rate at which whole channels are dropped before the classifier.
        level: which of the levels it reads, from 0 (finest).
    """

    def __init__(self, dim: int, width: int, num_classes: int, dropout: float, level: int) -> None:
        super().__init__()
        self.level = level
        self.conv = ConvBNReLU(dim, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        _init_classifier(self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map levels to (B, num_classes, H_l, W_l) logits of its level l."""
        out: Tensor = self.classifier(self.dropout(self.conv(maps[self.level])))
        return out


class WithAuxiliary(nn.Module):
    """A head that is trained together with a second, simpler one.

    Args:
        main: levels to logits.
        auxiliary: likewise; has no part in predictions.
    """

    def __init__(self, main: nn.Module, auxiliary: nn.Module) -> None:
        super().__init__()
        self.main = main
        self.auxiliary = auxiliary

    def forward(self, maps: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Map levels to the main logits; while training to those and the auxiliary ones."""
        logits: Tensor = self.main(maps)
        return (logits, self.auxiliary(maps)) if self.training else logits
