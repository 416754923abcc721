"""Attention between neighbouring levels of a feature pyramid, and the updates built on it.

Leung et al., "Improving Semantic Segmentation in Transformers using Hierarchical Inter-Level
Attention" (arXiv 2207.02126), section 3. High is the coarser level, low the finer one with twice
the side. High token (i, j) owns the p x p low cells (2i - pad + u, 2j - pad + w), u and w in
0..p-1, pad = p/2 - 1, so that patches overlap when p > 2.

Differences from the paper's listing; all but the first two follow the numbers of the authors' code:
- Every softmax is taken over candidates with their maximum subtracted. The listing sums raw
  exponentials, which overflow.
- All four projections act on high tokens, of which there are a quarter as many as low cells and a
  sixteenth as many as the listing's copies of them. A product with a projected low cell is one of
  the cell itself with a token that went through the transposed weights: q . (K x + b) is
  (K' q) . x + q . b, and the last term, the same for all cells of a patch, drops out of their
  softmax. Likewise the sum of w_i (V x_i + c) is V (sum of w_i x_i) + c. (Bottom-up thus gives the
  key's bias its true gradient, zero.)
- Logits are scaled by (channels of the updated feature) ** -0.5 in both directions, unless `scale`
  says otherwise.
- Low cells outside the map take part in bottom-up attention as a zero token, unless `border` masks
  them.
- The output projection comes after the sum over overlapping patches: its bias is added once.
- The code's two position vectors are always added up, so one is kept.
- An odd low map counts as one row or column larger, filled with outside cells.

Both directions work on square tiles of `_TILE` x `_TILE` high tokens and their 2 `_TILE` x 2
`_TILE` low cells: the tile's queries attend to all keys that any of them needs, and a table shuts
out the pairs of which the cell is not in the token's patch. That computes a few products for
nothing, but as ordinary small matrix products without a copy of every patch.

Shape suffixes: B batch, H W rows and columns of the high map, h w of the low map, C channels of the
updated feature, D channels of the other one, T V rows and columns of tiles, Q queries and K keys of
a tile.
"""

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.errors import ConfigError, check_choice
from xattn.nn.blocks import DropPath, MixFFN

BORDERS = ("bias_token", "mask")
_TILE = 4


def _tiles(map_BHWC: Tensor, step: int) -> Tensor:
    """Cut (B, T * step, V * step, C) into (B, T, V, step * step, C), cells row by row."""
    tiles: Tensor = map_BHWC.unflatten(2, (-1, step)).unflatten(1, (-1, step))
    return tiles.transpose(2, 3).flatten(3, 4)


def _untile(tiles_BTVQC: Tensor, step: int) -> Tensor:
    """Undo `_tiles`."""
    tiles: Tensor = tiles_BTVQC.unflatten(3, (step, step)).transpose(2, 3)
    return tiles.flatten(3, 4).flatten(1, 2)


def _overlap(map_BHWC: Tensor, dim: int, count: int, step: int, size: int) -> Tensor:
    """Cut dimension `dim` into `count` windows of `size` that start every `step` positions.

    The windows are put together of slices of blocks, whose gradients are cheap to add up.
    """
    blocks = map_BHWC.unflatten(dim, (-1, step))
    parts = [
        blocks.narrow(dim, start // step, count).narrow(dim + 1, 0, min(step, size - start))
        for start in range(0, size, step)
    ]
    return torch.cat(parts, dim + 1)


def _windows(map_BHWC: Tensor, before: int, tiles: tuple[int, int], step: int) -> Tensor:
    """Return (B, T, V, K, C): each tile's cells with `before` more on all four sides.

    Args:
        map_BHWC: at most tiles * step rows and columns; cells beyond are zero.
        before: rows and columns around a tile.
        tiles: rows and columns of tiles.
        step: side of a tile in cells.
    """
    size = step + 2 * before
    blocks = -(-size // step) - 1  # whole blocks that the last window reaches into
    after = [
        (count + blocks) * step - before - side
        for count, side in zip(tiles, map_BHWC.shape[1:3], strict=True)
    ]
    map_BHWC = F.pad(map_BHWC, (0, 0, before, after[1], before, after[0]))
    rows = _overlap(map_BHWC, 1, tiles[0], step, size)
    windows = _overlap(rows, 3, tiles[1], step, size)  # (B, T, K, V, K, C)
    return windows.transpose(2, 3).flatten(3, 4)


def _places(patch: int, high_reach: int, low_reach: int) -> Tensor:
    """Return (high tokens, low cells): the cell's index in the token's patch, -1 if outside it.

    Tokens and cells are those of a tile, row by row, with so many more on all four sides.
    """
    # u = y - 2i + pad for low row y and high row i, both counted from the tile's first.
    index = [
        [y - 2 * i + patch // 2 - 1 for y in range(-low_reach, 2 * _TILE + low_reach)]
        for i in range(-high_reach, _TILE + high_reach)
    ]
    side = range(patch)
    return torch.tensor(
        [
            [u * patch + w if u in side and w in side else -1 for u, w in product(rows, columns)]
            for rows, columns in product(index, repeat=2)
        ]
    )


def _bias(position_bias: Tensor, place: Tensor) -> Tensor:
    """Return position biases in the shape of `place`, and what shuts a pair out where it is -1.

    That is a large finite number: of a tile beyond the map nothing may be left, and the softmax
    of nothing but -inf would be nan.
    """
    shut = torch.finfo(position_bias.dtype).min / 2
    return position_bias[place.clamp(min=0)].masked_fill(place < 0, shut)


def _outside(
    reference: Tensor, size: tuple[int, int], before: int, tiles: tuple[int, int], step: int
) -> Tensor:
    """Return (1, T, V, 1, K): what to add to the logits of a window's cells, 0 within the map."""
    inside = _windows(reference.new_ones(1, *size, 1), before, tiles, step)
    return (1 - inside).transpose(3, 4) * (torch.finfo(reference.dtype).min / 2)


def _fill(map_BHWC: Tensor, tiles: tuple[int, int], step: int) -> Tensor:
    """Return the map with zeros below and to the right, tiles * step rows and columns large."""
    below, right = (
        count * step - side for count, side in zip(tiles, map_BHWC.shape[1:3], strict=True)
    )
    return F.pad(map_BHWC, (0, 0, 0, right, 0, below)) if below or right else map_BHWC


def patch_cells(
    patch: int, high_size: tuple[int, int], low_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return where the cells of every high token's patch lie in the low map.

    Args:
        patch: side p of a patch in low cells.
        high_size: (H, W) of the high map.
        low_size: (h, w) of the low map.

    Returns:
        (H, W, p * p) index of the cell among the h * w row by row, 0 for one outside the map, and
        whether it lies inside.
    """
    sides = []
    for count, limit in zip(high_size, low_size, strict=True):
        first = 2 * torch.arange(count) - (patch // 2 - 1)
        place = first[:, None] + torch.arange(patch)
        sides.append((place, (place >= 0) & (place < limit)))
    (row_Hu, row_is_in), (column_Ww, column_is_in) = sides
    inside_HWuw = row_is_in[:, None, :, None] & column_is_in[None, :, None, :]
    index_HWuw = row_Hu[:, None, :, None] * low_size[1] + column_Ww[None, :, None, :]
    return index_HWuw.where(inside_HWuw, 0).flatten(2), inside_HWuw.flatten(2)


def _check_patch(patch: int) -> int:
    if patch < 2 or patch % 2:
        raise ConfigError(f"patch: found {patch}, expected an even number of at least 2")
    return patch


def _logit_scale(scale: str, updated: int, inner: int) -> float:
    """Return what the logits are multiplied by.

    Args:
        scale: "updated" for the width of the updated feature (the authors' code), "inner" for that
            of query and key (the paper's equation 10).
        updated: channels of the updated feature.
        inner: channels of query and key.

    Raises:
        ConfigError: `scale` is neither.
    """
    widths = {"updated": updated, "inner": inner}
    return float(widths[check_choice("scale", scale, widths)] ** -0.5)


class BottomUpAttention(nn.Module):
    """Every high token attends to the p * p low cells of its own patch.

    Args:
        high_dim: channels of the updated (high) feature.
        low_dim: channels of the low feature.
        patch: side p of the patch in low cells; even.
        scale: whose width scales the logits, see `_logit_scale`.
        border: what cells outside the map are: "bias_token", zero tokens whose key and value are
            the biases (the authors' code), or "mask", nothing.

    Raises:
        ConfigError: an argument is none of these.
    """

    def __init__(
        self,
        high_dim: int,
        low_dim: int,
        patch: int,
        scale: str = "updated",
        border: str = "bias_token",
    ) -> None:
        super().__init__()
        self.patch = _check_patch(patch)
        self.masks = check_choice("border", border, BORDERS) == "mask"
        self.width = min(high_dim, low_dim)
        self.scale = _logit_scale(scale, high_dim, self.width)
        self.query = nn.Linear(high_dim, self.width)
        self.key_value = nn.Linear(low_dim, 2 * self.width)
        self.output = nn.Linear(self.width, high_dim)
        self.position_bias = nn.Parameter(torch.zeros(patch * patch))
        self.place: Tensor
        self.register_buffer("place", _places(patch, 0, patch // 2 - 1), persistent=False)

    def forward(self, high_BHWC: Tensor, low_BhwD: Tensor) -> Tensor:
        """Return what to add to `high_BHWC`, in its shape; h = 2H or 2H - 1, w likewise."""
        height, width = high_BHWC.shape[1:3]
        tiles = -(-height // _TILE), -(-width // _TILE)
        before, step = self.patch // 2 - 1, 2 * _TILE
        key_weight, value_weight = self.key_value.weight.chunk(2)
        query_BHWD = F.linear(self.query(high_BHWC) * self.scale, key_weight.t())
        query = _tiles(_fill(query_BHWD, tiles, _TILE), _TILE)
        cells = _windows(low_BhwD, before, tiles, step)
        logits = query @ cells.transpose(3, 4) + _bias(self.position_bias, self.place)
        if self.masks:
            size = low_BhwD.shape[1], low_BhwD.shape[2]
            logits = logits + _outside(self.position_bias, size, before, tiles, step)
        mixed_BHWD = _untile(logits.softmax(-1) @ cells, _TILE)[:, :height, :width]
        value_bias = self.key_value.bias.chunk(2)[1]
        out: Tensor = self.output(F.linear(mixed_BHWD, value_weight, value_bias))
        return out

    def count_macs(self, high_BHWC: Tensor, low_BhwD: Tensor) -> int:
        """Return the multiply-adds for one image as the paper counts: keys once a patch."""
        tokens = high_BHWC.shape[1] * high_BHWC.shape[2]
        cells = tokens * self.patch**2
        projections = 2 * tokens * high_BHWC.shape[3] + 2 * cells * low_BhwD.shape[3]
        return projections * self.width + self.product_macs(tokens)

    def product_macs(self, tokens: int) -> int:
        """Return the multiply-adds of the two matrix products for that many high tokens."""
        return 2 * tokens * self.patch**2 * self.width


class TopDownAttention(nn.Module):
    """Every low cell attends to the high tokens whose patches hold it.

    Args:
        low_dim: channels of the updated (low) feature.
        high_dim: channels of the high feature.
        patch: side p of the patch in low cells; even.
        scale: whose width scales the logits, see `_logit_scale`.

    Raises:
        ConfigError: an argument is none of these.
    """

    def __init__(self, low_dim: int, high_dim: int, patch: int, scale: str = "updated") -> None:
        super().__init__()
        self.patch = _check_patch(patch)
        self.reach = patch // 4
        self.width = min(high_dim, low_dim)
        self.scale = _logit_scale(scale, low_dim, self.width)
        self.query = nn.Linear(low_dim, self.width)
        self.key_value = nn.Linear(high_dim, 2 * self.width)
        self.output = nn.Linear(self.width, low_dim)
        self.position_bias = nn.Parameter(torch.zeros(patch * patch))
        self.place: Tensor
        self.register_buffer("place", _places(patch, self.reach, 0).t(), persistent=False)

    def forward(self, low_BhwC: Tensor, high_BHWD: Tensor) -> Tensor:
        """Return what to add to `low_BhwC`, in its shape; h = 2H or 2H - 1, w likewise."""
        rows, columns = low_BhwC.shape[1:3]
        height, width = high_BHWD.shape[1:3]
        tiles = -(-height // _TILE), -(-width // _TILE)
        key, value = self.key_value(high_BHWD).chunk(2, dim=3)
        key = key * self.scale
        key_BHWC = F.linear(key, self.query.weight.t())
        shift_BHW1 = F.linear(key, self.query.bias.unsqueeze(0))
        # The weights of a cell sum to one: a bias of all values is one of their mean.
        value_BHWC = F.linear(value, self.output.weight, self.output.bias)
        key, value, shift = (
            _windows(map_BHWX, self.reach, tiles, _TILE)
            for map_BHWX in (key_BHWC, value_BHWC, shift_BHW1)
        )
        outside = _outside(self.position_bias, (height, width), self.reach, tiles, _TILE)
        query = _tiles(_fill(low_BhwC, tiles, 2 * _TILE), 2 * _TILE)
        logits = query @ key.transpose(3, 4) + (shift.transpose(3, 4) + outside)
        logits = logits + _bias(self.position_bias, self.place)
        return _untile(logits.softmax(-1) @ value, 2 * _TILE)[:, :rows, :columns]

    def weights(self, low_BhwC: Tensor, high_BHWD: Tensor) -> Tensor:
        """Return the weights by which `forward` mixes, seen from the high tokens: the paper's M.

        The plain form, without tiles, with a copy of every patch: for looking, not for training.

        Returns:
            (B, H, W, p * p): what the cells of a token's patch, row by row, take of the token, 0
            for cells outside the map. All that a cell takes adds up to 1.
        """
        rows, columns = low_BhwC.shape[1:3]
        high_size = high_BHWD.shape[1], high_BHWD.shape[2]
        index_HWP, inside_HWP = (
            part.to(low_BhwC.device) for part in patch_cells(self.patch, high_size, (rows, columns))
        )
        query_BHWPA = self.query(low_BhwC).flatten(1, 2)[:, index_HWP]
        key_BHWA = self.key_value(high_BHWD).chunk(2, dim=3)[0]
        logits = torch.einsum("bhwpa,bhwa->bhwp", query_BHWPA, key_BHWA) * self.scale
        logits = (logits + self.position_bias).masked_fill(~inside_HWP, -torch.inf).flatten(1)
        index = index_HWP.flatten().expand_as(logits)
        per_cell = logits.new_full((len(logits), rows * columns), -torch.inf)
        highest = per_cell.scatter_reduce(1, index, logits, "amax")
        raised = (logits - highest.gather(1, index)).exp()
        total = torch.zeros_like(per_cell).scatter_add(1, index, raised)
        return (raised / total.gather(1, index)).view(len(logits), *index_HWP.shape)

    def count_macs(self, low_BhwC: Tensor, high_BHWD: Tensor) -> int:
        """Return the multiply-adds for one image as the paper counts: queries once a patch."""
        tokens = high_BHWD.shape[1] * high_BHWD.shape[2]
        low_tokens = low_BhwC.shape[1] * low_BhwC.shape[2]
        cells = tokens * self.patch**2
        low_dim, high_dim = low_BhwC.shape[3], high_BHWD.shape[3]
        projections = (cells + low_tokens) * low_dim + 2 * tokens * high_dim
        return projections * self.width + self.product_macs(tokens)

    def product_macs(self, tokens: int) -> int:
        """Return the multiply-adds of the two matrix products for that many high tokens."""
        return 2 * tokens * self.patch**2 * self.width


class InterLevelUpdate(nn.Module):
    """One update of a level from its neighbour: attention, then a weighted Mix-FFN.

    target' = target + attention(norm(target), norm(source));
    result = alpha * target' + beta * FFN(norm(target')). The residual stream itself is scaled.

    Args:
        attention: the direction, built for the dimensions below.
        target_dim: channels of the updated feature.
        source_dim: channels of the other one.
        alpha: weight of the stream.
        beta: weight of the FFN.
        ffn_ratio: hidden channels of the FFN over `target_dim`.
        drop_path: rate at which the attention or the FFN is dropped.
    """

    def __init__(
        self,
        attention: BottomUpAttention | TopDownAttention,
        target_dim: int,
        source_dim: int,
        alpha: float,
        beta: float,
        ffn_ratio: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.norm_target = nn.LayerNorm(target_dim)
        self.norm_source = nn.LayerNorm(source_dim)
        self.attention = attention
        self.norm_ffn = nn.LayerNorm(target_dim)
        self.ffn = MixFFN(target_dim, ffn_ratio * target_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Return the updated (B, H, W, target_dim) map; `source` is left as it is."""
        attended = self.attention(self.norm_target(target), self.norm_source(source))
        target = target + self.drop_path(attended)
        mixed = self.drop_path(self.ffn(self.norm_ffn(target)))
        out: Tensor = self.alpha * target + self.beta * mixed
        return out
