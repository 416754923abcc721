"""MSCAN, SegNeXt's backbone: strip convolutions of several lengths gate the features.

Guo et al., "SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation" (NeurIPS
2022), section 3.1 and table 2. Written from the paper and from what is known of mmsegmentation's
implementation (mmseg/models/backbones/mscan.py, 319dbda; no code taken), whose choices are kept
where the paper is silent: every convolution has a bias, BatchNorm within blocks and after every
embedding, a LayerNorm at the end of a stage which the next stage reads too, and a residual sum
around the spatial attention inside the layer scale. Differences: layout only, see `nn.blocks`; a
1x1 convolution of the MLP is a Linear.

Shape suffixes: B batch, H W rows and columns, C channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.models.pyramid import Pyramid, Stage
from xattn.nn.blocks import DropPath, MixFFN, drop_path_rates, init_weights

STRIPS = (7, 11, 21)
"""Lengths of the strip convolutions (SegNeXt, figure 2)."""
_LAYER_SCALE = 1e-2  # where both scales start; mmsegmentation


class StripConvolution(nn.Module):
    """Depth-wise 1 x k, then k x 1.

    Args:
        dim: channels.
        length: k; odd.
    """

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        pad = length // 2
        self.row = nn.Conv2d(dim, dim, (1, length), padding=(0, pad), groups=dim)
        self.column = nn.Conv2d(dim, dim, (length, 1), padding=(pad, 0), groups=dim)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        out: Tensor = self.column(self.row(map_BCHW))
        return out


class MultiScaleAttention(nn.Module):
    """Convolutional attention (equations 1 and 2) between two 1x1 convolutions, with its residual.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(dim, dim, 1)
        self.local = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.strips = nn.ModuleList(StripConvolution(dim, length) for length in STRIPS)
        self.mix = nn.Conv2d(dim, dim, 1)
        self.leave = nn.Conv2d(dim, dim, 1)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        gated = F.gelu(self.enter(map_BCHW))
        near = self.local(gated)
        gate = self.mix(sum((strip(near) for strip in self.strips), start=near))
        out: Tensor = self.leave(gate * gated) + map_BCHW
        return out


class MscanBlock(nn.Module):
    """Multi-scale attention, then an FFN with a depth-wise convolution; each normed and scaled.

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the FFN over `dim`.
        drop_path: rate at which either residual branch is dropped.
    """

    def __init__(self, dim: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attention = MultiScaleAttention(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.ffn = MixFFN(dim, mlp_ratio * dim)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), _LAYER_SCALE))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), _LAYER_SCALE))
        self.drop_path = DropPath(drop_path)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        attended = self.attention(self.norm1(map_BHWC.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        map_BHWC = map_BHWC + self.drop_path(self.layer_scale_1 * attended)
        normed = self.norm2(map_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = map_BHWC + self.drop_path(self.layer_scale_2 * self.ffn(normed))
        return out


class Embedding(nn.Module):
    """Overlapping patches: a 3x3 convolution of stride 2 and a BatchNorm.

    Args:
        in_dim: channels that come in.
        dim: channels that go out.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, in_dim) to (B, ceil(H / 2), ceil(W / 2), dim)."""
        out: Tensor = self.norm(self.conv(map_BHWC.permute(0, 3, 1, 2)))
        return out.permute(0, 2, 3, 1)


class Stem(nn.Module):
    """Two embeddings with a GELU between them.

    Args:
        dim: channels that go out; half as many lie in between.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = Embedding(3, dim // 2)
        self.second = Embedding(dim // 2, dim)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, 3) to (B, ceil(H / 4), ceil(W / 4), dim)."""
        out: Tensor = self.second(F.gelu(self.first(map_BHWC)))
        return out


class Mscan(Pyramid):
    """Four-stage convolutional backbone.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        mlp_ratios: hidden channels of each stage's FFN over its channels.
        drop_path: rate of the last block, see `drop_path_rates`.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        drop_path: float = 0.1,
    ) -> None:
        stages = nn.ModuleList()
        for index, rates in enumerate(drop_path_rates(depths, drop_path)):
            dim = dims[index]
            embed = Embedding(dims[index - 1], dim) if index else Stem(dim)
            blocks = [MscanBlock(dim, mlp_ratios[index], rate) for rate in rates]
            stages.append(Stage(embed, blocks, nn.LayerNorm(dim)))
        super().__init__(stages.apply(_init_weights), dims, hands_on_normed=True)


def _init_weights(module: nn.Module) -> None:
    """Initialise as `init_weights`, but a Linear as the 1x1 convolution that it stands for."""
    init_weights(module)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / module.out_features))
