"""HILA on MiT: neighbouring stages exchange information while the coarser one is computed.

Leung et al., arXiv 2207.02126, sections 3.1 to 3.3. Written from the paper and from numbers
measured on the authors' code (fidler-lab/hila, 572d62f; no code taken). Differences from that code,
besides those of `nn.interlevel`:
- The low block's starting weights are copied when the model is built. There it happens in the first
  forward pass, after the optimiser has listed its parameters, which leaves the copy untrained.
- Maps with an odd side work.

Shape suffixes: B batch, H W rows and columns, C channels.
"""

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from xattn.errors import ConfigError
from xattn.models.mit import Stage, build_stages, to_channels_last
from xattn.nn.attention import MixBlock
from xattn.nn.blocks import init_weights
from xattn.nn.interlevel import BottomUpAttention, InterLevelUpdate, TopDownAttention


class LevelExchange(nn.Module):
    """Everything that HILA adds to one stage; every iteration uses the same weights.

    Args:
        low_dim: channels of the previous (finer) stage.
        high_dim: channels of this stage.
        low_block: block that follows a top-down update.
        stride: blocks between two exchanges.
        patch: side of a high token's patch in low cells.
        alpha: weight of the residual stream in an update.
        beta: weight of the FFN in an update.
        ffn_ratio: hidden channels of the updates' FFN over their width.
    """

    def __init__(
        self,
        low_dim: int,
        high_dim: int,
        low_block: MixBlock,
        stride: int,
        patch: int,
        alpha: float,
        beta: float,
        ffn_ratio: int,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.bottom_up = InterLevelUpdate(
            BottomUpAttention(high_dim, low_dim, patch), high_dim, low_dim, alpha, beta, ffn_ratio
        )
        self.top_down = InterLevelUpdate(
            TopDownAttention(low_dim, high_dim, patch), low_dim, high_dim, alpha, beta, ffn_ratio
        )
        self.apply(init_weights)
        self.low_block = low_block
        self.low_norm = nn.LayerNorm(low_dim)

    def forward(self, stage: Stage, low_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Run `stage` on the previous stage's normed output, with the exchanges in between.

        Returns:
            The stage's normed map and the refined, re-normed low map.
        """
        high_BHWC = stage.embed(low_BHWC)
        steps = exchange_steps(len(stage.blocks), self.stride)
        for block, (bottom_up, top_down) in zip(stage.blocks, steps, strict=True):
            if bottom_up:
                high_BHWC = self.bottom_up(high_BHWC, low_BHWC)
            high_BHWC = block(high_BHWC)
            if top_down:
                low_BHWC = self.low_block(self.top_down(low_BHWC, high_BHWC))
        return stage.norm(high_BHWC), self.low_norm(low_BHWC)


def exchange_steps(depth: int, stride: int) -> list[tuple[bool, bool]]:
    """Return, for each block, whether bottom-up precedes and whether top-down follows it.

    Bottom-up precedes blocks 0, s, 2s, ...; top-down follows blocks 1, 1 + s, ... (for s = 1 also
    block 0) except the last. The paper's text suggests another rule for s = 3, but its FLOPs fit
    only this one, which is the authors' code's.
    """
    return [
        (index % stride == 0, index != depth - 1 and (index - 1) % stride == 0)
        for index in range(depth)
    ]


class HilaMiT(nn.Module):
    """MiT with inter-level attention in some stages; its plain part has MiT's key names.

    Args:
        dims, depths, heads, sr_ratios, mlp_ratio, drop_path: of the MiT, see `mit.build_stages`.
        stages: numbers (2..4) of the stages that exchange with the one before, ascending.
        stride: blocks between two exchanges, one for all or one for each of `stages`.
        patch: side of a high token's patch in low cells; even.
        alpha: weight of the residual stream in an update.
        beta: weight of the FFN in an update.
        ffn_ratio: hidden channels of the updates' FFN over their width.

    Raises:
        ConfigError: `stages` or `stride` make no sense for these depths.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        sr_ratios: Sequence[int],
        mlp_ratio: int = 4,
        drop_path: float = 0.1,
        stages: Sequence[int] = (3,),
        stride: int | Sequence[int] = 1,
        patch: int = 4,
        alpha: float = 0.5,
        beta: float = 0.5,
        ffn_ratio: int = 4,
    ) -> None:
        super().__init__()
        strides = [stride] * len(stages) if isinstance(stride, int) else list(stride)
        _check_exchanges(depths, stages, strides)
        self.dims = tuple(dims)
        self.stages = build_stages(dims, depths, heads, sr_ratios, mlp_ratio, drop_path)
        self.stages.apply(init_weights)
        self.exchanges = nn.ModuleDict()
        for number, step in zip(stages, strides, strict=True):
            low, high = number - 2, number - 1
            block = copy.deepcopy(self._last_block(low))
            self.exchanges[str(number)] = LevelExchange(
                dims[low], dims[high], block, step, patch, alpha, beta, ffn_ratio
            )

    def _last_block(self, stage: int) -> MixBlock:
        return cast(MixBlock, cast(Stage, self.stages[stage]).blocks[-1])

    def copy_low_blocks(self) -> None:
        """Set every low block to the weights of its stage's last block.

        Done when the model is built; to be repeated after plain MiT weights have been loaded.
        """
        for number, exchange in self.exchanges.items():
            source = self._last_block(int(number) - 2)
            cast(LevelExchange, exchange).low_block.load_state_dict(source.state_dict())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) images to four normed maps, shaped as those of `MiT`."""
        map_BHWC = to_channels_last(images)
        maps: list[Tensor] = []
        for number, stage in enumerate(self.stages, start=1):
            if str(number) in self.exchanges:
                map_BHWC, maps[-1] = self.exchanges[str(number)](stage, map_BHWC)
            else:
                map_BHWC = stage(map_BHWC)
            maps.append(map_BHWC)
        return [level.permute(0, 3, 1, 2) for level in maps]


def _check_exchanges(depths: Sequence[int], stages: Sequence[int], strides: Sequence[int]) -> None:
    possible = range(2, len(depths) + 1)
    if not stages or list(stages) != sorted(set(stages)) or not set(stages) <= set(possible):
        raise ConfigError(
            f"stages: found {list(stages)}, expected ascending numbers out of {list(possible)}"
        )
    if len(strides) != len(stages):
        raise ConfigError(
            f"stride: found {len(strides)} numbers for {len(stages)} stages, "
            "expected one number or as many as stages"
        )
    for number, stride in zip(stages, strides, strict=True):
        depth = depths[number - 1]
        if stride < 1 or not any(top_down for _, top_down in exchange_steps(depth, stride)):
            raise ConfigError(
                f"stride: found {stride} at stage {number}, which gives its {depth} blocks "
                "no top-down update; expected a smaller one, at least 1"
            )
