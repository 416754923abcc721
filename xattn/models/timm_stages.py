"""timm's PVTv2 as a backbone for HILA, an example of how a backbone from elsewhere joins.

Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer" (2022); timm's code and
weights. A stage's output norm comes before the next stage, as in MiT.

Shape suffixes: B batch, H W rows and columns, C channels.
"""

from collections.abc import Sequence
from typing import cast

from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn

from xattn.models.hila import ExchangeConfig, Hila
from xattn.models.pyramid import Stage


class _Embed(nn.Module):
    """timm's patch embedding, which takes channels first and gives channels last."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, map_BHWC: Tensor) -> Tensor:
        out: Tensor = self.embed(map_BHWC.permute(0, 3, 1, 2))
        return out


class _Block(nn.Module):
    """timm's block, which takes tokens and the size of their map."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, map_BHWC: Tensor) -> Tensor:
        size = map_BHWC.shape[1:3]
        out: Tensor = self.block(map_BHWC.flatten(1, 2), size).unflatten(1, size)
        return out


class HilaPVT(Hila):
    """timm's PVTv2 with inter-level attention in some stages.

    Args:
        pvt: from `timm.create_model`, of any size, pretrained or not; its stages are taken over,
            its classifier is left out.
        stages, stride, exchange: see `Hila`.

    Raises:
        ConfigError: `stages` or `stride` make no sense for these depths.
    """

    def __init__(
        self,
        pvt: PyramidVisionTransformerV2,
        stages: Sequence[int],
        stride: int | Sequence[int] = 1,
        exchange: ExchangeConfig | None = None,
    ) -> None:
        embeds = [pvt.patch_embed, *(stage.downsample for stage in pvt.stages[1:])]
        built = nn.ModuleList(
            Stage(_Embed(embed), [_Block(block) for block in stage.blocks], stage.norm)
            for embed, stage in zip(embeds, pvt.stages, strict=True)
        )
        dims = [cast(int, level["num_chs"]) for level in pvt.feature_info]
        super().__init__(built, dims, stages, stride, exchange or ExchangeConfig())
