"""CFSAM: attention over the cells of all levels at once, and what its paper compares it with.

Xie et al., "Cross-Layer Feature Self-Attention Module for Multi-Scale Object Detection", section 3.
There is no public code: what the paper leaves open was reconstructed from the parameters and
multiply-adds of its table 4, see `CFSAM`, `ConcatExcitation` and `MobileViTBlock`. Everything here
maps a list of maps to a list of maps of the same sizes, so that it fits behind any backbone.

Shape suffixes: B batch, H W rows and columns, C channels, T cells of all levels, N tokens that
attend to each other, D width of one head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.errors import ConfigError, check_choice
from xattn.models.ssd import init_xavier

_NORMS = ("none", "bn")
_SE_REDUCTION = 16
_MVIT_DEPTH, _MVIT_HEADS, _MVIT_PATCH = 2, 4, 2


class Attention(nn.Module):
    """Multi-head self-attention (B, N, C) -> (B, N, C).

    Args:
        dim: channels.
        heads: must divide them.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """Let every token attend to all."""
        projected = self.query_key_value(tokens_BNC).unflatten(2, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, heads, N, D) each
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Linear, SiLU, Linear, for each token alone.

    Args:
        dim: channels that come in and go out.
        hidden: channels in between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        out: Tensor = self.contract(F.silu(self.expand(tokens_BNC)))
        return out


class TransformerLayer(nn.Module):
    """Mix the tokens, then the channels; norms before, residual sums around (as in MobileViT).

    Args:
        dim: channels.
        mixer: (B, N, C) -> (B, N, C).
        hidden: channels inside the MLP.
    """

    def __init__(self, dim: int, mixer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden)

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        tokens_BNC = tokens_BNC + self.mixer(self.norm1(tokens_BNC))
        out: Tensor = tokens_BNC + self.mlp(self.norm2(tokens_BNC))
        return out


def partition(tokens_BTC: Tensor, parts: int) -> Tensor:
    """Deal a row of cells out (equation 2): part k gets k, k + parts, k + 2 * parts and so on.

    Args:
        tokens_BTC: T is a multiple of `parts`.
        parts: how many.

    Returns:
        (B * parts, T / parts, C).
    """
    dealt: Tensor = tokens_BTC.unflatten(1, (-1, parts))
    return dealt.transpose(1, 2).flatten(0, 1)


def combine(tokens_BNC: Tensor, parts: int) -> Tensor:
    """Undo `partition` (equation 4): (B * parts, N, C) to (B, parts * N, C)."""
    dealt: Tensor = tokens_BNC.unflatten(0, (-1, parts))
    return dealt.transpose(1, 2).flatten(1, 2)


def resample(tokens_BTC: Tensor, length: int) -> Tensor:
    """Resample a row of cells linearly to (B, length, C); one of that length stays as it is."""
    if tokens_BTC.shape[1] == length:
        return tokens_BTC
    resized = F.interpolate(tokens_BTC.transpose(1, 2), [length], mode="linear")
    return resized.transpose(1, 2)


class CFSAM(nn.Module):
    """Cross-layer feature self-attention module.

    A 3x3 and a 1x1 convolution on each map (LFE); the cells of all maps in one row, dealt out to
    parts in turn, pass transformer layers that attend within a part (GFE); before and after are
    joined and fused, and the row becomes maps again (FFR). A map that is left out passes through.

    From table 4's counts (none else of those searched comes nearer: 45.168 M of 45.16 M parameters,
    45.236 G of 45.22 G multiply-adds): 3x3 convolutions keep the channels, no bias in convolutions,
    three layers with an MLP of 512 channels, no norm at their end, a 1x1 convolution where a
    map's channels are not the width, no sum with what came in. Not known, hence chosen: 8 heads,
    ReLU after the 3x3 convolution and SiLU in the MLP, both as in MobileViT but for the missing
    norm; Xavier's initial weights, as SSD's new layers have them.

    Args:
        dims: channels of the maps, in their order.
        levels: numbers of the maps that take part, from 1; None means all.
        width: channels of the cells.
        gfe: whether there are transformer layers.
        ffr: whether what comes in and out of them is fused; else what comes out is used alone.
        part: how many parts attend apart; a row that is no multiple of it is resampled.
        depth: transformer layers.
        mlp: channels inside their MLPs.
        heads: of attention; must divide the width.
        norm: "bn" puts a BatchNorm behind the 3x3 convolutions (which trains on more than one image
            where a map is 1 x 1), "none" as the counts say.
        attention: False replaces attention by an MLP for each cell of the same size, less `width`
            parameters a layer: a control that has all but the sight of other cells and levels.

    Raises:
        ConfigError: the numbers do not go together; the message opens with the key.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        levels: Sequence[int] | None = None,
        width: int = 256,
        gfe: bool = True,
        ffr: bool = True,
        part: int = 2,
        depth: int = 3,
        mlp: int = 512,
        heads: int = 8,
        norm: str = "none",
        attention: bool = True,
    ) -> None:
        super().__init__()
        numbers = tuple(range(1, len(dims) + 1)) if levels is None else tuple(levels)
        check_choice("norm", norm, _NORMS)
        _check_levels(numbers, len(dims))
        if gfe and attention and width % heads:
            raise ConfigError(f"heads: found {heads}, expected a divisor of the width {width}")
        if ffr and not gfe:
            raise ConfigError("ffr: found True beside gfe False, which leaves it nothing to fuse")
        self.levels = tuple(number - 1 for number in numbers)
        self.part = part
        own = [dims[level] for level in self.levels]
        self.local = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                nn.BatchNorm2d(dim) if norm == "bn" else nn.Identity(),
                nn.ReLU(),
                nn.Conv2d(dim, width, 1, bias=False),
            )
            for dim in own
        )
        self.layers = nn.ModuleList(
            TransformerLayer(
                width, Attention(width, heads) if attention else FeedForward(width, 2 * width), mlp
            )
            for _ in range(depth if gfe else 0)
        )
        self.fuse = nn.Linear(2 * width, width, bias=False) if ffr else None
        self.restore = nn.ModuleList(
            nn.Identity() if dim == width else nn.Linear(width, dim, bias=False) for dim in own
        )
        self.apply(init_xavier)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, C_l, H_l, W_l) maps, as many as `dims`, to maps of the same shapes."""
        chosen = [maps[level] for level in self.levels]
        local = [
            conv(map_BCHW).flatten(2).transpose(1, 2)
            for conv, map_BCHW in zip(self.local, chosen, strict=True)
        ]
        cells_BTC = torch.cat(local, 1)  # equation 1
        if self.layers:
            cells_BTC = self._see_all(cells_BTC)
        out = list(maps)
        sizes = [map_BCHW.shape[2:] for map_BCHW in chosen]
        rows = cells_BTC.split([size.numel() for size in sizes], 1)
        for level, row, restore, size in zip(self.levels, rows, self.restore, sizes, strict=True):
            out[level] = restore(row).unflatten(1, tuple(size)).permute(0, 3, 1, 2)
        return out

    def _see_all(self, cells_BTC: Tensor) -> Tensor:
        """Return the row after global extraction and fusion (equations 2 to 5)."""
        length = cells_BTC.shape[1]
        before = resample(cells_BTC, -(-length // self.part) * self.part)
        after = partition(before, self.part)
        for layer in self.layers:
            after = layer(after)
        after = combine(after, self.part)
        if self.fuse is not None:
            after = self.fuse(torch.cat([before, after], 2))
        return resample(after, length)


def _check_levels(levels: Sequence[int], count: int) -> None:
    if (
        not levels
        or sorted(set(levels)) != list(levels)
        or not 1 <= levels[0] <= levels[-1] <= count
    ):
        raise ConfigError(
            f"levels: found {list(levels)}, expected ascending numbers of 1..{count}, at least one"
        )


class SqueezeExcitation(nn.Module):
    """Scale the channels of each map by what its mean says (Hu et al. 2018, section 3).

    Args:
        dims: channels of the maps; a 16th of them in between.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.gates = nn.ModuleList(_gate(dim) for dim in dims)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, C_l, H_l, W_l) maps to maps of the same shapes."""
        return [
            map_BCHW * gate(map_BCHW.mean((2, 3)))[:, :, None, None]
            for map_BCHW, gate in zip(maps, self.gates, strict=True)
        ]


def _gate(dim: int) -> nn.Sequential:
    between = max(dim // _SE_REDUCTION, 1)
    gate = nn.Sequential(nn.Linear(dim, between), nn.ReLU(), nn.Linear(between, dim), nn.Sigmoid())
    return gate.apply(init_xavier)


class ConcatExcitation(nn.Module):
    """A stand-in for CFAM (Zheng, Pang, Lan 2022), of which an abstract is all that we know.

    Cross-layer fusion, then one attention across the layers, which table 4's counts fit if it
    is this: each map to `width` channels, coarser maps added to finer ones (adding has no
    parameters; the paper's way to fuse is not known), the means of all maps joined, squeezed to a
    16th, and their gates scaling the maps. All maps leave with `width` channels.

    Args:
        dims: channels of the maps.
        width: channels that go out.
    """

    def __init__(self, dims: Sequence[int], width: int = 256) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in dims)
        self.apply(init_xavier)
        self.gate = _gate(width * len(dims))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, C_l, H_l, W_l) maps, finest first, to (B, width, H_l, W_l)."""
        fused = [lateral(level) for lateral, level in zip(self.laterals, maps, strict=True)]
        for level in range(len(fused) - 2, -1, -1):
            coarser = F.interpolate(fused[level + 1], fused[level].shape[2:], mode="nearest")
            fused[level] = fused[level] + coarser
        means = torch.cat([map_BCHW.mean((2, 3)) for map_BCHW in fused], 1)
        gates = self.gate(means).chunk(len(fused), 1)
        return [
            map_BCHW * gate[:, :, None, None] for map_BCHW, gate in zip(fused, gates, strict=True)
        ]


class MobileViTBlock(nn.Module):
    """Attention of cells that lie alike in their patch (Mehta and Rastegari 2022, section 3.1).

    The numbers are those that table 4's parameters fit: a quarter of the channels, two layers with
    an MLP of twice the width, patches of 2 x 2, BatchNorm behind all convolutions but the narrowing
    one. Four heads, as in MobileViT, are not to be seen in the counts. While training, BatchNorm
    wants more than one value a channel: of maps of 1 x 1 more than one image.

    Args:
        dim: channels, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = dim // 4
        self.local = _ConvBNSiLU(dim, dim, 3)
        self.narrow = nn.Conv2d(dim, width, 1, bias=False)
        heads = _MVIT_HEADS if width % _MVIT_HEADS == 0 else 1
        self.layers = nn.ModuleList(
            TransformerLayer(width, Attention(width, heads), 2 * width) for _ in range(_MVIT_DEPTH)
        )
        self.norm = nn.LayerNorm(width)
        self.widen = _ConvBNSiLU(width, dim, 1)
        self.fuse = _ConvBNSiLU(2 * dim, dim, 3)
        self.apply(init_xavier)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W); odd sides are resampled to even ones in between."""
        seen = self._see_alike(self.narrow(self.local(map_BCHW)))
        out: Tensor = self.fuse(torch.cat([map_BCHW, self.widen(seen)], 1))
        return out

    def _see_alike(self, map_BCHW: Tensor) -> Tensor:
        side, size = _MVIT_PATCH, map_BCHW.shape[2:]
        rows, columns = (-(-length // side) for length in size)
        even_BCHW = _resize(map_BCHW, (rows * side, columns * side))
        split = even_BCHW.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        tokens = split.permute(0, 3, 5, 2, 4, 1).flatten(3, 4).flatten(0, 2)  # (B * 4, N, C)
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.norm(tokens).unflatten(0, (-1, side, side)).unflatten(3, (rows, columns))
        joined = tokens.permute(0, 5, 3, 1, 4, 2).flatten(4, 5).flatten(2, 3)
        return _resize(joined, tuple(size))


def _resize(map_BCHW: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(map_BCHW.shape[2:]) == size:
        return map_BCHW
    return F.interpolate(map_BCHW, size, mode="bilinear", align_corners=False)


class _ConvBNSiLU(nn.Sequential):
    def __init__(self, in_dim: int, dim: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(in_dim, dim, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(dim),
            nn.SiLU(),
        )


class EachMap(nn.Module):
    """Blocks side by side, one for each map.

    Args:
        blocks: (B, C_l, H_l, W_l) -> same shape.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map maps to maps of the same shapes."""
        return [block(map_BCHW) for block, map_BCHW in zip(self.blocks, maps, strict=True)]
