"""Attention between neighbouring levels of a feature pyramid, and the updates built on it.

Leung et al., "Improving Semantic Segmentation in Transformers using Hierarchical Inter-Level
Attention" (arXiv 2207.02126), section 3. High is the coarser level, low the finer one with twice
the side. High token (i, j) owns the p x p low cells (2i - pad + u, 2j - pad + w), u and w in
0..p-1, pad = p/2 - 1, so that patches overlap when p > 2.

Differences from the paper's listing; all but the first follow the numbers of the authors' code:
- Every softmax is taken over gathered candidates with their maximum subtracted. The listing sums
  raw exponentials, which overflow. Features are projected before they are gathered, not after.
- Logits are scaled by (channels of the updated feature) ** -0.5 in both directions, unless `scale`
  says otherwise.
- Low cells outside the map take part in bottom-up attention as a zero token.
- The output projection comes after the sum over overlapping patches: its bias is added once.
- The code's two position vectors are always added up, so one is kept.
- An odd low map counts as one row or column larger, filled with outside cells.

Shape suffixes: B batch, H W rows and columns of the high map, h w of the low map, C channels of the
updated feature, D channels of the other one.
"""

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.errors import ConfigError, check_choice
from xattn.nn.blocks import MixFFN


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attend (..., Q, A) to (..., K, A) with an additive (..., Q, K) bias of the logits."""
    logits = query @ key.transpose(-2, -1) + bias
    return logits.softmax(-1) @ value


def _windows(map_BHWC: Tensor, side: int) -> list[Tensor]:
    """Return the side * side shifted views, row by row, of a map padded by side - 1 in all."""
    height, width = map_BHWC.shape[1] - side + 1, map_BHWC.shape[2] - side + 1
    starts = product(range(side), repeat=2)
    return [map_BHWC[:, row : row + height, column : column + width] for row, column in starts]


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
    """

    def __init__(self, high_dim: int, low_dim: int, patch: int, scale: str = "updated") -> None:
        super().__init__()
        self.patch = _check_patch(patch)
        self.width = min(high_dim, low_dim)
        self.scale = _logit_scale(scale, high_dim, self.width)
        self.query = nn.Linear(high_dim, self.width)
        self.key_value = nn.Linear(low_dim, 2 * self.width)
        self.output = nn.Linear(self.width, high_dim)
        self.position_bias = nn.Parameter(torch.zeros(patch * patch))

    def forward(self, high_BHWC: Tensor, low_BhwD: Tensor) -> Tensor:
        """Return what to add to `high_BHWC`, in its shape; h = 2H or 2H - 1, w likewise."""
        height, width = high_BHWC.shape[1:3]
        half = self.patch // 2
        before = half - 1
        rows, columns = 2 * (height + before), 2 * (width + before)
        below = rows - before - low_BhwD.shape[1]
        right = columns - before - low_BhwD.shape[2]
        low_BhwD = F.pad(low_BhwD, (0, 0, before, right, before, below))
        # Rows and columns pair up, so that a patch is a half x half window of 2 x 2 squares.
        squares = self.key_value(low_BhwD).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        squares = squares.transpose(2, 3).flatten(3, 4)
        cells = torch.cat(_windows(squares, half), dim=3)
        key, value = cells.split(self.width, dim=-1)
        bias = self.position_bias.view(half, 2, half, 2).transpose(1, 2).reshape(1, -1)
        query = (self.query(high_BHWC) * self.scale).unsqueeze(3)
        out: Tensor = self.output(_attend(query, key, value, bias).squeeze(3))
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

    The four cells under one high token share a (2r + 1) x (2r + 1) neighbourhood of candidates,
    r = p // 4; a table of position biases shuts out those whose patch misses the cell.

    Args:
        low_dim: channels of the updated (low) feature.
        high_dim: channels of the high feature.
        patch: side p of the patch in low cells; even.
        scale: whose width scales the logits, see `_logit_scale`.
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
        self.register_buffer("place", self._places(), persistent=False)

    def _places(self) -> Tensor:
        """Return (4, candidates): the cell's index in each candidate's patch, -1 if outside it."""
        side = range(self.patch)
        neighbours = range(-self.reach, self.reach + 1)
        # u = y - 2i + pad for low row y = 2m + parity and high row i = m + offset.
        index = [
            [parity - 2 * offset + self.patch // 2 - 1 for offset in neighbours]
            for parity in (0, 1)
        ]
        return torch.tensor(
            [
                [u * self.patch + w if u in side and w in side else -1 for u, w in product(*axes)]
                for axes in product(index, repeat=2)
            ]
        )

    def _bias(self, height: int, width: int) -> Tensor:
        """Return (H, W, 4, candidates): position biases, -inf for what is no candidate."""
        minus_inf = float("-inf")
        table = self.position_bias[self.place.clamp(min=0)]
        table = table.masked_fill(self.place < 0, minus_inf)
        inside = table.new_zeros(1, height, width)
        border = F.pad(inside, (self.reach,) * 4, value=minus_inf)
        return table + torch.stack(_windows(border, 2 * self.reach + 1), dim=-1)[0].unsqueeze(2)

    def forward(self, low_BhwC: Tensor, high_BHWD: Tensor) -> Tensor:
        """Return what to add to `low_BhwC`, in its shape; h = 2H or 2H - 1, w likewise."""
        height, width = high_BHWD.shape[1:3]
        rows, columns = low_BhwC.shape[1:3]
        query = self.query(low_BhwC) * self.scale
        query = F.pad(query, (0, 0, 0, 2 * width - columns, 0, 2 * height - rows))
        query = query.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4)
        key_value = F.pad(self.key_value(high_BHWD), (0, 0) + (self.reach,) * 4)
        candidates = torch.stack(_windows(key_value, 2 * self.reach + 1), dim=3)
        key, value = candidates.split(self.width, dim=-1)
        cells = _attend(query, key, value, self._bias(height, width)).unflatten(3, (2, 2))
        low = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns]
        out: Tensor = self.output(low)
        return out

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
    """

    def __init__(
        self,
        attention: BottomUpAttention | TopDownAttention,
        target_dim: int,
        source_dim: int,
        alpha: float,
        beta: float,
        ffn_ratio: int,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.norm_target = nn.LayerNorm(target_dim)
        self.norm_source = nn.LayerNorm(source_dim)
        self.attention = attention
        self.norm_ffn = nn.LayerNorm(target_dim)
        self.ffn = MixFFN(target_dim, ffn_ratio * target_dim)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Return the updated (B, H, W, target_dim) map; `source` is left as it is."""
        target = target + self.attention(self.norm_target(target), self.norm_source(source))
        out: Tensor = self.alpha * target + self.beta * self.ffn(self.norm_ffn(target))
        return out
