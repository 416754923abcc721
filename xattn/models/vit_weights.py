"""What published ViT and SegViT weights call their tensors, and which of ours each one is.

A function a source: dict of theirs to dict of ours, without the model. Backbone keys come out bare
("blocks.0. ..."), head keys under "head."; what has no place in any of our models is dropped, what
is not known keeps its name. Names are facts about published files; no code of theirs was taken.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from xattn.models.weights_names import Rule, rename

_TIMM: tuple[Rule, ...] = (
    (r"^backbone\.", ""),
    (r"^patch_embed\.proj\.", "embed."),
    (r"\.attn\.qkv\.", ".attention.query_key_value."),
    (r"\.attn\.proj\.", ".attention.output."),
    (r"\.mlp\.fc1\.", ".ffn.expand."),
    (r"\.mlp\.fc2\.", ".ffn.contract."),
)
_TIMM_UNUSED = re.compile(r"^(norm|fc_norm|pre_logits)\.")

# A decoder layer's parts, wherever it is; s counts from the deepest tap in the cascade, from the
# shallowest in QU, as ours do.
_LAYER: tuple[Rule, ...] = (
    (r"\.self_attn\.in_proj_", ".among.packed."),
    (r"\.multihead_attn\.in_proj_", ".across.packed."),
    (r"\.self_attn\.out_proj\.", ".among.output."),
    (r"\.multihead_attn\.(out_proj|proj)\.", ".across.output."),
    (r"\.multihead_attn\.q\.", ".across.query."),
    (r"\.multihead_attn\.k\.", ".across.key."),
    (r"\.multihead_attn\.v\.", ".across.value."),
    (r"\.linear1\.", ".expand."),
    (r"\.linear2\.", ".contract."),
    (r"\.norm1\.", ".after_among."),
    (r"\.norm2\.", ".after_across."),
    (r"\.norm3\.", ".after_ffn."),
)
_BACKBONE: tuple[Rule, ...] = (
    (r"^backbone\.", ""),
    (r"^patch_embed\.projection\.", "embed."),
    (r"^layers\.(\d+)\.ln(\d)\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.attn\.attn\.in_proj_", r"blocks.\1.attention.query_key_value."),
    (r"^layers\.(\d+)\.attn\.attn\.out_proj\.", r"blocks.\1.attention.output."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.ffn.expand."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.ffn.contract."),
)
_TAPS: tuple[Rule, ...] = (
    (r"^decode_head\.input_proj_(\d)\.", lambda match: f"head.memories.{_index(match)}.linear."),
    (r"^decode_head\.proj_norm_(\d)\.", lambda match: f"head.memories.{_index(match)}.after."),
    (r"^decode_head\.decoder_(\d)\.layers\.", lambda match: f"head.stacks.{_index(match)}."),
)
_CASCADE: tuple[Rule, ...] = (
    *_LAYER,  # first: the backbone's norms get names of its own
    *_BACKBONE,
    *_TAPS,
    (r"^decode_head\.q\.weight$", "head.queries"),
    (r"^decode_head\.class_embed\.", "head.classify."),
)
_SHRUNK: tuple[Rule, ...] = (
    *_LAYER,  # first: the backbone's norms get names of its own
    *_BACKBONE,
    *_TAPS,
    (r"^decode_head\.q\.weight$", "head.cells.weight"),
    (r"^decode_head\.atm\.decoder_1\.layers\.", "head.atm.layers."),
    (r"^decode_head\.atm\.q\.weight$", "head.atm.queries"),
    (r"^decode_head\.atm\.class_embed\.", "head.atm.classify."),
)
# The class weights of the loss, the unused convolution that the head's base class makes, and the
# final norm of files that Segmenter used, which SegViT leaves out.
_SEGVIT_UNUSED = re.compile(
    r"\.criterion\.empty_weight$|^decode_head\.(atm\.)?conv_seg\.|^(backbone\.)?ln1\."
)


def _index(match: re.Match[str]) -> int:
    return int(match[1]) - 1


def _without_class_token(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with positions laid out as a grid, the class token's apart.

    The grid is taken to be square: files do not say. One number more than a square's is one for a
    class token, in front; any other number is left as it is.
    """
    placed = dict(given)
    table = placed.pop("pos_embed", None)
    token = placed.pop("cls_token", None)
    if token is not None:
        placed["class_token"] = token.flatten()
    if table is not None:
        rows = table.flatten(0, -2)
        side = math.isqrt(len(rows))
        if len(rows) == side**2 + 1:
            placed["class_position"] = rows[0]
            rows = rows[1:]
        placed["position.weight"] = _as_square(rows)
    return placed


def _as_square(rows: Tensor) -> Tensor:
    """Return (side, side, C) of (side * side, C); what is no square stays as it is."""
    side = math.isqrt(len(rows))
    return rows.unflatten(0, (side, side)) if side**2 == len(rows) else rows


def from_timm_vit(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert timm's names, in which the original's and AugReg's weights are published too."""
    renamed = rename(given, _TIMM)
    return _without_class_token({k: v for k, v in renamed.items() if not _TIMM_UNUSED.match(k)})


def from_segvit(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the release of SegViT, mmsegmentation's names of ViT among them."""
    kept = {key: tensor for key, tensor in given.items() if not _SEGVIT_UNUSED.search(key)}
    is_shrunk = any(key.startswith("decode_head.atm.") for key in kept)
    renamed = rename(kept, _SHRUNK if is_shrunk else _CASCADE)
    converted: dict[str, Tensor] = {}
    for key, tensor in renamed.items():
        if ".packed." in key:
            query, key_value = tensor.split([len(tensor) // 3, 2 * len(tensor) // 3])
            converted[key.replace(".packed.", ".query.")] = query
            converted[key.replace(".packed.", ".key_value.")] = key_value
        elif ".across.key." in key:
            value = renamed.get(key.replace(".key.", ".value."))
            name = key if value is None else key.replace(".key.", ".key_value.")
            converted[name] = tensor if value is None else torch.cat([tensor, value])
        elif ".across.value." not in key or key.replace(".value.", ".key.") not in renamed:
            converted[key] = tensor
    if is_shrunk and "head.cells.weight" in converted:
        converted["head.cells.weight"] = _as_square(converted["head.cells.weight"])
    return _without_class_token(converted)


VIT_SOURCES = {
    "segvit": (
        re.compile(
            r"^(backbone\.)?layers\.\d+\.(attn\.attn|ln\d|ffn\.layers)\."
            r"|^decode_head\.(input_proj_\d|proj_norm_\d|decoder_\d|atm)\."
        ),
        from_segvit,
    ),
    "timm_vit": (re.compile(r"^(backbone\.)?blocks\.\d+\.(attn|mlp)\."), from_timm_vit),
}
"""A pattern found in some key of a source, of which the first that fits counts; its function."""
