"""What published Swin weights call their tensors, and which of ours each one is.

A function a source: dict of theirs to dict of ours, without the model. Backbone keys come out bare
("stages.0. ..."), head keys under "head."; constant tables are dropped, what is not known keeps its
name. Names are facts about published files; no code of theirs was taken.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from xattn.models.weights_names import Rule, rename


def _next_stage(match: re.Match[str]) -> str:
    """Name a patch merging that ends a stage in theirs and starts the next one in ours."""
    return f"stages.{int(match[1]) + 1}.embed."


_TABLES = re.compile(r"\.(relative_position_index|attn_mask)$")

_PARTS: tuple[Rule, ...] = (
    (r"^patch_embed\.(proj|projection)\.", "stages.0.embed.conv."),
    (r"^patch_embed\.norm\.", "stages.0.embed.norm."),
    (r"\.embed\.reduction\.", ".embed.reduce."),
    (r"\.attn\.(w_msa\.)?qkv\.", ".attention.query_key_value."),
    (r"\.attn\.(w_msa\.)?proj\.", ".attention.output."),
    (r"\.attn\.(w_msa\.)?relative_position_bias_table$", ".attention.relative_position_bias"),
    (r"\.(mlp\.fc1|ffn\.layers\.0\.0)\.", ".ffn.expand."),
    (r"\.(mlp\.fc2|ffn\.layers\.1)\.", ".ffn.contract."),
)
_AUTHORS: tuple[Rule, ...] = (
    (r"^backbone\.", ""),
    (r"^layers\.(\d)\.downsample\.", _next_stage),
    (r"^layers\.(\d)\.", r"stages.\1."),
    (r"^norm(\d)\.", r"stages.\1.norm."),
    (r"^norm\.", "stages.3.norm."),
)
_TIMM: tuple[Rule, ...] = (
    (r"^layers\.(\d)\.downsample\.", r"stages.\1.embed."),
    (r"^layers\.(\d)\.", r"stages.\1."),
    (r"^norm\.", "stages.3.norm."),
    (r"^head\.fc\.", "head."),
)
_MMSEG: tuple[Rule, ...] = (
    (r"^backbone\.", ""),
    (r"^stages\.(\d)\.downsample\.", _next_stage),
    (r"^norm(\d)\.", r"stages.\1.norm."),
)
_HEADS: tuple[Rule, ...] = (
    (r"^decode_head\.psp_modules\.(\d)\.1\.", r"head.main.pooled.\1."),
    (r"^decode_head\.bottleneck\.", "head.main.context."),
    (r"^decode_head\.lateral_convs\.", "head.main.laterals."),
    (r"^decode_head\.fpn_convs\.", "head.main.smooths."),
    (r"^decode_head\.fpn_bottleneck\.", "head.main.fuse."),
    (r"^decode_head\.conv_seg\.", "head.main.classifier."),
    (r"^auxiliary_head\.convs\.0\.", "head.auxiliary.conv."),
    (r"^auxiliary_head\.conv_seg\.", "head.auxiliary.classifier."),
)


def _without_tables(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in given.items() if not _TABLES.search(key)}


def from_swin(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the authors' names (microsoft/Swin-Transformer and its fork for segmentation)."""
    return rename(_without_tables(given), (*_AUTHORS, *_PARTS, *_HEADS))


def from_timm_swin(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert timm's names, in which patch merging starts a stage."""
    return rename(_without_tables(given), (*_TIMM, *_PARTS))


def from_mmseg_swin(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert mmsegmentation's names, and its order of what patch merging joins.

    There the four neighbours of one channel lie together (left before right, from above); in the
    authors' order and ours all channels of one neighbour do.
    """
    renamed = rename(_without_tables(given), (*_MMSEG, *_PARTS, *_HEADS))
    for key, tensor in renamed.items():
        if re.search(r"^stages\.[1-9]\.embed\.(norm|reduce)\.", key):
            neighbours = tensor.unflatten(-1, (-1, 2, 2))  # ..., channel, row, column
            renamed[key] = neighbours.movedim(-3, -1).transpose(-3, -2).flatten(-3)
    return renamed


SWIN_SOURCES = {
    "swin": (re.compile(r"^(backbone\.layers\.\d|layers\.0\.downsample)\."), from_swin),
    "timm_swin": (
        re.compile(r"^layers\.\d\.(downsample\.|blocks\.\d+\.(attn|mlp|norm\d)\.)"),
        from_timm_swin,
    ),
    "mmseg_swin": (
        re.compile(
            r"\.attn\.w_msa\.|^(backbone\.)?stages\.\d\.downsample\.(norm|reduction)\."
            r"|^decode_head\.(psp_modules|lateral_convs|fpn_convs)\."
        ),
        from_mmseg_swin,
    ),
}
"""A pattern found in some key of a source, of which the first that fits counts; its function."""
