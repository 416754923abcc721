"""The MiT transformer block and its parts, in channels-last layout.

Xie et al., "SegFormer" (2021), section 3.1. Every map here is (B, H, W, C): a LayerNorm and a
Linear read it as it lies, and `permute` shows the same memory to a convolution as channels_last. No
copy stands between them; on a CPU the depth-wise convolution is two to three times as fast.

Shape suffixes: B batch, H W rows and columns, C channels, N tokens, D width of one head.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_NORM_EPS = 1e-6
"""LayerNorm epsilon inside MiT blocks and at the end of a stage; elsewhere it is torch's 1e-5."""


def convolve(conv: nn.Conv2d, map_BHWC: Tensor) -> Tensor:
    """Apply a convolution to a (B, H, W, C) map and return (B, H', W', C')."""
    out: Tensor = conv(map_BHWC.permute(0, 3, 1, 2))
    return out.permute(0, 2, 3, 1)


def init_weights(module: nn.Module) -> None:
    """Initialise one Linear or Conv2d as MiT does; for `nn.Module.apply`.

    Linear: normal with deviation 0.02, bias 0 (the authors' code also cuts at +-2, which is 100
    deviations away). Convolution: normal with deviation sqrt(2 / fan_out), fan_out = kernel height
    * width * output channels / groups, bias 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        fan_out = height * width * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def drop_path_rates(depths: Sequence[int], last: float) -> list[list[float]]:
    """Return the rate of each block of each stage: over all blocks it grows linearly from 0.

    Args:
        depths: blocks of each stage.
        last: rate of the last block, in [0, 1).
    """
    steps = max(sum(depths) - 1, 1)
    firsts = [sum(depths[:index]) for index in range(len(depths))]
    return [
        [last * number / steps for number in range(first, first + depth)]
        for first, depth in zip(firsts, depths, strict=True)
    ]


class DropPath(nn.Module):
    """Drop a residual branch for whole samples while training (stochastic depth, Huang 2016).

    Args:
        rate: probability in [0, 1) that a sample's branch is dropped; the others are scaled by
            1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Return `branch` (B, ...) with the dropped samples set to zero."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        mask = branch.new_empty(branch.shape[:1] + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * mask.div_(keep)

    def extra_repr(self) -> str:
        """Show the rate in the module's print-out."""
        return f"rate={self.rate:.4f}"


class MixFFN(nn.Module):
    """Linear, depth-wise 3x3 convolution, GELU, Linear (SegFormer, equation 3, without the sum).

    Args:
        dim: channels of input and output.
        hidden: channels in between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.contract = nn.Linear(hidden, dim)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        hidden = F.gelu(convolve(self.depthwise, self.expand(map_BHWC)))
        out: Tensor = self.contract(hidden)
        return out


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and a LayerNorm.

    Args:
        in_dim: channels that come in.
        dim: channels that go out.
        kernel: side of the (odd) kernel in pixels; the padding is kernel // 2.
        stride: step in pixels; H becomes ceil(H / stride).
    """

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, in_dim) to (B, ceil(H / stride), ceil(W / stride), dim)."""
        out: Tensor = self.norm(convolve(self.conv, map_BHWC))
        return out
