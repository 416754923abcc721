"""What published weights call their tensors, and which of ours each one is.

A function a source: dict of theirs to dict of ours, without the model. Backbone keys come out bare
("stages.0. ..."), head keys under "head."; what has no place in any of our models is dropped, what
is not known keeps its name and is reported as left over. Names are facts about published files; no
code of theirs was taken.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern and what stands in its place, as of `re.sub`."""

# A block's parts in NVlabs' code, in HILA's and in timm's (where the depth-wise name is one word).
_BLOCK_RULES: tuple[Rule, ...] = (
    (r"\.attn\.q\.", ".attention.query."),
    (r"\.attn\.kv\.", ".attention.key_value."),
    (r"\.attn\.proj\.", ".attention.output."),
    (r"\.attn\.sr\.", ".attention.reduce."),
    (r"\.attn\.norm\.", ".attention.reduce_norm."),
    (r"\.mlp\.fc1\.", ".ffn.expand."),
    (r"\.mlp\.dwconv(\.dwconv)?\.", ".ffn.depthwise."),
    (r"\.mlp\.fc2\.", ".ffn.contract."),
)
_NVLABS_RULES: tuple[Rule, ...] = (
    (r"^backbone\.", ""),
    (r"^patch_embed(\d)\.proj\.", lambda match: f"stages.{int(match[1]) - 1}.embed.conv."),
    (r"^patch_embed(\d)\.norm\.", lambda match: f"stages.{int(match[1]) - 1}.embed.norm."),
    (r"^block(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
    (r"^norm(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.norm."),
    (
        r"^decode_head\.linear_c(\d)\.proj\.",
        lambda match: f"head.linears.{int(match[1]) - 1}.",
    ),
    (r"^decode_head\.linear_fuse\.conv\.", "head.fuse."),
    (r"^decode_head\.linear_fuse\.bn\.", "head.bn."),
    (r"^decode_head\.linear_pred\.", "head.classifier."),
    *_BLOCK_RULES,
)
# The head's base class makes this convolution, which its forward pass does not use.
_NVLABS_UNUSED = re.compile(r"^decode_head\.conv_seg\.")

_HILA_FLAG = re.compile(r"(^|\.)reuse_bottomsa_pretraining_flag$")
_HILA_PART = re.compile(
    r"^(?:backbone\.)?(topdown|bottomup|prevblock|prevnorm)\.\d(\d)\.(?:(\d+)\.)?"
)
_HILA_PARTS = {
    "topdown": "top_down",
    "bottomup": "bottom_up",
    "prevblock": "low_block",
    "prevnorm": "low_norm",
}
_HILA_RULES: tuple[Rule, ...] = (
    (r"\.(topdown|bottomup)_attn\.", ".attn."),
    (r"\.(bottom|top)_mlp\.", ".mlp."),
    (r"(\.top_down\..*)norm1\.|(\.bottom_up\..*)norm4\.", r"\1\2norm_target."),
    (r"(\.top_down\..*)norm2\.|(\.bottom_up\..*)norm5\.", r"\1\2norm_source."),
    (r"(\.top_down\..*)norm3\.|(\.bottom_up\..*)norm6\.", r"\1\2norm_ffn."),
)
_HILA_POSITION = re.compile(r"\.attn\.relative_position_(init|bias_table)$")

_HUGGING_FACE_RULES: tuple[Rule, ...] = (
    (r"^segformer\.", ""),
    (r"^encoder\.patch_embeddings\.(\d)\.", r"stages.\1.patch_embeddings."),
    (r"^encoder\.block\.(\d)\.", r"stages.\1.blocks."),
    (r"^encoder\.layer_norm\.(\d)\.", r"stages.\1.layer_norm."),
    (r"^(stages\.\d)\.layer_norm\.", r"\1.norm."),
    (r"\.patch_embeddings\.proj\.", ".embed.conv."),
    (r"\.patch_embeddings\.layer_norm\.", ".embed.norm."),
    (r"\.(layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.(self\.query|q_proj)\.", ".attention.query."),
    (r"\.attention\.(self\.key|k_proj)\.", ".attention.key."),
    (r"\.attention\.(self\.value|v_proj)\.", ".attention.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attention.output."),
    (r"\.attention\.(self\.sr|sequence_reduction\.sequence_reduction)\.", ".attention.reduce."),
    (r"\.attention\.(self|sequence_reduction)\.layer_norm\.", ".attention.reduce_norm."),
    (r"\.mlp\.(dense1|fc1)\.", ".ffn.expand."),
    (r"\.mlp\.dwconv\.dwconv\.", ".ffn.depthwise."),
    (r"\.mlp\.(dense2|fc2)\.", ".ffn.contract."),
    (r"^classifier\.", "head."),
    (r"^decode_head\.(linear_c|linear_projections)\.(\d)\.proj\.", r"head.linears.\2."),
    (r"^decode_head\.linear_fuse\.", "head.fuse."),
    (r"^decode_head\.batch_norm\.", "head.bn."),
    (r"^decode_head\.classifier\.", "head.classifier."),
)
# SegNeXt's backbone, in its authors' code and in mmsegmentation; what they share with NVlabs' names
# comes after.
_MSCAN_STEM = {"0": "first.conv", "1": "first.norm", "3": "second.conv", "4": "second.norm"}
_MSCAN_RULES: tuple[Rule, ...] = (
    (
        r"^(backbone\.)?patch_embed1\.proj\.([0134])\.",
        lambda match: f"stages.0.embed.{_MSCAN_STEM[match[2]]}.",
    ),
    (r"\.attn\.proj_1\.", ".attention.enter."),
    (r"\.attn\.proj_2\.", ".attention.leave."),
    (r"\.attn\.spatial_gating_unit\.conv0\.", ".attention.local."),
    (r"\.attn\.spatial_gating_unit\.conv([012])_1\.", r".attention.strips.\1.row."),
    (r"\.attn\.spatial_gating_unit\.conv([012])_2\.", r".attention.strips.\1.column."),
    (r"\.attn\.spatial_gating_unit\.conv3\.", ".attention.mix."),
    *_NVLABS_RULES,
)
_TIMM_PVT_RULES: tuple[Rule, ...] = (
    (r"^patch_embed\.", "stages.0.downsample."),
    (r"^(stages\.\d)\.downsample\.proj\.", r"\1.embed.conv."),
    (r"^(stages\.\d)\.downsample\.norm\.", r"\1.embed.norm."),
    *_BLOCK_RULES,
)


def rename(given: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Return the tensors with every rule applied to their keys, in the rules' order."""
    renamed = {}
    for key, tensor in given.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def from_nvlabs(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert NVlabs' MiT and SegFormer, and whai362's PVTv2, which has the backbone's names.

    Stages and levels count from 1 there. ImageNet classifiers have neither "backbone." nor
    "decode_head.".
    """
    return rename({k: v for k, v in given.items() if not _NVLABS_UNUSED.match(k)}, _NVLABS_RULES)


def from_mscan(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert MSCAN by the names of SegNeXt's authors and of mmsegmentation.

    Heads are not converted: SegNeXt's own is not among our models, and what else those files hold
    under "decode_head." is reported as left over.
    """
    return rename(given, _MSCAN_RULES)


def from_hila(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert HILA's release on MiT; its plain part and its head are NVlabs'.

    The two position vectors of an attention only ever add to each other: their sum is our one.

    Known of the names: `topdown.{12,23,34}.0. ...` and so on. Not known, hence read leniently: the
    position vectors' layout (any that holds p * p numbers, row by row), whether `prevnorm` has an
    index, and how unshared copies are counted (taken to be that same index: where there is a 1 too,
    the part becomes a list; a lone 0 is read as shared, so that `share` must be True or "bu").
    """
    parts = [match for match in map(_HILA_PART.match, given) if match]
    lists = {match.group(1, 2) for match in parts if match[3] not in (None, "0")}

    def place(match: re.Match[str]) -> str:
        index = f"{match[3]}." if match.group(1, 2) in lists else ""
        return f"exchanges.{match[2]}.{_HILA_PARTS[match[1]]}.{index}"

    kept = {key: tensor for key, tensor in given.items() if not _HILA_FLAG.search(key)}
    converted: dict[str, Tensor] = {}
    for key, tensor in rename(kept, ((_HILA_PART.pattern, place), *_HILA_RULES)).items():
        name, is_position = _HILA_POSITION.subn(".attention.position_bias", key)
        if is_position:
            other = converted.get(name)
            converted[name] = tensor.flatten() if other is None else other + tensor.flatten()
        else:
            converted[name] = tensor
    return from_nvlabs(converted)


def from_hugging_face(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert transformers' Segformer, classifier and segmenter, names of 4.x and of 5.x.

    Keys and values are separate there. Its code takes 1e-5 as epsilon of every LayerNorm, where the
    published weights were trained with 1e-6 in blocks and at the end of stages, as here; for its
    very numbers, set `eps` of these.
    """
    renamed = rename(given, _HUGGING_FACE_RULES)
    converted = {}
    for key, tensor in renamed.items():
        value = key.replace(".attention.key.", ".attention.value.")
        pair = value.replace(".attention.value.", ".attention.key.")
        if pair == value or pair not in renamed or value not in renamed:
            converted[key] = tensor
        elif key == pair:
            name = key.replace(".attention.key.", ".attention.key_value.")
            converted[name] = torch.cat([tensor, renamed[value]])
    return converted


def from_timm_pvt(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert timm's PVTv2, which with MLP ratios of 4 is MiT.

    So built are pvt_v2_b5 (our mit_b5) and whoever asks for `mlp_ratios=(4, 4, 4, 4)`. The FFNs of
    stages 1 and 2 in pvt_v2_b0 to b4 are twice as wide and fit no MiT; the rest does.
    """
    return rename(given, _TIMM_PVT_RULES)
