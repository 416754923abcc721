"""SCASeg's decoder: strip cross-attention from every level to a blend of all. A reconstruction.

Xu et al., "SCASeg: Strip Cross-Attention for Efficient Semantic Segmentation" (arXiv 2411.17061;
IEEE TIP 2026). Its full text, tables and code could not be had. From its abstracts and a published
summary come: four lateral connections from coarse to fine; queries from a level of the encoder;
keys and values from one blend of all levels, the coarser of them decoded already; queries and keys
of one channel (a strip, tokens x 1), values at full width; beside the attention a convolutional
part, the two together a cross-layer block; the four decoded levels concatenated and classified.
All else is taken from the works it descends from: pooling, 1x1 convolutions, head counts, FFN and
head width from U-MixFormer (Yeom and von Klitzing 2023), one channel a head from MetaSeg (Kang et
al. 2024); the convolutional part is a guess. `ScasegConfig` has what may be otherwise. What would
confirm it: the paper's parameters and multiply-adds, first of all (ours are in the zoo's cards).

Differences from those works: nothing is computed and thrown away; maps are pooled before their 1x1
convolution; the output convolution is applied to each level before upsampling, as in `segformer`;
attention never holds all logits, see `strip_attention`.

Shape suffixes: B batch, E attention heads, N query tokens, G source tokens (cells of 32 pixels), D
width of one head, C channels of a level, S channels of all levels together, H W rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xattn.errors import ConfigError, check_choice
from xattn.models.upernet import ConvBNReLU
from xattn.nn.blocks import DropPath, MixFFN, convolve, init_weights

LOCALS = ("normed", "feature", "attended", "off")
MERGES = ("sum", "concat")
SCALES = ("one", "width")
RESIDUALS = ("feature", "normed")

# Logits that are kept for the gradient. On one CPU core 2^21 (stage 2 at 512 x 512 pixels) take 17
# ms forward and backward, 20 in blocks; 2^22 (stage 1) 29 and 27.
_FEW = 2**21
# Logits in a block: on a CPU few enough to stay in its caches (2^15 to 2^20 tried: within 15 %), on
# a GPU enough to fill it (not measured).
_BLOCK_ON_CPU, _BLOCK_ON_GPU = 2**18, 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class ScasegConfig:
    """What the sources leave open.

    Args:
        heads: attention heads of each level, finest first; each divides the level's channels.
        scale: of the logits: "one", the key's width being one, or "width", the value's width of a
            head to the power of -1/2 (MetaSeg).
        local: what the local perception module reads: the "normed" level, the level's "feature" as
            it comes, what was "attended" (it then follows the attention); or "off".
        gate: whether its depth-wise convolution gates, or a GELU follows it.
        merge: how attention and local perception come together: their "sum", or a Linear on their
            concatenation ("concat").
        residual: what residual sums add to: the "feature", or the "normed" one (U-MixFormer).
        drop_path: rate in every block of the decoder.

    Raises:
        ConfigError: a name is none of these, or `gate` or `merge` is set for a local perception
            that is off.
    """

    heads: tuple[int, ...] = (1, 2, 5, 8)
    scale: str = "one"
    local: str = "normed"
    gate: bool = True
    merge: str = "sum"
    residual: str = "feature"
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what no decoder can be built of."""
        check_choice("scale", self.scale, SCALES)
        check_choice("local", self.local, LOCALS)
        check_choice("merge", self.merge, MERGES)
        check_choice("residual", self.residual, RESIDUALS)
        if self.local == "off" and self.merge == "concat":
            raise ConfigError("merge: found 'concat' beside local 'off', expected 'sum'")
        if self.local == "off" and not self.gate:
            raise ConfigError("gate: found False beside local 'off', expected True")


def strip_attention(query_BEN: Tensor, key_BEG: Tensor, value_BEGD: Tensor) -> Tensor:
    """Attend with queries and keys of one channel: softmax over G of q * k, times the values.

    Many logits are computed for a block of queries at a time, and again for the gradient, so that
    neither pass holds B * E * N * G numbers: a logit is one multiplication, which costs no more to
    repeat than to keep. At 512 x 512 pixels, stage 1 (N 16384, G 256, D 64, one image, one CPU
    core), forward and backward take 27 ms and 8 MiB, keeping the logits 29 ms and 52 MiB, and
    torch's fused attention on queries and keys filled up with zeros to D channels 47 ms and 13 MiB.

    Args:
        query_BEN: any range; half precision is widened for the softmax.
        key_BEG: likewise.
        value_BEGD: of the dtype of the result.

    Returns:
        (B, E, N, D).
    """
    if torch.compiler.is_exporting():  # one operator, for any N and G
        return _attend_at_once(query_BEN, key_BEG, value_BEGD)
    if query_BEN.shape[2] * key_BEG.numel() <= _FEW:
        return _shares(query_BEN, key_BEG).to(value_BEGD.dtype) @ value_BEGD
    out: Tensor = _StripAttention.apply(query_BEN, key_BEG, value_BEGD)  # type: ignore[no-untyped-call]
    return out


def _attend_at_once(query_BEN: Tensor, key_BEG: Tensor, value_BEGD: Tensor) -> Tensor:
    """Return the same by torch's attention, which holds all logits unless all widths are equal."""
    query, key = query_BEN.unsqueeze(3), key_BEG.unsqueeze(3)
    return F.scaled_dot_product_attention(query, key, value_BEGD, scale=1.0)


class _StripAttention(torch.autograd.Function):
    """The blocks of `strip_attention`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        value = value.contiguous()
        with torch.autocast(query.device.type, enabled=False):
            parts = [_shares(some, key).to(value.dtype) @ value for some in _blocks(query, key)]
        out = torch.cat(parts, 2)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out = ctx.saved_tensors
        precision = torch.promote_types(query.dtype, torch.float32)
        key_gradient = torch.zeros_like(key, dtype=precision)
        value_gradient = torch.zeros_like(value, dtype=precision)
        query_gradients = []
        # The mean over G of a logit's slope, by the shares: as in every fused attention.
        mean_BEN1 = (gradient * out).sum(3, keepdim=True, dtype=precision)
        blocks = _blocks(query, key)
        rows = blocks[0].shape[2]
        slices = gradient.contiguous().split(rows, 2), mean_BEN1.split(rows, 2)
        wide_key = key.to(precision).unsqueeze(3)
        for some, slope, mean in zip(blocks, *slices, strict=True):
            shares = _shares(some, key)
            value_gradient += shares.to(slope.dtype).mT @ slope
            logit_gradient = (slope @ value.mT).to(precision).sub_(mean).mul_(shares)
            query_gradients.append((logit_gradient @ wide_key).squeeze(3))
            key_gradient += (some.to(precision).unsqueeze(2) @ logit_gradient).squeeze(2)
        query_gradient = torch.cat(query_gradients, 2).to(query.dtype)
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype)


def _blocks(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Cut the queries into blocks of which each has a limited number of logits."""
    limit = _BLOCK_ON_GPU if query.is_cuda else _BLOCK_ON_CPU
    blocks: tuple[Tensor, ...] = query.split(max(1, limit // key.numel()), 2)
    return blocks


def _shares(query: Tensor, key: Tensor) -> Tensor:
    """Return (B, E, n, G) softmax over G, in float32 at least."""
    precision = torch.promote_types(query.dtype, torch.float32)
    return (query.to(precision).unsqueeze(3) * key.to(precision).unsqueeze(2)).softmax(3)


class StripCrossAttention(nn.Module):
    """Cross-attention whose queries and keys have one channel a head.

    Args:
        dim: channels of queries' tokens and of the result.
        source_dim: channels of the tokens attended to.
        heads: number of heads; divides `dim`.
        scale: multiplies the logits.
    """

    def __init__(self, dim: int, source_dim: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.query = nn.Linear(dim, heads, bias=False)
        self.key = nn.Linear(source_dim, heads, bias=False)
        self.value = nn.Linear(source_dim, dim, bias=False)
        self.output = nn.Linear(dim, dim)

    def forward(self, map_BHWC: Tensor, source_BGS: Tensor) -> Tensor:
        """Map (B, H, W, C) and what it attends to, (B, G, S), to (B, H, W, C)."""
        return self._project(map_BHWC, strip_attention(*self._parts(map_BHWC, source_BGS)))

    def as_written(self, map_BHWC: Tensor, source_BGS: Tensor) -> Tensor:
        """Return the same with all logits at once; for counting."""
        return self._project(map_BHWC, _attend_at_once(*self._parts(map_BHWC, source_BGS)))

    def _parts(self, map_BHWC: Tensor, source_BGS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, E, N), keys (B, E, G) and values (B, E, G, D)."""
        query_BEN = self.query(map_BHWC).flatten(1, 2).transpose(1, 2)
        # The smaller of the two takes the scale.
        key_BEG = self.key(source_BGS).transpose(1, 2) * self.scale
        value_BEGD = self.value(source_BGS).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return query_BEN, key_BEG, value_BEGD

    def _project(self, map_BHWC: Tensor, attended_BEND: Tensor) -> Tensor:
        joined_BNC = attended_BEND.transpose(1, 2).flatten(2)
        out: Tensor = self.output(joined_BNC.unflatten(1, map_BHWC.shape[1:3]))
        return out


class LocalPerception(nn.Module):
    """Depth-wise separable convolutions with a gate (LPM; layout reconstructed).

    Args:
        dim: channels.
        gate: whether a sigmoid of the depth-wise convolution multiplies its input; without it a
            GELU follows the convolution.
    """

    def __init__(self, dim: int, gate: bool) -> None:
        super().__init__()
        self.gate = gate
        self.enter = nn.Conv2d(dim, dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.leave = nn.Conv2d(dim, dim, 1)

    def forward(self, map_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        entered = F.gelu(convolve(self.enter, map_BHWC))
        seen = convolve(self.depthwise, entered)
        return convolve(self.leave, seen.sigmoid() * entered if self.gate else F.gelu(seen))


class Blend(nn.Module):
    """One source for keys and values out of all levels, at the coarsest level's size.

    Args:
        dims: channels of the levels, finest first.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 1) for dim in dims[:-1])
        self.after = nn.LayerNorm(sum(dims))

    def forward(self, pooled: Sequence[Tensor]) -> Tensor:
        """Map levels averaged to the coarsest one's cells, (B, h, w, C_l), to (B, G, S)."""
        mixed = [convolve(cast(nn.Conv2d, c), p) for c, p in zip(self.convs, pooled, strict=False)]
        return F.gelu(self.after(torch.cat([*mixed, pooled[-1]], 3))).flatten(1, 2)


class CrossLayerBlock(nn.Module):
    """What decodes one level: strip cross-attention, local perception, Mix-FFN.

    Args:
        dims: channels of all levels, finest first.
        level: which of them this block decodes, from 0.
        config: the rest.
    """

    def __init__(self, dims: Sequence[int], level: int, config: ScasegConfig) -> None:
        super().__init__()
        dim, heads = dims[level], config.heads[level]
        self.local_input = config.local
        self.adds_to_normed = config.residual == "normed"
        # Decayed as in the works it descends from, where "head" is tried before "norm": no norm of
        # the head has that word in its name.
        self.blend = Blend(dims)
        self.before_update = nn.LayerNorm(dim)
        scale = 1.0 if config.scale == "one" else (dim // heads) ** -0.5
        self.attention = StripCrossAttention(dim, sum(dims), heads, scale)
        if config.local != "off":
            self.local = LocalPerception(dim, config.gate)
        self.merge = nn.Linear(2 * dim, dim) if config.merge == "concat" else None
        self.before_ffn = nn.LayerNorm(dim)
        self.ffn = MixFFN(dim, 4 * dim)
        self.drop_path = DropPath(config.drop_path)

    def forward(self, map_BHWC: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """Map a level (B, H, W, C) to its decoded self of the same shape.

        Args:
            map_BHWC: from the encoder.
            pooled: all levels, see `Blend`; those coarser than this one decoded.
        """
        normed = self.before_update(map_BHWC)
        update = self._update(map_BHWC, normed, self.blend(pooled))
        summed = (normed if self.adds_to_normed else map_BHWC) + self.drop_path(update)
        normed = self.before_ffn(summed)
        start = normed if self.adds_to_normed else summed
        out: Tensor = start + self.drop_path(self.ffn(normed))
        return out

    def _update(self, map_BHWC: Tensor, normed: Tensor, source_BGS: Tensor) -> Tensor:
        """Return what attention and local perception find, together."""
        attended: Tensor = self.attention(normed, source_BGS)
        if self.local_input == "off":
            return attended
        inputs = {"normed": normed, "feature": map_BHWC, "attended": attended}
        local: Tensor = self.local(inputs[self.local_input])
        if self.merge is None:
            return attended + local
        merged: Tensor = self.merge(torch.cat([attended, local], 3))
        return merged


class ScasegHead(nn.Module):
    """Decode the levels from coarse to fine, join them at the finest size, classify pixels.

    Args:
        dims: channels of the four levels, finest first; each has half the sides of the one before.
        width: channels before the classifier.
        num_classes: outputs.
        dropout: rate at which whole channels are dropped before the classifier.
        config: what the sources leave open.

    Raises:
        ConfigError: the heads are not four, or one does not divide its level's channels.
    """

    def __init__(
        self,
        dims: Sequence[int],
        width: int,
        num_classes: int,
        dropout: float,
        config: ScasegConfig,
    ) -> None:
        super().__init__()
        heads = config.heads
        if len(heads) != len(dims) or any(
            count < 1 or dim % count for count, dim in zip(heads, dims, strict=False)
        ):
            raise ConfigError(
                f"heads: found {list(heads)}, expected {len(dims)} numbers that divide the "
                f"channels {list(dims)}"
            )
        self.blocks = nn.ModuleList(CrossLayerBlock(dims, i, config) for i in range(len(dims)))
        self.fuse = ConvBNReLU(sum(dims), width, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.logits = nn.Conv2d(width, num_classes, 1)  # as torch makes it, as in the parents' code
        self.blocks.apply(init_weights)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map levels (B, C_l, H_l, W_l), finest first, to (B, num_classes, H_1, W_1) logits."""
        size = maps[0].shape[2:]
        decoded = self._decode(maps)
        slices = self.fuse.conv.weight.flatten(1).split([level.shape[3] for level in decoded], 1)
        fused = F.linear(decoded[0], slices[0]).permute(0, 3, 1, 2)
        for level_BHWC, slice_EC in zip(decoded[1:], slices[1:], strict=True):
            part = F.linear(level_BHWC, slice_EC).permute(0, 3, 1, 2)
            fused = fused + F.interpolate(part, size, mode="bilinear", align_corners=False)
        return self._classify(fused)

    def as_written(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the same with the convolution after upsampling; for counting."""
        decoded = [level.permute(0, 3, 1, 2) for level in self._decode(maps)]
        size = decoded[0].shape[2:]
        large = [
            F.interpolate(level, size, mode="bilinear", align_corners=False)
            for level in decoded[1:]
        ]
        return self._classify(self.fuse.conv(torch.cat([decoded[0], *large], 1)))

    def _classify(self, fused_BCHW: Tensor) -> Tensor:
        out: Tensor = self.logits(self.dropout(self.fuse.finish(fused_BCHW)))
        return out

    def _decode(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the decoded levels (B, H_l, W_l, C_l), finest first."""
        levels = [level.permute(0, 2, 3, 1) for level in maps]
        last = len(levels) - 1
        pooled = [_average(level, 2 ** (last - index)) for index, level in enumerate(levels)]
        for index in range(last, -1, -1):
            levels[index] = self.blocks[index](levels[index], pooled)
            pooled[index] = _average(levels[index], 2 ** (last - index)) if index else levels[0]
        return levels


def _average(map_BHWC: Tensor, side: int) -> Tensor:
    """Average squares of `side` cells; cut squares at the lower and right edge count in full."""
    if side == 1:
        return map_BHWC
    averaged = F.avg_pool2d(map_BHWC.permute(0, 3, 1, 2), side, side, ceil_mode=True)
    return averaged.permute(0, 2, 3, 1)
