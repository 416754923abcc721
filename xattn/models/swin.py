"""Swin Transformer: attention within windows, which every second block shifts by half a side.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021),
section 3 and its appendix A1. Written from the paper and from what is known of the authors' code
for segmentation (SwinTransformer/Swin-Transformer-Semantic-Segmentation; no code taken), whose
choices are kept: a map is filled with zeros below and to the right up to whole windows, and only
then rolled; every stage has a norm for the decoder, while the next stage reads the map before it.
Differences:
- Layout: every map is (B, H, W, C), see `nn.blocks`.
- The output projection comes after the filling has been cut off again.
- Pairs that a rolled window brings together by accident are shut out by -inf, not by -100.
- Patch merging belongs to the start of a stage (as in timm), not to the end of the one before.

Shape suffixes: B batch, H W rows and columns, C channels, M windows, N tokens of a window, E
attention heads, D width of one head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.models.pyramid import Pyramid, Stage
from xattn.nn.blocks import DropPath, convolve, drop_path_rates


def _fill(map_BHWC: Tensor, step: int) -> Tensor:
    """Return the map with zeros below and to the right, up to multiples of `step`."""
    below, right = (-side % step for side in map_BHWC.shape[1:3])
    return F.pad(map_BHWC, (0, 0, 0, right, 0, below)) if below or right else map_BHWC


def _windows(map_BHWC: Tensor, side: int) -> Tensor:
    """Cut a map into (B, M, N, C): windows row by row, and their tokens row by row."""
    windows: Tensor = map_BHWC.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _join(windows_BMNC: Tensor, side: int, columns: int) -> Tensor:
    """Undo `_windows`; `columns` counts the windows of a row."""
    windows: Tensor = windows_BMNC.unflatten(2, (side, side)).unflatten(1, (-1, columns))
    return windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _places(side: int) -> Tensor:
    """Return (N, N) rows of the bias table: one for each offset of a query from a key."""
    row, column = torch.cartesian_prod(torch.arange(side), torch.arange(side)).unbind(1)
    down, right = (axis[:, None] - axis[None, :] + side - 1 for axis in (row, column))
    return down * (2 * side - 1) + right


def _barriers(side: int, shift: int) -> Tensor:
    """Return (4, N, N): -inf between tokens that only the rolling brought together, 0 elsewhere.

    That happens in the last row of windows (2 and 3), the last column (1 and 3), nowhere else (0).
    """
    wrapped = torch.arange(side) >= side - shift
    row, column = torch.cartesian_prod(wrapped, wrapped).unbind(1)
    below, beside = (axis[:, None] != axis[None, :] for axis in (row, column))
    apart = torch.stack([torch.zeros_like(below), beside, below, below | beside])
    return torch.zeros(apart.shape).masked_fill(apart, float("-inf"))


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a bias for each offset of query from key.

    Zeros that fill up the last windows take part as tokens.

    Args:
        dim: channels.
        heads: number of heads; divides `dim`. Logits are scaled by (dim / heads) ** -0.5.
        window: tokens of a window's side.
        shifts_lone_window: whether to shift even along an axis that one window covers, as the
            segmentation code does; the classifier does not.
    """

    def __init__(self, dim: int, heads: int, window: int, shifts_lone_window: bool) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.shifts_lone_window = shifts_lone_window
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.relative_position_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.place: Tensor
        self.register_buffer("place", _places(window), persistent=False)
        self.barriers: Tensor
        self.register_buffer("barriers", _barriers(window, window // 2), persistent=False)

    def forward(self, map_BHWC: Tensor, is_shifted: bool) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C).

        Args:
            map_BHWC: of any size.
            is_shifted: whether windows start half a side further down and to the right.
        """
        height, width = map_BHWC.shape[1:3]
        out: Tensor = self.output(self._joined(map_BHWC, is_shifted)[:, :height, :width])
        return out

    def as_written(self, map_BHWC: Tensor, is_shifted: bool) -> Tensor:
        """Return the same, projecting what fills up windows too; for counting."""
        height, width = map_BHWC.shape[1:3]
        out: Tensor = self.output(self._joined(map_BHWC, is_shifted))
        return out[:, :height, :width]

    def _joined(self, map_BHWC: Tensor, is_shifted: bool) -> Tensor:
        """Return the attention's result for the map filled up to whole windows."""
        filled_BHWC = _fill(map_BHWC, self.window)
        counts = [side // self.window for side in filled_BHWC.shape[1:3]]
        shifts = [
            self.window // 2 if is_shifted and (count > 1 or self.shifts_lone_window) else 0
            for count in counts
        ]
        if any(shifts):
            filled_BHWC = filled_BHWC.roll([-shift for shift in shifts], (1, 2))
        attended_BMNC = self._attend(_windows(filled_BHWC, self.window), counts, shifts)
        joined_BHWC = _join(attended_BMNC, self.window, counts[1])
        if any(shifts):
            joined_BHWC = joined_BHWC.roll(shifts, (1, 2))
        return joined_BHWC

    def _attend(self, windows_BMNC: Tensor, counts: list[int], shifts: list[int]) -> Tensor:
        """Return the attention's result for each window, before the output projection."""
        parts = self.query_key_value(windows_BMNC).unflatten(3, (3, self.heads, -1))
        query_key_value = parts.permute(3, 0, 1, 4, 2, 5)  # (3, B, M, E, N, D)
        bias = self.relative_position_bias[self.place].permute(2, 0, 1)
        if any(shifts):  # a bias for each window, the same for all images
            bias = (bias + self._window_barriers(counts, shifts)).flatten(0, 1)
            query, key, value = query_key_value.flatten(2, 3)
        else:
            query, key, value = query_key_value.flatten(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out = out.reshape(*windows_BMNC.shape[:2], self.heads, windows_BMNC.shape[2], -1)
        return out.transpose(2, 3).flatten(3)

    def _window_barriers(self, counts: list[int], shifts: list[int]) -> Tensor:
        """Return (M, 1, N, N): what keeps apart what only the rolling brought together."""
        kind = self.place.new_zeros(counts)
        if shifts[0]:
            kind[-1] += 2
        if shifts[1]:
            kind[:, -1] += 1
        return self.barriers[kind.flatten()].unsqueeze(1)

    def count_macs(self, map_BHWC: Tensor, _is_shifted: bool) -> int:
        """Return the multiply-adds for one image (rule: `evaluate.cost`)."""
        height, width, dim = map_BHWC.shape[1:]
        tokens = (height + -height % self.window) * (width + -width % self.window)
        return 4 * tokens * dim**2 + self.product_macs(map_BHWC)

    def product_macs(self, map_BHWC: Tensor) -> int:
        """Return the two matrix products' part of `count_macs`."""
        height, width, dim = map_BHWC.shape[1:]
        return 2 * height * width * self.window**2 * dim


class FFN(nn.Module):
    """Linear, GELU, Linear.

    Args:
        dim: channels of input and output.
        hidden: channels in between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        out: Tensor = self.contract(F.gelu(self.expand(map_BHWC)))
        return out


class SwinBlock(nn.Module):
    """Pre-norm transformer block: window attention, then FFN.

    Args:
        dim: channels.
        heads: attention heads.
        window: tokens of a window's side.
        mlp_ratio: hidden channels of the FFN over `dim`.
        drop_path: rate at which either residual branch is dropped.
        is_shifted: whether the windows are shifted.
        shifts_lone_window: see `WindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        mlp_ratio: int,
        drop_path: float,
        is_shifted: bool,
        shifts_lone_window: bool,
    ) -> None:
        super().__init__()
        self.is_shifted = is_shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window, shifts_lone_window)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = FFN(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, map_BHWC: Tensor, turn: int = 0) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C).

        Args:
            map_BHWC: of any size.
            turn: how often the same block was applied before; odd turns take the other windows.
        """
        is_shifted = self.is_shifted != bool(turn % 2)
        map_BHWC = map_BHWC + self.drop_path(self.attention(self.norm1(map_BHWC), is_shifted))
        out: Tensor = map_BHWC + self.drop_path(self.ffn(self.norm2(map_BHWC)))
        return out


class PatchSplit(nn.Module):
    """Patches side by side: a strided convolution and a LayerNorm; zeros fill up the last patches.

    Args:
        dim: channels that go out.
        patch: side of a patch in pixels.
    """

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(3, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, 3) to (B, ceil(H / patch), ceil(W / patch), dim)."""
        out: Tensor = self.norm(convolve(self.conv, _fill(map_BHWC, self.patch)))
        return out


class PatchMerge(nn.Module):
    """Four neighbours become one token of twice the channels; zeros fill up an odd map.

    Args:
        dim: channels that come in.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C).

        The neighbours lie one after another in the order of the authors' weights: left column
        first, from above.
        """
        cells = _fill(map_BHWC, 2).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        out: Tensor = self.reduce(self.norm(cells.permute(0, 1, 3, 4, 2, 5).flatten(3)))
        return out


def build_stages(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    window: int,
    mlp_ratio: int,
    drop_path: float,
    shifts_lone_window: bool,
) -> nn.ModuleList:
    """Build Swin's stages with fresh weights.

    Args:
        dims: channels of each stage, each twice those of the one before.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: tokens of a window's side.
        mlp_ratio: hidden channels of the FFN over the stage's channels.
        drop_path: rate of the last block, see `drop_path_rates`.
        shifts_lone_window: see `WindowAttention`.
    """
    stages = nn.ModuleList()
    for index, (dim, rates) in enumerate(
        zip(dims, drop_path_rates(depths, drop_path), strict=True)
    ):
        embed = PatchMerge(dims[index - 1]) if index else PatchSplit(dim, 4)
        blocks = [
            SwinBlock(
                dim, heads[index], window, mlp_ratio, rate, number % 2 == 1, shifts_lone_window
            )
            for number, rate in enumerate(rates)
        ]
        stages.append(Stage(embed, blocks, nn.LayerNorm(dim)))
    return stages.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    """Initialise as the authors do; the patches' convolution stays as torch makes it."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        nn.init.normal_(module.relative_position_bias, std=0.02)


class Swin(Pyramid):
    """Four-stage hierarchical transformer of shifted windows.

    Args: see `build_stages`.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        window: int = 7,
        mlp_ratio: int = 4,
        drop_path: float = 0.3,
        shifts_lone_window: bool = True,
    ) -> None:
        stages = build_stages(dims, depths, heads, window, mlp_ratio, drop_path, shifts_lone_window)
        super().__init__(stages, dims, hands_on_normed=False)
