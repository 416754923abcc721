"""CLA and AFMA on SegFormer: what table 1 of CLA (Chung et al.) compares, and what it lacked.

Backbones, widths and rates are SegFormer's, see `variants_hila`. Its counts are those of the code
that SegFormer's authors published, with their unused convolution.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import nn

from xattn.models.afma import AFMA, AFMA_SEGMENTATION, AFMASegmenter
from xattn.models.cla import CLAConfig, CLAHead
from xattn.models.pyramid import Pyramid
from xattn.models.segformer import SegFormerHead, Segmenter
from xattn.models.variants import Setting, Variant, count, flag, is_whole_list, name
from xattn.models.variants_hila import HILA_VARIANTS

_PAPER = "Chung et al., CLA, table 1"
_PUBLISHED = CLAConfig()
_SETTINGS = {
    "pairs": Setting(
        _PUBLISHED.pairs,
        "a list of pairs of level numbers",
        lambda value: isinstance(value, list | tuple) and all(map(is_whole_list, value)),
    ),
    "d": count(_PUBLISHED.d),
    "combine": name(_PUBLISHED.combine, "gate", "concat"),
    "concat_fj": flag(_PUBLISHED.concat_fj),
    "final_fuse": flag(_PUBLISHED.final_fuse),
    "proj": name(_PUBLISHED.proj, "always"),
    "impl": name(_PUBLISHED.impl, "literal"),
    "encoder_scale": name(_PUBLISHED.encoder_scale, "one"),
    "decoder_scale": name(_PUBLISHED.decoder_scale, "one"),
}

_PRINTED = {"b0": 3.96e6, "b1": 13.8e6}
"""Parameters in table 1."""
_READING = (
    "the reading of the parameters that fits B0; multiply-adds are those of the paper's order of "
    "products, ours has fewer"
)
_NOTES = {
    "b0": _READING,
    "b1": f"{_READING}; no reading that fits B0 has the 13.8 M printed for B1",
    "b2": f"{_READING}; B2 is not in the paper",
}


def _backbone(numbers: Mapping[str, Any], base: str) -> Pyramid:
    build = HILA_VARIANTS[f"segformer_{base}"].build_backbone
    assert build is not None
    backbone = build(numbers)
    assert isinstance(backbone, Pyramid)
    return backbone


def _build_cla(num_classes: int, numbers: Mapping[str, Any], *, base: str) -> nn.Module:
    backbone = _backbone(numbers, base)
    config = CLAConfig(**{field.name: numbers[field.name] for field in fields(CLAConfig)})
    width, dropout = numbers["head_width"], numbers["dropout"]
    return Segmenter(backbone, CLAHead(backbone.dims, width, num_classes, dropout, config))


def _build_afma(num_classes: int, numbers: Mapping[str, Any], *, base: str) -> nn.Module:
    backbone = _backbone(numbers, base)
    coarsest = len(backbone.dims) - 1
    head = SegFormerHead(backbone.dims, numbers["head_width"], num_classes, numbers["dropout"])
    afma = AFMA(backbone.dims[coarsest], num_classes)
    return AFMASegmenter(backbone, head, afma, coarsest)


def _beside_authors(model: nn.Module) -> str:
    """Return what SegFormer's published code would count for the model."""
    head = model.head
    assert isinstance(head, CLAHead | SegFormerHead)
    idle = head.idle_params
    total = sum(parameter.numel() for parameter in model.parameters()) + idle
    return (
        f"on the authors' SegFormer it counts {total:,}, with {idle:,} of a convolution that is "
        "never used"
    )


def _cla(base: str) -> Variant:
    plain = HILA_VARIANTS[f"segformer_{base}"]
    return replace(
        plain,
        system="CLA",
        settings={**plain.settings, **_SETTINGS},
        build=partial(_build_cla, base=base),
        paper_params=_PRINTED.get(base),
        paper_macs=None,
        source=_PAPER,
        notes=_NOTES[base],
        beside_authors=_beside_authors,
    )


def _afma(base: str) -> Variant:
    plain = HILA_VARIANTS[f"segformer_{base}"]
    return replace(
        plain,
        system="AFMA",
        build=partial(_build_afma, base=base),
        objective=AFMA_SEGMENTATION,
        paper_params=None,
        paper_macs=None,
        source="Sang et al. 2023 (AFMA), on SegFormer as CLA's paper could not run it",
        beside_authors=_beside_authors,
    )


CLA_VARIANTS = {
    **{f"cla_segformer_{size}": _cla(size) for size in ("b0", "b1", "b2")},
    "afma_segformer_b0": _afma("b0"),
}
