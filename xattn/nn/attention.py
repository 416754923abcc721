"""Self-attention with a reduced source, and the MiT block around it.

Xie et al., "SegFormer" (2021), section 3.1 (after Wang et al., PVT, 2021). Layout and shape
suffixes as in `blocks.py`.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from xattn.nn.blocks import BLOCK_NORM_EPS, DropPath, MixFFN, convolve


class ReducedAttention(nn.Module):
    """Multi-head self-attention whose keys and values come from a smaller map.

    Args:
        dim: channels.
        heads: number of heads; divides `dim`. Logits are scaled by (dim / heads) ** -0.5.
        reduction: side of the square of tokens that one key stands for (SR ratio); rows and
            columns beyond the last full square are not seen by the keys.
    """

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
            self.reduce_norm = nn.LayerNorm(dim)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        source_BHWC = map_BHWC
        if self.reduction > 1:
            source_BHWC = self.reduce_norm(convolve(self.reduce, map_BHWC))
        query = self.query(map_BHWC).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key_value = self.key_value(source_BHWC).flatten(1, 2).unflatten(2, (2, self.heads, -1))
        key, value = key_value.permute(2, 0, 3, 1, 4)
        out_BNC = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: Tensor = self.output(out_BNC.unflatten(1, map_BHWC.shape[1:3]))
        return out

    def count_macs(self, map_BHWC: Tensor) -> int:
        """Return the multiply-adds for one image (rule: `evaluate.cost`)."""
        height, width, dim = map_BHWC.shape[1:]
        tokens = height * width
        keys = (height // self.reduction) * (width // self.reduction)
        macs = 2 * tokens * dim**2 + 2 * keys * dim**2 + self.product_macs(map_BHWC)
        if self.reduction > 1:
            macs += keys * dim * (self.reduction**2 * dim + 1) + 2 * keys * dim
        return macs

    def product_macs(self, map_BHWC: Tensor) -> int:
        """Return the two matrix products' part of `count_macs`: 2 * tokens * keys * dim."""
        height, width, dim = map_BHWC.shape[1:]
        keys = (height // self.reduction) * (width // self.reduction)
        return 2 * height * width * keys * dim


class MixBlock(nn.Module):
    """Pre-norm transformer block of MiT: reduced attention, then Mix-FFN.

    Args:
        dim: channels.
        heads: attention heads.
        reduction: SR ratio of the attention.
        mlp_ratio: hidden channels of the FFN over `dim`.
        drop_path: rate at which either residual branch is dropped.
    """

    def __init__(
        self, dim: int, heads: int, reduction: int, mlp_ratio: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.attention = ReducedAttention(dim, heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.ffn = MixFFN(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        map_BHWC = map_BHWC + self.drop_path(self.attention(self.norm1(map_BHWC)))
        out: Tensor = map_BHWC + self.drop_path(self.ffn(self.norm2(map_BHWC)))
        return out
