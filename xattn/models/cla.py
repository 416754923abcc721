"""CLA: a SegFormer head in which every patch of a fine level mixes the patches of a coarse one.

Chung et al., "Utilizing Cross Layer Attentions for Semantic Segmentation of Small Objects",
section III. Written from the paper, which leaves much open; no code of it is public. What is read
into it: both products run over one channel at a time, without a softmax; the patches of equation 2
are those of the coarse decoder map F'_j, as the sentence before it says. The switches of
`CLAConfig` are the other readings that fit. Every part of it is in the head, hence trained at the
head's rate, though the paper draws the first product beside the encoder.

The paper's two steps are linear in each map, so their order is free. As it writes them they hold a
(C_j, N_j, N_i) tensor for each pair of levels; summing over coarse patches first, then over
channels, leaves a (d * d * C_i, d * d * E) matrix for each image, by which the fine patches are
multiplied.

Shape suffixes: B batch, H W rows and columns of the fine level, h w of the coarse one, C and D
their channels, E channels of the head, N M their patches, Q P pixels of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.errors import ConfigError, check_choice

Pair = tuple[int, int]

_CHOICES = {
    "combine": ("add", "gate", "concat"),
    "proj": ("if_needed", "always"),
    "impl": ("factored", "literal"),
    "encoder_scale": ("patch", "one"),
    "decoder_scale": ("patches", "one"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CLAConfig:
    """What the paper leaves open, and what may be varied. "Readings" are those of its parameters.

    Args:
        pairs: (fine, coarse) levels, counted from 1 (finest), a decoder block each, in this order.
        d: side of a patch in pixels of its level.
        combine: what becomes of a block's mixture X of maps and CLA output O: "add", X + O; "gate",
            X + X * O, which is AFMA's rule; "concat", O is one more map of the mixture (too many
            parameters for table 1).
        concat_fj: whether the coarse map is mixed in where there is a block before (readings Q and
            P'); without it, it is seen through CLA alone (reading P).
        final_fuse: whether a convolution with batch norm ends the head (readings Q and P); without
            it the last block's has the norm, and no block's convolution a bias (reading P').
        proj: where a 1x1 convolution brings CLA to the head's width: "if_needed", where its
            channels differ (reading Q), or "always" (readings P and P').
        impl: "factored", the order of products that needs least memory up to d = 2, or "literal",
            the paper's, which has less to compute from d = 4 on.
        encoder_scale: what equation 1's sums are multiplied by, s_e: "patch", 1 / (d * d) as in
            AFMA, or "one", as printed.
        decoder_scale: likewise of equation 2, s_d: "patches", 1 / coarse patches, or "one".

    Raises:
        ConfigError: there is no such pair or choice, or the head could not be built of them.
    """

    pairs: Sequence[Sequence[int]] = ((2, 3), (1, 4))
    d: int = 2
    combine: str = "add"
    concat_fj: bool = True
    final_fuse: bool = True
    proj: str = "if_needed"
    impl: str = "factored"
    encoder_scale: str = "patch"
    decoder_scale: str = "patches"

    def __post_init__(self) -> None:
        """Refuse what no head can be built of."""
        for key, choices in _CHOICES.items():
            check_choice(key, getattr(self, key), choices)
        pairs = [list(pair) for pair in self.pairs]
        if not pairs or any(len(pair) != 2 or not 1 <= pair[0] < pair[1] <= 4 for pair in pairs):
            raise ConfigError(
                f"pairs: found {pairs}, expected pairs of a level 1..3 and a coarser one up to 4, "
                "e.g. [[2, 3], [1, 4]]"
            )
        if len({tuple(pair) for pair in pairs}) < len(pairs):
            raise ConfigError(f"pairs: found {pairs}, expected each of them once")
        fine = [pair[0] for pair in pairs]
        if fine != sorted(fine, reverse=True):
            raise ConfigError(
                f"pairs: found fine levels {fine}, expected them from coarse to fine: each block "
                "enlarges the one before"
            )
        if not self.final_fuse and (self.unpaired_levels or fine[-1] != 1):
            raise ConfigError(
                f"final_fuse: found False beside pairs {pairs}, expected them to name all of the "
                "levels 1..4 and to end with level 1"
            )

    @property
    def unpaired_levels(self) -> list[int]:
        """The levels, from 1, that no pair names; the final fuse takes them in."""
        named = {level for pair in self.pairs for level in pair}
        return [level for level in range(1, 5) if level not in named]


def partition(map_BHWC: Tensor, d: int) -> Tensor:
    """Cut (B, H, W, C) into (B, N, d * d, C): patches, and pixels in a patch, row by row.

    What a side lacks to a multiple of d is filled with zeros at the right and below.
    """
    height, width = map_BHWC.shape[1:3]
    rows, columns = -(-height // d), -(-width // d)
    padded = F.pad(map_BHWC, (0, 0, 0, columns * d - width, 0, rows * d - height))
    cells: Tensor = padded.unflatten(2, (columns, d)).unflatten(1, (rows, d)).transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)


def merge(patches_BNQC: Tensor, d: int, size: tuple[int, int]) -> Tensor:
    """Undo `partition` of a map of `size` (H, W): returns (B, H, W, C)."""
    rows, columns = (-(-side // d) for side in size)
    cells: Tensor = patches_BNQC.unflatten(2, (d, d)).unflatten(1, (rows, columns)).transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least: sums over hundreds of patches lose too much in half.

    To be used where autocast is off.
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class CrossLayerAttention(nn.Module):
    """CLA encoder and decoder of one pair of levels, equations 1 and 2.

    Args:
        fine_dim: channels C of the fine level.
        coarse_dim: channels D of the coarse level.
        width: channels E of the head.
        config: d, proj, impl and the scales.
    """

    def __init__(self, fine_dim: int, coarse_dim: int, width: int, config: CLAConfig) -> None:
        super().__init__()
        self.d = config.d
        self.encoder_scale = config.d**-2 if config.encoder_scale == "patch" else 1.0
        self.averages = config.decoder_scale == "patches"
        self.is_literal = config.impl == "literal"
        self.encode = nn.Conv2d(fine_dim, coarse_dim, 1)
        needed = config.proj == "always" or coarse_dim != width
        self.project = nn.Conv2d(coarse_dim, width, 1) if needed else None

    def forward(self, fine_BHWC: Tensor, coarse_BhwD: Tensor, value_BhwE: Tensor) -> Tensor:
        """Return the decoder's output (B, H, W, E).

        Args:
            fine_BHWC: F_i, of the backbone.
            coarse_BhwD: F_j, of the backbone.
            value_BhwE: F'_j, the coarse level at the head's width.
        """
        with torch.autocast(fine_BHWC.device.type, enabled=False):
            maps = _wide(fine_BHWC), _wide(coarse_BhwD), _wide(value_BhwE)
            patches = self._literal(*maps) if self.is_literal else self._factored(*maps)
            return merge(patches, self.d, (fine_BHWC.shape[1], fine_BHWC.shape[2]))

    def attention(self, fine_BHWC: Tensor, coarse_BhwD: Tensor) -> Tensor:
        """Return CLA_ij, (B, D, M, N): of coarse patches (rows) and fine ones, a channel each."""
        with torch.autocast(fine_BHWC.device.type, enabled=False):
            fine, coarse = _wide(fine_BHWC), _wide(coarse_BhwD)
            aligned = F.linear(fine, self.encode.weight.flatten(1), self.encode.bias)
            fine_BNQD = partition(aligned, self.d)
            coarse_BMQD = partition(coarse, self.d) * self.encoder_scale
            return coarse_BMQD.permute(0, 3, 1, 2) @ fine_BNQD.permute(0, 3, 2, 1)

    def _literal(self, fine: Tensor, coarse: Tensor, value: Tensor) -> Tensor:
        """Return (B, N, P, E) by way of the attention."""
        attention_BXMN = self.attention(fine, coarse)
        if self.project is not None:
            attention_BXMN = self.project(attention_BXMN)
        value_BMPE = partition(value, self.d)
        value_BMPE = value_BMPE * self._decoder_scale(value_BMPE)
        out_BENP = attention_BXMN.transpose(2, 3) @ value_BMPE.permute(0, 3, 1, 2)
        return out_BENP.permute(0, 2, 3, 1)

    def _factored(self, fine: Tensor, coarse: Tensor, value: Tensor) -> Tensor:
        """Return (B, N, P, E) without the attention: spec 1.5, with the encoder's weights too."""
        # One more channel, of ones, carries the encoder's bias, which padding must not have.
        fine = torch.cat([fine, torch.ones_like(fine[..., :1])], 3)
        beta_D = cast(Tensor, self.encode.bias)
        encode_CD = torch.cat([self.encode.weight.flatten(1), beta_D[:, None]], 1).t()
        fine_BNX = partition(fine, self.d).flatten(2)
        coarse_BMQD, value_BMPE = partition(coarse, self.d), partition(value, self.d)
        decoder_scale = self._decoder_scale(value_BMPE)
        scale = self.encoder_scale * decoder_scale
        if self.project is None:
            both_BQPE = torch.einsum("bmqe,bmpe->bqpe", coarse_BMQD, value_BMPE * scale)
            matrix_BQCPE = both_BQPE.unsqueeze(2) * encode_CD.unsqueeze(1)
            return self._multiply(fine_BNX, matrix_BQCPE)
        pixels, dim = coarse_BMQD.shape[2:]
        both_BXY = coarse_BMQD.flatten(2).transpose(1, 2) @ value_BMPE.flatten(2)
        both_BQDPE = both_BXY.unflatten(2, (pixels, -1)).unflatten(1, (pixels, dim))
        project_DE = self.project.weight.flatten(1).t() * scale
        both_BQDY = (both_BQDPE * project_DE.unsqueeze(1)).flatten(3)
        matrix_BQCPE = (encode_CD @ both_BQDY).unflatten(3, (pixels, -1))
        beta_E = cast(Tensor, self.project.bias) * decoder_scale
        return self._multiply(fine_BNX, matrix_BQCPE) + (value_BMPE.sum(1, True) * beta_E)

    @staticmethod
    def _multiply(fine_BNX: Tensor, matrix_BQCPE: Tensor) -> Tensor:
        product: Tensor = fine_BNX @ matrix_BQCPE.flatten(3).flatten(1, 2)
        patches: Tensor = product.unflatten(2, (matrix_BQCPE.shape[3], -1))
        return patches

    def _decoder_scale(self, value_BMPE: Tensor) -> float:
        return 1 / value_BMPE.shape[1] if self.averages else 1.0

    def macs(self, fine_size: tuple[int, int], coarse_size: tuple[int, int]) -> int:
        """Return the multiply-adds for one image as the paper writes it: by way of CLA_ij."""
        fine, coarse = (
            -(-height // self.d) * -(-width // self.d) for height, width in (fine_size, coarse_size)
        )
        dim, fine_dim = self.encode.weight.shape[:2]
        macs = fine_size[0] * fine_size[1] * (fine_dim + 1) * dim
        width = dim
        if self.project is not None:
            width = self.project.out_channels
            macs += fine * coarse * (dim + 1) * width
        return macs + fine * coarse * self.d**2 * (dim + width)


class Mix(nn.Module):
    """Concatenation of maps at one size and a 1x1 convolution, without the concatenation.

    Convolving and enlarging are linear, so each map has its slice of the convolution applied at its
    own size, multiplied into the Linear that precedes it.

    Args:
        parts: maps that are concatenated.
        width: channels of each at that point, and of the result.
        bias: whether the convolution has one.
    """

    def __init__(self, parts: int, width: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(parts * width, width, 1, bias=bias)

    def forward(
        self, maps: Sequence[tuple[Tensor, nn.Linear | None]], size: tuple[int, int]
    ) -> Tensor:
        """Return (B, *size, E).

        Args:
            maps: (B, h, w, X) each with the Linear that brings it to E channels, or None if it has
                them.
            size: (H, W) that every map is enlarged to.
        """
        mixed: Tensor | None = None
        slices = self.conv.weight.flatten(1).chunk(len(maps), dim=1)
        for (map_BhwX, linear), slice_EE in zip(maps, slices, strict=True):
            weight = slice_EE if linear is None else slice_EE @ linear.weight
            bias = None if linear is None else slice_EE @ linear.bias
            part = _enlarge(F.linear(map_BhwX, weight, bias), size)
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return mixed if self.conv.bias is None else mixed + self.conv.bias


def _enlarge(map_BHWC: Tensor, size: tuple[int, int]) -> Tensor:
    if map_BHWC.shape[1:3] == size:
        return map_BHWC
    large = F.interpolate(map_BHWC.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    return large.permute(0, 2, 3, 1)


class CLAHead(nn.Module):
    """Decoder blocks from coarse to fine, each with the CLA of its pair, then a fuse.

    Args:
        dims: channels of the four levels, finest first.
        width: channels E.
        num_classes: outputs.
        dropout: rate at which whole channels are dropped before the classifier.
        config: the pairs and the reading.
    """

    def __init__(
        self,
        dims: Sequence[int],
        width: int,
        num_classes: int,
        dropout: float,
        config: CLAConfig,
    ) -> None:
        super().__init__()
        self.pairs: list[Pair] = [(pair[0] - 1, pair[1] - 1) for pair in config.pairs]
        self.unpaired = [level - 1 for level in config.unpaired_levels]
        self.combine, self.concat_fj = config.combine, config.concat_fj
        self.linears = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        self.attentions = nn.ModuleList(
            CrossLayerAttention(dims[fine], dims[coarse], width, config)
            for fine, coarse in self.pairs
        )
        own = 1 + (config.combine == "concat")
        later = own + 1 + config.concat_fj
        # A constant before the batch norm is nothing, and without the fuse that is all it would be.
        self.mixes = nn.ModuleList(
            Mix(later if number else own + 1, width, bias=config.final_fuse)
            for number in range(len(self.pairs))
        )
        self.fuse = Mix(1 + len(self.unpaired), width, bias=False) if config.final_fuse else None
        self.bn = nn.BatchNorm2d(width)  # decayed as SegFormer's: its name holds no "norm"
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    @property
    def idle_params(self) -> int:
        """Parameters of the unused convolution that the paper's counts include, as SegFormer's."""
        return 129 * self.classifier.out_channels

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map levels (B, C_l, H_l, W_l), finest first, to (B, num_classes, H_1, W_1) logits."""
        levels = [level.permute(0, 2, 3, 1) for level in maps]
        linears = [cast(nn.Linear, linear) for linear in self.linears]
        above: Tensor | None = None
        for (fine, coarse), attention, mix in zip(
            self.pairs, self.attentions, self.mixes, strict=True
        ):
            value = linears[coarse](levels[coarse])
            out = attention(levels[fine], levels[coarse], value)
            parts: list[tuple[Tensor, nn.Linear | None]] = [(levels[fine], linears[fine])]
            if above is None or self.concat_fj:
                parts.append((levels[coarse], linears[coarse]))
            if above is not None:
                parts.append((above, None))
            if self.combine == "concat":
                parts.append((out, None))
            above = mix(parts, (levels[fine].shape[1], levels[fine].shape[2]))
            if self.combine == "add":
                above = above + out
            elif self.combine == "gate":
                above = above + above * out
        if self.fuse is not None:
            size = levels[0].shape[1], levels[0].shape[2]
            rest = [(levels[level], linears[level]) for level in self.unpaired]
            above = self.fuse([(above, None), *rest], size)
        assert above is not None
        fused = F.relu(self.bn(above.permute(0, 3, 1, 2)))
        logits: Tensor = self.classifier(self.dropout(fused))
        return logits

    def attention(self, maps: Sequence[Tensor]) -> dict[Pair, Tensor]:
        """Return CLA_ij by the pair's level numbers (from 1), see `CrossLayerAttention`."""
        levels = [level.permute(0, 2, 3, 1) for level in maps]
        return {
            (fine + 1, coarse + 1): cast(CrossLayerAttention, attention).attention(
                levels[fine], levels[coarse]
            )
            for (fine, coarse), attention in zip(self.pairs, self.attentions, strict=True)
        }

    def count_macs(self, maps: Sequence[Tensor]) -> int:
        """Return the multiply-adds for one image as the paper writes it: mixed after enlarging."""
        sizes = [(level.shape[2], level.shape[3]) for level in maps]
        pixels = [height * width for height, width in sizes]
        width = self.bn.num_features
        macs = sum(level[0].numel() for level in maps) * width
        mixes = [(fine, mix) for (fine, _), mix in zip(self.pairs, self.mixes, strict=True)]
        if self.fuse is not None:
            mixes.append((0, self.fuse))
        for level, mix in mixes:
            conv = cast(Mix, mix).conv
            macs += pixels[level] * (conv.weight.numel() + (conv.bias is not None) * width)
        for (fine, coarse), attention in zip(self.pairs, self.attentions, strict=True):
            macs += cast(CrossLayerAttention, attention).macs(sizes[fine], sizes[coarse])
        return macs + pixels[0] * (3 * width + self.classifier.out_channels * (width + 1))
