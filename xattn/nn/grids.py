"""Learned vectors that belong to places of a picture, for pictures of any size.

Shape suffixes: H W rows and columns of tokens, C channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def resize_grid(grid_HWC: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a grid resized bicubically to (*size, C), in at least float32.

    As mmsegmentation does with position embeddings: corners not aligned, no antialiasing.
    """
    wide = grid_HWC.to(torch.promote_types(grid_HWC.dtype, torch.float32))
    resized = F.interpolate(wide.permute(2, 0, 1)[None], size, mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0)


class Grid(nn.Module):
    """A learned vector for each cell of a grid, resized where a picture has another number of them.

    Args:
        height: rows, of the pictures that the model is trained on.
        width: columns.
        dim: channels.
        std: deviation of the fresh vectors.
    """

    def __init__(self, height: int, width: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(height, width, dim))
        nn.init.normal_(self.weight, std=std)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Return (*size, dim)."""
        # What is exported must not depend on whether the example has the grid's size; resizing to
        # the same one changes nothing.
        if not torch.compiler.is_exporting() and self.weight.shape[:2] == size:
            return self.weight
        return resize_grid(self.weight, size)


def resize_grids(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with every `Grid` of the model resized to what the model has.

    Args:
        model: is left as it is.
        given: weights by the model's names.
    """
    fitting = dict(given)
    for name, module in model.named_modules():
        tensor = given.get(key := f"{name}.weight")
        if isinstance(module, Grid) and tensor is not None and tensor.ndim == 3:
            height, width = module.weight.shape[:2]
            if tensor.shape[:2] != (height, width):
                fitting[key] = resize_grid(tensor, (height, width)).to(tensor.dtype)
    return fitting
