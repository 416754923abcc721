"""HILA: neighbouring stages exchange information while the coarser one is computed.

Leung et al., arXiv 2207.02126, sections 3.1 to 3.3. Written from the paper and from numbers
measured on the authors' code (fidler-lab/hila, 572d62f; no code taken). Differences from that code,
besides those of `nn.interlevel`:
- The low block's starting weights are copied when the model is built. There it happens in the first
  forward pass, after the optimiser has listed its parameters, which leaves the copy untrained.
- Maps with an odd side work.
- `ExchangeConfig` holds the choices on which paper and code differ or which the paper ablates.

Shape suffixes: B batch, H W rows and columns, C channels.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from xattn.errors import ConfigError, check_choice
from xattn.models.mit import build_stages
from xattn.models.pyramid import Pyramid, Stage, to_channels_last
from xattn.nn.blocks import init_weights
from xattn.nn.interlevel import BottomUpAttention, InterLevelUpdate, TopDownAttention

SCHEDULES = ("code", "paired")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeConfig:
    """What the exchanges of all stages have in common.

    Args:
        patch: side of a high token's patch in low cells; even.
        alpha: weight of the residual stream in an update.
        beta: weight of the FFN in an update.
        ffn_ratio: hidden channels of the updates' FFN over their width.
        share: True: every iteration uses the same weights; "bu": each bottom-up update has its
            own; False: each top-down update and low block too. For stages of two blocks False and
            "bu" are the same; B1+S(3) has the paper's 16.3 M parameters only so.
        top_down: whether the low map is refined; without it there is neither low block nor low norm
            and the decoder sees the previous stage's own output (our reading of table 3's "BU").
        bottom_up: whether the high map is updated.
        scale: whose width scales the logits, "updated" or "inner", see `nn.interlevel`.
        border: what bottom-up sees outside the map, "bias_token" or "mask", see `nn.interlevel`.
        schedule: where top-down goes when the stride is above 2, see `exchange_steps`.

    Raises:
        ConfigError: neither direction is on, or `share` or `schedule` is none of these.
    """

    patch: int = 4
    alpha: float = 0.5
    beta: float = 0.5
    ffn_ratio: int = 4
    share: bool | Literal["bu"] = True
    top_down: bool = True
    bottom_up: bool = True
    scale: str = "updated"
    border: str = "bias_token"
    schedule: str = "code"

    def __post_init__(self) -> None:
        """Refuse what no exchange can be built of."""
        check_choice("share", str(self.share), ("True", "False", "bu"))
        check_choice("schedule", self.schedule, SCHEDULES)
        if not (self.top_down or self.bottom_up):
            raise ConfigError(
                "top_down: found False beside bottom_up False, expected at least one of them True"
            )


class LevelExchange(nn.Module):
    """Everything that HILA adds to one stage.

    `bottom_up`, `top_down` and `low_block` are modules where all iterations share them and lists,
    an entry an iteration, where they do not; a direction that is off is missing.

    Args:
        low_dim: channels of the previous (finer) stage.
        high_dim: channels of this stage.
        low_block: block to start those from that follow a top-down update; is copied.
        steps: see `exchange_steps`, for this stage's blocks.
        config: the rest.
        drop_path: rate in the updates.
        takes_turns: whether the low block is told how often it was called before, see
            `swin.SwinBlock`.
    """

    def __init__(
        self,
        low_dim: int,
        high_dim: int,
        low_block: nn.Module,
        steps: Sequence[tuple[bool, bool]],
        config: ExchangeConfig,
        drop_path: float = 0.0,
        takes_turns: bool = False,
    ) -> None:
        super().__init__()
        self.takes_turns = takes_turns
        self.steps = [(up and config.bottom_up, down and config.top_down) for up, down in steps]
        ups, downs = (sum(column) for column in zip(*self.steps, strict=True))
        if config.bottom_up:
            up_updates = [
                _build_update(
                    BottomUpAttention(high_dim, low_dim, config.patch, config.scale, config.border),
                    config,
                    drop_path,
                )
                for _ in range(1 if config.share is True else ups)
            ]
            self.bottom_up = _one_or_list(up_updates, config.share is True)
        if config.top_down:
            down_updates = [
                _build_update(
                    TopDownAttention(low_dim, high_dim, config.patch, config.scale),
                    config,
                    drop_path,
                )
                for _ in range(downs if config.share is False else 1)
            ]
            self.top_down = _one_or_list(down_updates, config.share is not False)
        self.apply(init_weights)
        self.refines = config.top_down
        if self.refines:
            blocks = [copy.deepcopy(low_block) for _ in down_updates]
            self.low_block = _one_or_list(blocks, config.share is not False)
            self.low_norm = nn.LayerNorm(low_dim)

    def forward(self, stage: Stage, low_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Run `stage` on what the previous one hands on, with the exchanges in between.

        Returns:
            The stage's map before its norm and the refined, re-normed low map (as it came without
            top-down).
        """
        high_BHWC = stage.embed(low_BHWC)
        ups = downs = 0
        for block, (bottom_up, top_down) in zip(stage.blocks, self.steps, strict=True):
            if bottom_up:
                high_BHWC = _nth(self.bottom_up, ups)(high_BHWC, low_BHWC)
                ups += 1
            high_BHWC = block(high_BHWC)
            if top_down:
                low_BHWC = _nth(self.top_down, downs)(low_BHWC, high_BHWC)
                turn = (downs,) if self.takes_turns else ()
                low_BHWC = _nth(self.low_block, downs)(low_BHWC, *turn)
                downs += 1
        return high_BHWC, self.low_norm(low_BHWC) if self.refines else low_BHWC

    def freeze_low_output(self) -> None:
        """Freeze what the refined low map alone depends on."""
        if not self.refines:
            return
        self.low_norm.requires_grad_(False)
        last_up = max((index for index, step in enumerate(self.steps) if step[0]), default=0)
        read = sum(top_down for _, top_down in self.steps[:last_up])
        for part in (self.top_down, self.low_block):
            if isinstance(part, nn.ModuleList):
                part[read:].requires_grad_(False)
            elif not read:
                part.requires_grad_(False)

    def surplus_macs(self, _stage: Stage, low_BHWC: Tensor) -> int:
        """Return what the paper's counter adds to the calls (rule: `evaluate.cost`).

        It charges the matrix products of every attention as if the stride were 1.
        """
        depth = len(self.steps)
        ups, downs = (sum(column) for column in zip(*self.steps, strict=True))
        height, width = (-(-side // 2) for side in low_BHWC.shape[1:3])
        macs = 0
        if ups:
            up = cast(InterLevelUpdate, _nth(self.bottom_up, 0)).attention
            macs += (depth - ups) * up.product_macs(height * width)
        if downs:
            down = cast(InterLevelUpdate, _nth(self.top_down, 0)).attention
            own = cast(Any, _nth(self.low_block, 0)).attention
            per_call = down.product_macs(height * width) + own.product_macs(low_BHWC)
            macs += (depth - 1 - downs) * per_call
        return macs


def _build_update(
    attention: BottomUpAttention | TopDownAttention, config: ExchangeConfig, drop_path: float
) -> InterLevelUpdate:
    target_dim, source_dim = attention.query.in_features, attention.key_value.in_features
    return InterLevelUpdate(
        attention,
        target_dim,
        source_dim,
        config.alpha,
        config.beta,
        config.ffn_ratio,
        drop_path,
    )


def _one_or_list(modules: Sequence[nn.Module], shared: bool) -> nn.Module:
    return modules[0] if shared else nn.ModuleList(modules)


def _nth(part: nn.Module, iteration: int) -> nn.Module:
    """Return the module for an iteration, counted from 0, of a part that may be shared."""
    return part[iteration] if isinstance(part, nn.ModuleList) else part


def exchange_steps(depth: int, stride: int, schedule: str = "code") -> list[tuple[bool, bool]]:
    """Return, for each block, whether bottom-up precedes and whether top-down follows it.

    Bottom-up precedes blocks 0, s, 2s, ... Top-down follows, except after the last block,
    - "code": blocks 1, 1 + s, ... (for s = 1 also block 0). This is the authors' code, and the only
      rule that the paper's FLOPs fit.
    - "paired": the block before each later bottom-up: s - 1, 2s - 1, ..., as the text suggests.
    The two are the same for s = 1 and 2.

    Args:
        depth: blocks of the stage.
        stride: blocks between two exchanges, s.
        schedule: one of `SCHEDULES`.
    """
    first = 1 if schedule == "code" else stride - 1
    return [
        (index % stride == 0, index != depth - 1 and (index - first) % stride == 0)
        for index in range(depth)
    ]


class Hila(Pyramid):
    """A hierarchical backbone whose stages exchange information.

    Args:
        built: the backbone's stages; each halves both sides (rounding up).
        dims: channels of each stage.
        stages: numbers (2..) of the stages that exchange with the one before, ascending.
        stride: blocks between two exchanges, one for all or one for each of `stages`.
        exchange: what the exchanges have in common.
        hands_on_normed: see `Pyramid`; the exchanges work on the same maps.
        drop_paths: rate in the updates of each stage; none without it.
        takes_turns: see `LevelExchange`.

    Raises:
        ConfigError: `stages` or `stride` make no sense for these depths.
    """

    def __init__(
        self,
        built: nn.ModuleList,
        dims: Sequence[int],
        stages: Sequence[int],
        stride: int | Sequence[int],
        exchange: ExchangeConfig,
        hands_on_normed: bool = True,
        drop_paths: Sequence[float] | None = None,
        takes_turns: bool = False,
    ) -> None:
        super().__init__(built, dims, hands_on_normed)
        depths = [len(cast(Stage, stage).blocks) for stage in built]
        steps = _all_steps(depths, stages, stride, exchange)
        self.exchanges = nn.ModuleDict()
        for number, stage_steps in zip(stages, steps, strict=True):
            low, high = number - 2, number - 1
            self.exchanges[str(number)] = LevelExchange(
                dims[low],
                dims[high],
                self._last_block(low),
                stage_steps,
                exchange,
                drop_paths[high] if drop_paths else 0.0,
                takes_turns,
            )
            if exchange.top_down and not hands_on_normed:  # the refined map stands for its output
                cast(Stage, built[low]).norm.requires_grad_(False)

    def _last_block(self, stage: int) -> nn.Module:
        return cast(Stage, self.stages[stage]).blocks[-1]

    def copy_low_blocks(self) -> None:
        """Set every low block to the weights of its stage's last block.

        Done when the model is built; to be repeated after plain backbone weights have been loaded.
        """
        for number, exchange in self.exchanges.items():
            if not cast(LevelExchange, exchange).refines:
                continue
            part = cast(nn.Module, exchange.low_block)
            for block in part if isinstance(part, nn.ModuleList) else [part]:
                block.load_state_dict(self._last_block(int(number) - 2).state_dict())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) images to normed maps, shaped as those of `Pyramid`."""
        map_BHWC = to_channels_last(images)
        maps: list[Tensor] = []
        for number, stage in enumerate(self.stages, start=1):
            if str(number) in self.exchanges:
                exchange = cast(LevelExchange, self.exchanges[str(number)])
                map_BHWC, low_BHWC = exchange(stage, map_BHWC)
                if exchange.refines:
                    maps[-1] = low_BHWC
            else:
                map_BHWC = stage(map_BHWC)
            maps.append(cast(Stage, stage).norm(map_BHWC))
            if self.hands_on_normed:
                map_BHWC = maps[-1]
        return [level.permute(0, 3, 1, 2) for level in maps]

    def freeze_fine_levels(self) -> None:
        """Freeze what only the maps before the last depend on, as in `Pyramid`."""
        super().freeze_fine_levels()
        for exchange in self.exchanges.values():
            cast(LevelExchange, exchange).freeze_low_output()


class HilaMiT(Hila):
    """MiT with inter-level attention in some stages; its plain part has MiT's key names.

    Args:
        dims, depths, heads, sr_ratios, mlp_ratio, drop_path: of the MiT, see `mit.build_stages`.
        stages, stride, exchange: see `Hila`.

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
        exchange: ExchangeConfig | None = None,
    ) -> None:
        built = build_stages(dims, depths, heads, sr_ratios, mlp_ratio, drop_path)
        super().__init__(built, dims, stages, stride, exchange or ExchangeConfig())


def _all_steps(
    depths: Sequence[int],
    stages: Sequence[int],
    stride: int | Sequence[int],
    exchange: ExchangeConfig,
) -> list[list[tuple[bool, bool]]]:
    """Return `exchange_steps` for each of `stages`.

    Raises:
        ConfigError: stages or strides that cannot be, or a stage without its top-down update.
    """
    possible = range(2, len(depths) + 1)
    if not stages or list(stages) != sorted(set(stages)) or not set(stages) <= set(possible):
        raise ConfigError(
            f"stages: found {list(stages)}, expected ascending numbers out of {list(possible)}"
        )
    strides = [stride] * len(stages) if isinstance(stride, int) else list(stride)
    if len(strides) != len(stages):
        raise ConfigError(
            f"stride: found {len(strides)} numbers for {len(stages)} stages, "
            "expected one number or as many as stages"
        )
    all_steps = []
    for number, step in zip(stages, strides, strict=True):
        depth = depths[number - 1]
        if step < 1:
            raise ConfigError(f"stride: found {step} at stage {number}, expected at least 1")
        steps = exchange_steps(depth, step, exchange.schedule)
        if exchange.top_down and not any(top_down for _, top_down in steps):
            raise ConfigError(
                f"stride: found {step} at stage {number}, which gives its {depth} blocks "
                "no top-down update; expected a smaller one, at least 1, or top_down False"
            )
        all_steps.append(steps)
    return all_steps
