"""SegFormer: an all-MLP head on four levels, and the segmenter that joins backbone and head.

Xie et al., "SegFormer" (NeurIPS 2021), section 3.2. Written from the paper and from numbers
measured on the authors' code (NVlabs/SegFormer, 65fa8cf; no code taken). Same function and
parameters, with two differences:
- The 1x1 fuse convolution is linear and bilinear weights sum to one, so its slice for a level is
  applied before upsampling, multiplied into that level's Linear. At 512 x 512 pixels B0's head does
  this with 0.3 G instead of 4.6 G multiply-adds.
- The unused convolution (129 parameters a class) that the reference inherits does not exist.

Shape suffixes: B batch, H W rows and columns, C channels of a level, E channels of the head.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class SegFormerHead(nn.Module):
    """Bring every level to `width` channels and the finest size, fuse them, classify pixels.

    Args:
        dims: channels of the levels, finest first.
        width: channels E.
        num_classes: outputs.
        dropout: rate at which whole channels are dropped before the classifier.
    """

    def __init__(self, dims: Sequence[int], width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        # Input channels: the coarsest level's first, as in published checkpoints.
        self.fuse = nn.Conv2d(width * len(dims), width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)  # decayed in the reference: its name holds no "norm"
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out", nonlinearity="relu")

    @property
    def idle_params(self) -> int:
        """Parameters of the unused 128-channel convolution that the authors' counts include."""
        return 129 * self.classifier.out_channels

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map levels (B, C_l, H_l, W_l), finest first, to (B, num_classes, H_1, W_1) logits."""
        size = maps[0].shape[-2:]
        slices = reversed(self.fuse.weight.flatten(1).chunk(len(self.linears), dim=1))
        fused: Tensor | None = None
        for level_BCHW, module, slice_EE in zip(maps, self.linears, slices, strict=True):
            linear = cast(nn.Linear, module)
            part = F.linear(
                level_BCHW.permute(0, 2, 3, 1), slice_EE @ linear.weight, slice_EE @ linear.bias
            ).permute(0, 3, 1, 2)
            if fused is not None:
                part = F.interpolate(part, size, mode="bilinear", align_corners=False)
            fused = part if fused is None else fused + part
        out: Tensor = self.classifier(self.dropout(F.relu(self.bn(fused))))
        return out

    def count_macs(self, maps: Sequence[Tensor]) -> int:
        """Return the multiply-adds for one image as the paper counts: fused at the finest size."""
        width = self.fuse.out_channels
        pixels = maps[0].shape[-2] * maps[0].shape[-1]
        linears = sum(level[0].numel() for level in maps) * width
        norm_and_relu = 3 * pixels * width
        classifier = pixels * self.classifier.out_channels * (width + 1)
        return linears + pixels * self.fuse.weight.numel() + norm_and_relu + classifier


class Segmenter(nn.Module):
    """A backbone that returns levels and a head that turns them into logits.

    Args:
        backbone: (B, 3, H, W) images to levels, finest first.
        head: levels to logits at the finest level's size; while training it may give a pair of
            these and of auxiliary ones, see `upernet.WithAuxiliary`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map (B, 3, H, W) images to (B, num_classes, ceil(H / 4), ceil(W / 4)) logits."""
        logits: Tensor | tuple[Tensor, Tensor] = self.head(self.backbone(images))
        return logits
