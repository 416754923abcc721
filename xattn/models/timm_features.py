"""A backbone's maps in the form of timm's `features_only` models."""

from collections.abc import Sequence

from timm.models import FeatureInfo
from torch import Tensor, nn

from xattn.errors import ConfigError
from xattn.models.pyramid import Pyramid


class Features(nn.Module):
    """Some levels of a backbone; `feature_info` tells their channels and strides.

    Args:
        backbone: maps (B, 3, H, W) images to levels of strides 4, 8, 16, ...; what only unread
            levels depend on is frozen where the last one alone is read.
        out_indices: which levels, from 0 (finest); negative ones count from the end.

    Raises:
        ConfigError: an index is beyond the levels.
    """

    def __init__(self, backbone: Pyramid, out_indices: Sequence[int]) -> None:
        super().__init__()
        dims = backbone.dims
        wrong = [index for index in out_indices if not -len(dims) <= index < len(dims)]
        if wrong:
            raise ConfigError(f"out_indices: found {wrong[0]}, expected 0 to {len(dims) - 1}")
        self.backbone = backbone
        self.out_indices = tuple(index % len(dims) for index in out_indices)
        if set(self.out_indices) == {len(dims) - 1}:
            backbone.freeze_fine_levels()
        levels = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": f"stages.{index}"}
            for index, dim in enumerate(dims)
        ]
        self.feature_info = FeatureInfo(levels, self.out_indices)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) images to the chosen (B, C_l, H_l, W_l) levels."""
        levels = self.backbone(images)
        return [levels[index] for index in self.out_indices]
