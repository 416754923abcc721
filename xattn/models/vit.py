"""ViT: tokens of one size from the first block to the last, read after some of them.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), as SegViT (Zhang et al., NeurIPS
2022) uses it, with SegViT's query-based down-sampling (QD, section 3.2). Written from the papers
and from facts about the released weights (zbwxp/SegVit; no code taken). As there: patches of 16,
LayerNorm epsilon 1e-6, no norm after the last block, and a class token that no block sees.
Differences:
- Layout: every map is (B, H, W, C), see `nn.blocks`; height and width go with the tokens.
- An image whose sides are no multiples of 16 is stretched to the next ones, so that tokens always
  lie evenly over the whole image; the original takes its training crop only.
- The class token and its position are kept for the weights' sake, frozen, since no gradient
  reaches them. Position embeddings of other grids are resized when loaded or applied.

Shape suffixes: B batch, H W rows and columns, C channels, N tokens, D width of one head.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xattn.errors import ConfigError
from xattn.models.swin import FFN
from xattn.nn.blocks import BLOCK_NORM_EPS, DropPath, convolve, drop_path_rates
from xattn.nn.grids import Grid

PATCH = 16
"""Side of a patch in pixels."""

Sampling = Literal["nearest", "conv", "nearest_qkv"]
Pixels = Literal["imagenet", "half"]

# Channels' mean and deviation that images come with (`data.pixels`), of values in [0, 1].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def split_heads(tokens_BNC: Tensor, heads: int) -> Tensor:
    """View (B, N, C) as (B, heads, N, C / heads)."""
    split: Tensor = tokens_BNC.unflatten(2, (heads, -1))
    return split.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of a map's tokens to those of another one or of the same.

    Args:
        dim: channels.
        heads: number of heads; divides `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, map_BHWC: Tensor, source_BhwC: Tensor | None = None) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C); keys and values are `source_BhwC`'s, if given."""
        height, width, dim = map_BHWC.shape[1:]
        tokens = map_BHWC.flatten(1, 2)
        if source_BhwC is None:
            query, key, value = self.query_key_value(tokens).chunk(3, dim=2)
        else:
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            query = F.linear(tokens, weight[:dim], bias[:dim])
            source = F.linear(source_BhwC.flatten(1, 2), weight[dim:], bias[dim:])
            key, value = source.chunk(2, dim=2)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: Tensor = self.output(attended.unflatten(1, (height, width)))
        return out


class ViTBlock(nn.Module):
    """Pre-norm transformer block: attention, then FFN.

    Args:
        dim: channels.
        heads: attention heads.
        mlp_ratio: hidden channels of the FFN over `dim`.
        drop_path: rate at which either residual branch is dropped.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.ffn = FFN(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return self.finish(map_BHWC, self.attention(self.norm1(map_BHWC)))

    def finish(self, map_BHWC: Tensor, attended_BHWC: Tensor) -> Tensor:
        """Add what attention found to the map, then apply the FFN."""
        map_BHWC = map_BHWC + self.drop_path(attended_BHWC)
        out: Tensor = map_BHWC + self.drop_path(self.ffn(self.norm2(map_BHWC)))
        return out


class ShrinkingBlock(ViTBlock):
    """A block whose queries are one token of every 2 x 2, and so is what goes on (QD).

    With the published sampling it has the parameters of the block whose place it takes.

    Args:
        dim, heads, mlp_ratio, drop_path: see `ViTBlock`.
        sampling: "nearest" takes the upper left token for the query alone (the paper's choice);
            "nearest_qkv" for key and value too; "conv" has the query from a learned convolution.
            The paper does not give its size; 3x3 here, so that odd maps are rounded up alike.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: int, drop_path: float, sampling: Sampling
    ) -> None:
        super().__init__(dim, heads, mlp_ratio, drop_path)
        self.sampling = sampling
        if sampling == "conv":
            self.reduce = nn.Conv2d(dim, dim, 3, 2, padding=1)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), C)."""
        is_learned = self.sampling == "conv"
        kept = convolve(self.reduce, map_BHWC) if is_learned else map_BHWC[:, ::2, ::2]
        query = self.norm1(kept)
        source = None if self.sampling == "nearest_qkv" else self.norm1(map_BHWC)
        return self.finish(kept, self.attention(query, source))


class ViT(nn.Module):
    """Plain vision transformer that returns the maps after some of its blocks.

    Args:
        dim: channels.
        depth: blocks.
        heads: attention heads.
        crop: (height, width) that it is trained on, px; fixes the grid of the position embedding.
        taps: which blocks' outputs are returned, from 1, ascending.
        mlp_ratio: hidden channels of an FFN over `dim`.
        drop_path: rate of the last block, see `drop_path_rates`.
        shrink_after: number of blocks after which the map's sides are halved; None for never.
        sampling: how, see `ShrinkingBlock`.
        pixels: how the weights want images normalised: "imagenet", as they come, or "half": by a
            mean and deviation of 0.5 (of values in [0, 1]), as AugReg's weights do.
        checkpoint: whether training keeps a block's input only and computes the rest again.

    Raises:
        ConfigError: `crop` is no size, or `taps` are no ascending list of blocks.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        crop: Sequence[int],
        taps: Sequence[int],
        mlp_ratio: int = 4,
        drop_path: float = 0.1,
        shrink_after: int | None = None,
        sampling: Sampling = "nearest",
        pixels: Pixels = "imagenet",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        grid = grid_of(crop)
        if not taps or list(taps) != sorted(set(taps)) or taps[0] < 1 or taps[-1] > depth:
            raise ConfigError(
                f"taps: found {list(taps)}, expected ascending numbers of blocks, 1 to {depth}"
            )
        self.dims = (dim,) * len(taps)
        self.taps = tuple(taps)
        self.pixels = pixels
        self.checkpoint = checkpoint
        self.embed = nn.Conv2d(3, dim, PATCH, PATCH)
        self.position = Grid(*grid, dim, std=0.02)
        self.class_token = nn.Parameter(torch.zeros(dim), requires_grad=False)
        self.class_position = nn.Parameter(torch.zeros(dim), requires_grad=False)
        # What is after the last tap would be trained by nothing.
        (rates,) = drop_path_rates((depth,), drop_path)
        self.blocks = nn.ModuleList(
            ShrinkingBlock(dim, heads, mlp_ratio, rate, sampling)
            if index == shrink_after
            else ViTBlock(dim, heads, mlp_ratio, rate)
            for index, rate in enumerate(rates[: taps[-1]])
        )
        for name, values in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.apply(init_linear)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) images to a map a tap.

        Returns:
            (B, C, h, w) in the order of `taps`, channels_last in memory: h = ceil(H / 16) and
            w = ceil(W / 16), halved (rounding up) where the map was shrunk before.
        """
        size = tuple(-(-side // PATCH) * PATCH for side in images.shape[2:])
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        if self.pixels == "half":
            images = (images * self.std + self.mean) * 2 - 1
        map_BHWC = self.embed(images).permute(0, 2, 3, 1)
        map_BHWC = map_BHWC + self.position((map_BHWC.shape[1], map_BHWC.shape[2]))
        maps = []
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint and self.training:
                map_BHWC = checkpoint(block, map_BHWC, use_reentrant=False)
            else:
                map_BHWC = block(map_BHWC)
            if number in self.taps:
                maps.append(map_BHWC.permute(0, 3, 1, 2))
        return maps


def grid_of(crop: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of tokens that an image of `crop`, (height, width) px, has.

    Raises:
        ConfigError: `crop` is no size.
    """
    if len(crop) != 2 or min(crop) < 1:
        raise ConfigError(f"crop: found {list(crop)}, expected a height and a width, px")
    height, width = (-(-side // PATCH) for side in crop)
    return height, width


def init_linear(module: nn.Module) -> None:
    """Initialise a Linear: normal with deviation 0.02, bias 0 (see `nn.blocks.init_weights`)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
