"""Mix Transformer (MiT), the SegFormer backbone, and its ImageNet classifier.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers"
(NeurIPS 2021), section 3.1 and table 6. Written from the paper and from numbers measured on the
authors' code (NVlabs/SegFormer, 65fa8cf; no code taken). Difference from it: layout only, see
`nn.blocks`. Epsilons are theirs: 1e-6 in blocks and at the end of a stage, 1e-5 elsewhere.

Shape suffixes: B batch, H W rows and columns, C channels.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from xattn.errors import ConfigError
from xattn.nn.attention import MixBlock
from xattn.nn.blocks import BLOCK_NORM_EPS, PatchEmbed, init_weights

COARSEST_STRIDE = 32
"""Pixels between two tokens of stage 4, hence the smallest side that leaves every stage a token."""


class Stage(nn.Module):
    """Patch embedding, transformer blocks and the norm that ends them.

    Args:
        embed: brings the previous stage's output to this stage's resolution and channels.
        blocks: this stage's transformer blocks.
        dim: channels.
    """

    def __init__(self, embed: PatchEmbed, blocks: Sequence[MixBlock], dim: int) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map the previous stage's output to this stage's normed one."""
        map_BHWC = self.embed(map_BHWC)
        for block in self.blocks:
            map_BHWC = block(map_BHWC)
        out: Tensor = self.norm(map_BHWC)
        return out


def build_stages(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    sr_ratios: Sequence[int],
    mlp_ratio: int,
    drop_path: float,
) -> nn.ModuleList:
    """Build MiT's stages; the drop-path rate grows linearly from 0 to `drop_path` over all blocks.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        sr_ratios: reduction of the attention's source at each stage.
        mlp_ratio: hidden channels of the Mix-FFN over the stage's channels.
        drop_path: rate of the last block, in [0, 1).
    """
    last = max(sum(depths) - 1, 1)
    stages = nn.ModuleList()
    for index, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        embed = PatchEmbed(dims[index - 1], dim, 3, 2) if index else PatchEmbed(3, dim, 7, 4)
        first = sum(depths[:index])
        blocks = [
            MixBlock(dim, heads[index], sr_ratios[index], mlp_ratio, drop_path * number / last)
            for number in range(first, first + depth)
        ]
        stages.append(Stage(embed, blocks, dim))
    return stages


def to_channels_last(images: Tensor) -> Tensor:
    """View (B, 3, H, W) images as contiguous (B, H, W, 3); copies unless they lie so already.

    Raises:
        ConfigError: a side is too short to leave the coarsest stage a token.
    """
    height, width = images.shape[-2:]
    if min(height, width) < COARSEST_STRIDE:
        raise ConfigError(
            f"images: found {height} x {width} pixels, expected at least {COARSEST_STRIDE} a side"
        )
    return images.permute(0, 2, 3, 1).contiguous()


class MiT(nn.Module):
    """Four-stage hierarchical transformer without position embedding.

    Args: see `build_stages`. `dims` is kept for whoever builds a head.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        sr_ratios: Sequence[int],
        mlp_ratio: int = 4,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.stages = build_stages(dims, depths, heads, sr_ratios, mlp_ratio, drop_path)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) images to four normed maps.

        Returns:
            (B, C_l, ceil(H / s), ceil(W / s)) for s = 4, 8, 16, 32, channels_last in memory.
        """
        map_BHWC = to_channels_last(images)
        maps = []
        for stage in self.stages:
            map_BHWC = stage(map_BHWC)
            maps.append(map_BHWC.permute(0, 3, 1, 2))
        return maps


class MiTClassifier(nn.Module):
    """Mean over the last map's tokens, then one Linear.

    Args:
        backbone: has `dims` and returns maps (B, C_l, H_l, W_l), the last one coarsest.
        num_classes: outputs.
    """

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.dims[-1], num_classes)  # type: ignore[index, arg-type]
        init_weights(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) images to (B, num_classes) logits."""
        logits: Tensor = self.head(self.backbone(images)[-1].mean((2, 3)))
        return logits
