"""What hierarchical backbones have in common: stages in a row, a map of each for the decoder.

Shape suffixes: B batch, H W rows and columns, C channels.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from xattn.errors import ConfigError
from xattn.nn.blocks import init_weights

COARSEST_STRIDE = 32
"""Pixels between two tokens of stage 4, hence the smallest side that leaves every stage a token."""


class Stage(nn.Module):
    """Embedding, transformer blocks and the norm of what the decoder sees.

    Args:
        embed: brings what the previous stage hands on to this stage's resolution and channels.
        blocks: this stage's transformer blocks, (B, H, W, C) to (B, H, W, C).
        norm: over the channels; applied by whoever runs the stage.
    """

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map what the previous stage hands on to this stage's map before its norm."""
        map_BHWC = self.embed(map_BHWC)
        for block in self.blocks:
            map_BHWC = block(map_BHWC)
        return map_BHWC


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


class Pyramid(nn.Module):
    """A backbone of `Stage` modules.

    Args:
        stages: each halves both sides (rounding up), the first one divides them by 4.
        dims: channels of each stage; kept for whoever builds a head.
        hands_on_normed: whether a stage reads the normed map of the one before (MiT), or the map
            before the norm, which then serves the decoder only (Swin).
    """

    def __init__(self, stages: nn.ModuleList, dims: Sequence[int], hands_on_normed: bool) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.stages = stages
        self.hands_on_normed = hands_on_normed

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) images to a normed map a stage.

        Returns:
            (B, C_l, ceil(H / s), ceil(W / s)) for s = 4, 8, 16, 32, channels_last in memory.
        """
        map_BHWC = to_channels_last(images)
        maps = []
        for stage in self.stages:
            map_BHWC = stage(map_BHWC)
            normed_BHWC = cast(Stage, stage).norm(map_BHWC)
            maps.append(normed_BHWC.permute(0, 3, 1, 2))
            if self.hands_on_normed:
                map_BHWC = normed_BHWC
        return maps

    def freeze_fine_levels(self) -> None:
        """Freeze what only the maps before the last depend on, for models that read the last alone.

        Left trainable, distributed training would wait for these parameters' gradients.
        """
        if not self.hands_on_normed:
            for stage in self.stages[:-1]:
                cast(Stage, stage).norm.requires_grad_(False)


class Classifier(nn.Module):
    """Mean over the last map's tokens, then one Linear.

    Args:
        backbone: its maps before the last are not read, nor is trained what they alone depend on.
        num_classes: outputs.
    """

    def __init__(self, backbone: Pyramid, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        backbone.freeze_fine_levels()
        self.head = nn.Linear(backbone.dims[-1], num_classes)
        init_weights(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) images to (B, num_classes) logits."""
        logits: Tensor = self.head(self.backbone(images)[-1].mean((2, 3)))
        return logits
