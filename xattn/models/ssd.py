"""SSD300: VGG16 without its last layers, four more pairs of convolutions, boxes from six maps.

Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016), sections 2.1 and 3. Written from the
paper and from numbers of torchvision's `ssd300_vgg16` and amdegroot/ssd.pytorch (no code taken);
with the weights of either it gives their outputs. Differences: attention modules may stand between
the maps and the heads; of the background, class 0 of the logits, users hear nothing: foreground
ids are 0..K-1 outside of this file and `multibox`.

Images come normalised by ImageNet's mean and deviation, as everywhere here. The published weights
of SSD want 0..255 less a mean instead (`CAFFE_MEAN`): an affine map of the input, kept as two
buffers of the backbone that `load_weights` sets with such weights, makes up for that. Folded into
the first convolution it would differ at the border, where that convolution pads with zeros.

Shape suffixes: B batch, H W rows and columns, C channels, P default boxes, K classes.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.errors import ConfigError
from xattn.models.multibox import (
    BOXES_PER_CELL,
    INPUT_SIDE_PX,
    BoxSizes,
    MultiBoxOutputs,
    default_boxes,
)

CAFFE_MEAN = (123.0, 117.0, 104.0)
"""Of red, green and blue, 0..255: what SSD's authors and those who use their weights subtract."""

_VGG_WIDTHS = (1, 2, 4, 8, 8)
_VGG_DEPTHS = (2, 2, 3, 3, 3)
_FC_DILATION = 6
_EXTRAS = (  # channels in between and out, in 64ths of `width`; stride; padding
    (4, 8, 2, 1),
    (2, 4, 2, 1),
    (2, 4, 1, 0),
    (2, 4, 1, 0),
)
_L2_SCALE = 20.0


def init_xavier(module: nn.Module) -> None:
    """Initialise one Conv2d or Linear as SSD does its new layers; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SSDBackbone(nn.Module):
    """VGG16 with fc6 and fc7 as convolutions, the first one dilated, and SSD's extra layers.

    Args:
        width: channels of the first block, 64 in the paper; all others are in proportion.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.dims = tuple(width * factor for factor in (8, 16, 8, 4, 4, 4))
        self.register_buffer("input_scale", torch.ones(3))
        self.register_buffer("input_shift", torch.zeros(3))
        self.blocks = nn.ModuleList()
        dim = 3
        for factor, depth in zip(_VGG_WIDTHS, _VGG_DEPTHS, strict=True):
            convs = nn.ModuleList()
            for _ in range(depth):
                convs.append(nn.Conv2d(dim, width * factor, 3, padding=1))
                dim = width * factor
            self.blocks.append(convs)
        self.fc6 = nn.Conv2d(dim, self.dims[1], 3, padding=_FC_DILATION, dilation=_FC_DILATION)
        self.fc7 = nn.Conv2d(self.dims[1], self.dims[1], 1)
        self.extras = nn.ModuleList()
        dim = self.dims[1]
        for between, out, stride, padding in _EXTRAS:
            squeeze = nn.Conv2d(dim, width * between, 1)
            dim = width * out
            expand = nn.Conv2d(width * between, dim, 3, stride, padding)
            self.extras.append(nn.ModuleList([squeeze, expand]))
        self.scale = nn.Parameter(torch.full((self.dims[0],), _L2_SCALE))
        self.apply(init_xavier)
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, 300, 300) images to six maps.

        Returns:
            (B, C_l, s, s) for s = 38, 19, 10, 5, 3, 1.

        Raises:
            ConfigError: the images have another size.
        """
        height, width = images.shape[-2:]
        if (height, width) != (INPUT_SIDE_PX, INPUT_SIDE_PX):
            raise ConfigError(
                f"images: found {height} x {width} pixels, expected {INPUT_SIDE_PX} x "
                f"{INPUT_SIDE_PX}, which the default boxes are made for"
            )
        map_BCHW = images * self.input_scale[:, None, None] + self.input_shift[:, None, None]
        maps = []
        for index, block in enumerate(self.blocks):
            if index:
                # Rounding up, 75 rows become the 38 of the paper's first map.
                map_BCHW = F.max_pool2d(map_BCHW, 2, 2, ceil_mode=True)
            map_BCHW = _convolve(cast(nn.ModuleList, block), map_BCHW)
            if index == 3:
                maps.append(F.normalize(map_BCHW, dim=1) * self.scale[:, None, None])
        map_BCHW = F.max_pool2d(map_BCHW, 3, 1, padding=1)
        maps.append(_convolve((self.fc6, self.fc7), map_BCHW))
        for extra in self.extras:
            maps.append(_convolve(cast(nn.ModuleList, extra), maps[-1]))
        return maps


def _convolve(convs: Sequence[nn.Module] | nn.ModuleList, map_BCHW: Tensor) -> Tensor:
    """Apply convolutions, each with a ReLU."""
    for conv in convs:
        map_BCHW = F.relu(conv(map_BCHW), inplace=True)
    return map_BCHW


class MultiBoxHead(nn.Module):
    """Two 3x3 convolutions a map: offsets and class logits of every default box.

    Args:
        dims: channels of the maps.
        num_classes: K; the background is one more.
    """

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__()
        pairs = list(zip(dims, BOXES_PER_CELL, strict=True))
        self.boxes = nn.ModuleList(nn.Conv2d(dim, 4 * count, 3, padding=1) for dim, count in pairs)
        self.classes = nn.ModuleList(
            nn.Conv2d(dim, (num_classes + 1) * count, 3, padding=1) for dim, count in pairs
        )
        self.apply(init_xavier)
        self._numbers = 4, num_classes + 1

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Map (B, C_l, H_l, W_l) maps to offsets (B, P, 4) and logits (B, P, K + 1)."""
        offsets, logits = (
            torch.cat(
                [
                    conv(map_BCHW).permute(0, 2, 3, 1).reshape(len(map_BCHW), -1, number)
                    for conv, map_BCHW in zip(convs, maps, strict=True)
                ],
                1,
            )
            for convs, number in zip((self.boxes, self.classes), self._numbers, strict=True)
        )
        return offsets, logits


class SSD(nn.Module):
    """A detector.

    Args:
        backbone: images to six maps.
        neck: six maps to as many of the same sizes.
        dims: channels of the maps that leave the neck.
        num_classes: K, without the background.
        box_sizes: whose default boxes.
    """

    defaults: Tensor

    def __init__(
        self,
        backbone: SSDBackbone,
        neck: nn.Module,
        dims: Sequence[int],
        num_classes: int,
        box_sizes: BoxSizes = "voc",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = MultiBoxHead(dims, num_classes)
        self.register_buffer("defaults", default_boxes(box_sizes), persistent=False)

    def forward(self, images: Tensor) -> MultiBoxOutputs:
        """Map (B, 3, 300, 300) images to `MultiBoxOutputs` of 8,732 default boxes.

        Raises:
            ConfigError: the images have another size.
        """
        offsets, logits = self.head(self.neck(self.backbone(images)))
        return MultiBoxOutputs(offsets, logits, self.defaults)
