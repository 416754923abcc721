"""Mix Transformer (MiT), the SegFormer backbone.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers"
(NeurIPS 2021), section 3.1 and table 6. Written from the paper and from numbers measured on the
authors' code (NVlabs/SegFormer, 65fa8cf; no code taken). Difference from it: layout only, see
`nn.blocks`. Epsilons are theirs: 1e-6 in blocks and at the end of a stage, 1e-5 elsewhere.
"""

from collections.abc import Sequence

from torch import nn

from xattn.models.pyramid import Pyramid, Stage
from xattn.nn.attention import MixBlock
from xattn.nn.blocks import BLOCK_NORM_EPS, PatchEmbed, drop_path_rates, init_weights


def build_stages(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    sr_ratios: Sequence[int],
    mlp_ratio: int,
    drop_path: float,
) -> nn.ModuleList:
    """Build MiT's stages with fresh weights.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        sr_ratios: reduction of the attention's source at each stage.
        mlp_ratio: hidden channels of the Mix-FFN over the stage's channels.
        drop_path: rate of the last block, see `drop_path_rates`.
    """
    stages = nn.ModuleList()
    for index, (dim, rates) in enumerate(
        zip(dims, drop_path_rates(depths, drop_path), strict=True)
    ):
        embed = PatchEmbed(dims[index - 1], dim, 3, 2) if index else PatchEmbed(3, dim, 7, 4)
        blocks = [MixBlock(dim, heads[index], sr_ratios[index], mlp_ratio, rate) for rate in rates]
        stages.append(Stage(embed, blocks, nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)))
    return stages.apply(init_weights)


class MiT(Pyramid):
    """Four-stage hierarchical transformer without position embedding.

    Args: see `build_stages`.
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
        stages = build_stages(dims, depths, heads, sr_ratios, mlp_ratio, drop_path)
        super().__init__(stages, dims, hands_on_normed=True)
