"""SegViT: the similarity of class queries to the tokens of a map is the mask of each class.

Zhang et al., "SegViT: Semantic Segmentation with Plain Vision Transformers" (NeurIPS 2022),
sections 3.1 (Attention-to-Mask, ATM) and 3.2 (the Shrunk structure). Written from the paper and
from facts about the authors' code (zbwxp/SegVit; no code taken), which has the last word where
they differ: what the paper draws as one ATM is three decoder layers, of the last of which the
attention's logits are the mask; heads are averaged; masks of several taps are added up as logits,
and one sigmoid is taken at the end.

Who is who in its attention: queries are the classes, keys and values the tokens of a map. The
products of queries and keys, scaled, are read twice: averaged over heads they are the mask logits,
after a softmax over the tokens they weigh the values.

Differences from the authors' code:
- Maps know their height and width; they may be oblong and of odd sides. QU's queries are resized
  where there are more or fewer tokens than in training.
- Of attention layers whose logits nobody reads, the fused kernel computes the output alone.
- Keys and values are one Linear.

The eval model can be exported with dynamic height and width where these are multiples of 16 px, of
32 if the map shrinks, of 224 for Swin, and larger than that: at other sizes images are stretched or
filled up and odd maps halved, for which the trace would hold one case alone.

Shape suffixes: B batch, S taps or layers that have a mask, N queries (query j is class j), K
classes, L tokens of a map, H W its rows and columns, C channels of the backbone, D of the head.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.errors import ConfigError
from xattn.models.upernet import ConvBNReLU, Size, resize
from xattn.models.vit import grid_of, init_linear, split_heads
from xattn.nn.grids import Grid

LAYERS = 3
"""Decoder layers of an ATM, and of a stage of QU."""
_HEAD_DIM = 32  # channels of an attention head, in every published head
_FFN_RATIO = 4


class Masks(NamedTuple):
    """What a head says of each query.

    Args:
        classes: (B, S, N, N + 1) logits of the classes; the last one is "no object".
        masks: (B, S, N, H, W) logits; the last of S is the prediction, the others help training
            (in eval there is the last alone).
    """

    classes: Tensor
    masks: Tensor


def score_map(outputs: Masks, size: Size) -> Tensor:
    """Return how much of each class there is at each pixel, summed over queries.

    Args:
        outputs: their last classes and masks are read.
        size: rows and columns of the result.

    Returns:
        (B, N, *size), at least float32: sum over j of softmax(classes[j])[c] * sigmoid(masks[j]).
        Not below 0; each share is at most 1, but not the sum.
    """
    with torch.autocast(outputs.masks.device.type, enabled=False):
        classes, masks = (
            part[:, -1].to(torch.promote_types(part.dtype, torch.float32)) for part in outputs
        )
        shares_BNK = classes.softmax(dim=2)[..., :-1]
        return torch.einsum("bnk,bnhw->bkhw", shares_BNK, resize(masks, size).sigmoid())


class CrossAttention(nn.Module):
    """Multi-head attention of queries to other tokens, or to themselves.

    Args:
        width: channels D; a multiple of 32.
        dropout: rate at which weights are dropped.
        is_packed: whether fresh weights are those of torch's `MultiheadAttention`, whose three
            projections are one matrix to Xavier's rule, instead of normal ones.
    """

    def __init__(self, width: int, dropout: float, *, is_packed: bool) -> None:
        super().__init__()
        self.heads = width // _HEAD_DIM
        self.dropout = dropout
        self.is_packed = is_packed
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, query_BND: Tensor, source_BLD: Tensor) -> Tensor:
        """Map queries (B, N, D) and tokens (B, L, D) to (B, N, D)."""
        query, key, value = self._split(query_BND, source_BLD)
        rate = self.dropout if self.training else 0.0
        return self._join(F.scaled_dot_product_attention(query, key, value, dropout_p=rate))

    def with_logits(self, query_BND: Tensor, source_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return `forward`'s result, and the logits behind it averaged over heads, (B, N, L)."""
        query, key, value = self._split(query_BND, source_BLD)
        logits = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3))
        weights = F.dropout(logits.softmax(dim=3), self.dropout, self.training)
        return self._join(torch.matmul(weights.to(value.dtype), value)), logits.mean(dim=1)

    def _split(self, query_BND: Tensor, source_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.key_value(source_BLD).chunk(2, dim=2)
        query, key, value = (
            split_heads(part, self.heads) for part in (self.query(query_BND), key, value)
        )
        return query, key, value

    def _join(self, attended: Tensor) -> Tensor:
        out: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return out


class DecoderLayer(nn.Module):
    """Post-norm decoder layer: queries attend to each other, to a memory, and pass an FFN.

    Args:
        width: channels D.
        dropout: rate inside, and of each residual branch.
        has_masks: whether the logits of the second attention may be read; decides how fresh weights
            are drawn, see `CrossAttention`.
    """

    def __init__(self, width: int, dropout: float, *, has_masks: bool) -> None:
        super().__init__()
        self.among = CrossAttention(width, dropout, is_packed=True)
        self.after_among = nn.LayerNorm(width)
        self.across = CrossAttention(width, dropout, is_packed=not has_masks)
        self.after_across = nn.LayerNorm(width)
        self.expand = nn.Linear(width, _FFN_RATIO * width)
        self.contract = nn.Linear(_FFN_RATIO * width, width)
        self.after_ffn = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query_BND: Tensor, memory_BLD: Tensor) -> Tensor:
        """Map queries (B, N, D), given tokens (B, L, D), to (B, N, D)."""
        query_BND = self._meet(query_BND)
        return self._finish(query_BND, self.across(query_BND, memory_BLD))

    def with_logits(self, query_BND: Tensor, memory_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return `forward`'s result and the mask logits (B, N, L)."""
        query_BND = self._meet(query_BND)
        found_BND, logits_BNL = self.across.with_logits(query_BND, memory_BLD)
        return self._finish(query_BND, found_BND), logits_BNL

    def _meet(self, query_BND: Tensor) -> Tensor:
        met: Tensor = self.dropout(self.among(query_BND, query_BND))
        out: Tensor = self.after_among(query_BND + met)
        return out

    def _finish(self, query_BND: Tensor, found_BND: Tensor) -> Tensor:
        query_BND = self.after_across(query_BND + self.dropout(found_BND))
        hidden = self.dropout(F.relu(self.expand(query_BND)))
        out: Tensor = self.after_ffn(query_BND + self.dropout(self.contract(hidden)))
        return out


class Memory(nn.Module):
    """A map's tokens in the head's width: Linear, then LayerNorm.

    Args:
        dim: channels C.
        width: channels D.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, width)
        self.after = nn.LayerNorm(width)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, H * W, D)."""
        out: Tensor = self.after(self.linear(map_BCHW.permute(0, 2, 3, 1).flatten(1, 2)))
        return out


def _build_layers(width: int, dropout: float, *, has_masks: bool) -> nn.ModuleList:
    return nn.ModuleList(DecoderLayer(width, dropout, has_masks=has_masks) for _ in range(LAYERS))


def _init_weights(module: nn.Module) -> None:
    """Initialise as the authors do; for `nn.Module.apply`, which comes to parts first."""
    init_linear(module)
    if isinstance(module, CrossAttention) and module.is_packed:
        bound = math.sqrt(6 / (4 * module.query.in_features))  # of D channels to 3 D
        nn.init.uniform_(module.query.weight, -bound, bound)
        nn.init.uniform_(module.key_value.weight, -bound, bound)


def _check_width(width: int) -> None:
    if width % _HEAD_DIM:
        near = max(1, round(width / _HEAD_DIM)) * _HEAD_DIM
        raise ConfigError(
            f"head_width: found {width}, expected a multiple of {_HEAD_DIM}, e.g. {near}"
        )


class CascadeHead(nn.Module):
    """ATMs in a row, one a tap from the deepest to the shallowest, whose masks add up.

    The class predictor is shared; query outputs of one tap are the queries of the next.

    Args:
        dims: channels of the maps, shallowest first.
        width: channels D; a multiple of 32.
        num_classes: N, queries.
        dropout: rate in the decoder layers.
        lateral: whether a tap's tokens have those of the deeper tap added, resized to their number
            (a switched-off branch of the authors' code).

    Raises:
        ConfigError: `width` is no multiple of 32.
    """

    def __init__(
        self,
        dims: Sequence[int],
        width: int,
        num_classes: int,
        dropout: float,
        lateral: bool = False,
    ) -> None:
        super().__init__()
        _check_width(width)
        self.lateral = lateral
        self.queries = nn.Parameter(torch.empty(num_classes, width).normal_())
        self.memories = nn.ModuleList(Memory(dim, width) for dim in reversed(dims))
        self.stacks = nn.ModuleList(_build_layers(width, dropout, has_masks=True) for _ in dims)
        self.classify = nn.Linear(width, num_classes + 1)
        self.apply(_init_weights)

    def forward(self, maps: Sequence[Tensor]) -> Masks:
        """Map (B, C_s, H_s, W_s), shallowest first, to masks of the shallowest one's size."""
        query = self.queries.expand(len(maps[0]), -1, -1)
        size = maps[0].shape[2:]
        tokens: list[Tensor] = []
        masks: list[Tensor] = []
        deeper: Tensor | None = None
        for map_BCHW, memory, stack in zip(reversed(maps), self.memories, self.stacks, strict=True):
            sides = map_BCHW.shape[2:]
            source = memory(map_BCHW)
            if self.lateral:
                source = source if deeper is None else source + _enlarge(deeper, sides)
                deeper = source.unflatten(1, sides)
            layers = cast(nn.ModuleList, stack)
            for layer in layers[:-1]:
                query = layer(query, source)
            query, logits = cast(DecoderLayer, layers[-1]).with_logits(query, source)
            mask = resize(logits.unflatten(2, sides), size)
            masks.append(mask + masks[-1] if masks else mask)
            tokens.append(query)
        kept = slice(None) if self.training else slice(-1, None)
        classes: Tensor = self.classify(torch.stack(tokens[kept], 1))
        return Masks(classes, torch.stack(masks[kept], 1))


def _enlarge(map_BHWD: Tensor, size: Size) -> Tensor:
    """Return a map of tokens, each repeated to fill `size`, as (B, L, D)."""
    large = F.interpolate(map_BHWD.permute(0, 3, 1, 2), size, mode="nearest")
    return large.permute(0, 2, 3, 1).flatten(1, 2)


class LoneATM(nn.Module):
    """An ATM of one tap, each of whose layers has a mask; they are not added up.

    The last layer's is the prediction, the others' help training.

    Args:
        width: channels D.
        num_classes: N, queries.
        dropout: rate in the decoder layers.
    """

    def __init__(self, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_classes, width).normal_())
        self.layers = _build_layers(width, dropout, has_masks=True)
        self.classify = nn.Linear(width, num_classes + 1)

    def forward(self, memory_BLD: Tensor, size: Size) -> Masks:
        """Map tokens (B, L, D) of a map of `size` to masks of that size."""
        query = self.queries.expand(len(memory_BLD), -1, -1)
        layers = cast(Iterable[DecoderLayer], self.layers)
        tokens, masks = [], []
        for number, layer in enumerate(layers, start=1):
            if not self.training and number < LAYERS:
                query = layer(query, memory_BLD)
                continue
            query, logits = layer.with_logits(query, memory_BLD)
            tokens.append(query)
            masks.append(logits.unflatten(2, tuple(size)))
        return Masks(self.classify(torch.stack(tokens, 1)), torch.stack(masks, 1))


class NaiveShrunkHead(nn.Module):
    """An ATM on the last map, however coarse it is.

    Args:
        dims, width, num_classes, dropout: see `CascadeHead`; the last of `dims` counts.

    Raises:
        ConfigError: `width` is no multiple of 32.
    """

    def __init__(self, dims: Sequence[int], width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        _check_width(width)
        self.memory = Memory(dims[-1], width)
        self.atm = LoneATM(width, num_classes, dropout)
        self.apply(_init_weights)

    def forward(self, maps: Sequence[Tensor]) -> Masks:
        """Map (B, C, H, W), shallowest first, to masks of the last one's size."""
        out: Masks = self.atm(self.memory(maps[-1]), maps[-1].shape[2:])
        return out


class ShrunkHead(nn.Module):
    """Queries a token of the full grid read a fine and a coarse map (QU); an ATM reads them.

    Args:
        dims: channels of the fine and the coarse map.
        width: channels D; a multiple of 32.
        num_classes: N, queries of the ATM.
        dropout: rate in the decoder layers.
        crop: (height, width) that it is trained on, px; there is a query for each patch.

    Raises:
        ConfigError: `width` is no multiple of 32, or `crop` no size.
    """

    def __init__(
        self,
        dims: Sequence[int],
        width: int,
        num_classes: int,
        dropout: float,
        crop: Sequence[int],
    ) -> None:
        super().__init__()
        _check_width(width)
        self.cells = Grid(*grid_of(crop), width, std=1.0)
        self.memories = nn.ModuleList(Memory(dim, width) for dim in dims)
        self.stacks = nn.ModuleList(_build_layers(width, dropout, has_masks=False) for _ in dims)
        self.atm = LoneATM(width, num_classes, dropout)
        self.apply(_init_weights)

    def forward(self, maps: Sequence[Tensor]) -> Masks:
        """Map (B, C, H, W) and (B, C, h, w) to masks of the first one's size."""
        height, width = maps[0].shape[2:]
        cells = self.cells((height, width)).flatten(0, 1).expand(len(maps[0]), -1, -1)
        for map_BCHW, memory, stack in zip(maps, self.memories, self.stacks, strict=True):
            source = memory(map_BCHW)
            for layer in cast(nn.ModuleList, stack):
                cells = layer(cells, source)
        out: Masks = self.atm(cells, (height, width))
        return out


class MaskSegmenter(nn.Module):
    """A backbone that returns maps and a head that finds a mask for each class in them.

    Args:
        backbone: (B, 3, H, W) images to maps.
        head: maps to `Masks`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Masks | Tensor:
        """Map (B, 3, H, W) images to `Masks` while training, else to scores (B, N, H, W)."""
        outputs: Masks = self.head(self.backbone(images))
        return outputs if self.training else score_map(outputs, images.shape[2:])


class NaiveHead(nn.Module):
    """SETR's naive decoder on the last map: two 1x1 convolutions, a BatchNorm between them.

    Zheng et al., "SETR" (CVPR 2021), section 3.3, here without upsampling in between: the 107.3 G
    multiply-adds that SegViT's table 4 gives it are those of classifying tokens.

    Args:
        dim: channels of the map.
        width: channels in between.
        num_classes: outputs.
    """

    def __init__(self, dim: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv = ConvBNReLU(dim, width, 1)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.classifier.bias))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map (B, C, H, W) maps to (B, num_classes, H, W) logits of the last one."""
        out: Tensor = self.classifier(self.conv(maps[-1]))
        return out
