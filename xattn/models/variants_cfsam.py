"""SSD300 and CFSAM on it, with the paper's rivals and ablations: every variant with its numbers.

Reading the tables is reading the paper (Xie et al., "Cross-Layer Feature Self-Attention Module"):
`_TABLE_4` its sizes, `_CFSAM` the rows of tables 5 and 6.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from xattn.models.cfsam import (
    CFSAM,
    ConcatExcitation,
    EachMap,
    MobileViTBlock,
    SqueezeExcitation,
)
from xattn.models.objectives import DETECTION
from xattn.models.ssd import SSD, SSDBackbone
from xattn.models.variants import Setting, Variant, count, flag, name, whole_numbers

_WIDTH = 64
_ALL = (1, 2, 3, 4, 5, 6)

_TABLE_4 = {
    "ssd300": (26.29e6, 31.37e9),
    "ssd300_se": (26.51e6, 31.38e9),
    "ssd300_cfam": (25.69e6, 30.93e9),
    "ssd300_mvit": (76.75e6, 53.74e9),
    "ssd300_cfsam": (45.16e6, 45.22e9),
}
"""Parameters (which the paper calls MB) and multiply-adds (which it calls FLOPs), as printed."""

_NOTES = {
    "ssd300_se": "the paper's multiply-adds fit with 1.2 M of pooling, which ours leave out",
    "ssd300_cfam": "CFAM-like: built so that the paper's two counts fit, its fusion is not known",
    "ssd300_mvit": "inferred from the counts; the paper's fit without the products of attention, "
    "which it counts for CFSAM",
    "ssd300_cfsam": "a reconstruction: depth, MLP and restoration are inferred from the counts, "
    "heads, activation and norm are ours",
    "ssd300_control": "ours: CFSAM with an MLP for each cell in place of attention, 768 parameters "
    "fewer",
}


def _settings() -> dict[str, Setting]:
    return {"width": count(_WIDTH), "box_sizes": name("voc", "coco")}


def _cfsam_settings(
    levels: Sequence[int] = _ALL, gfe: bool = True, ffr: bool = True, attention: bool = True
) -> dict[str, Setting]:
    return {
        "levels": whole_numbers(tuple(levels), "a list of the numbers of maps, from 1"),
        "gfe": flag(gfe),
        "ffr": flag(ffr),
        "part": count(2),
        "depth": count(3),
        "mlp": count(512),
        "heads": count(8),
        "norm": name("none", "bn"),
        "attention": flag(attention),
    }


_CFSAM = {
    "ssd300_cfsam": _cfsam_settings(),
    "ssd300_cfsam_shallow": _cfsam_settings(levels=(1, 2, 3)),
    "ssd300_cfsam_deep": _cfsam_settings(levels=(4, 5, 6)),
    "ssd300_lfe": _cfsam_settings(gfe=False, ffr=False),
    "ssd300_lfe_gfe": _cfsam_settings(ffr=False),
    "ssd300_control": _cfsam_settings(attention=False),
}

Neck = Callable[[Sequence[int], Mapping[str, Any]], tuple[nn.Module, Sequence[int]]]
"""(channels of the six maps, numbers) -> what stands behind them, channels that leave it."""


def _no_neck(dims: Sequence[int], _: Mapping[str, Any]) -> tuple[nn.Module, Sequence[int]]:
    return nn.Identity(), dims


def _cfsam(dims: Sequence[int], numbers: Mapping[str, Any]) -> tuple[nn.Module, Sequence[int]]:
    own = {key: numbers[key] for key in _cfsam_settings()}
    return CFSAM(dims, width=dims[-1], **own), dims


def _se(dims: Sequence[int], _: Mapping[str, Any]) -> tuple[nn.Module, Sequence[int]]:
    return SqueezeExcitation(dims), dims


def _cfam(dims: Sequence[int], _: Mapping[str, Any]) -> tuple[nn.Module, Sequence[int]]:
    return ConcatExcitation(dims, dims[-1]), [dims[-1]] * len(dims)


def _mvit(dims: Sequence[int], _: Mapping[str, Any]) -> tuple[nn.Module, Sequence[int]]:
    return EachMap([MobileViTBlock(dim) for dim in dims]), dims


def _build(num_classes: int, numbers: Mapping[str, Any], *, neck: Neck) -> SSD:
    backbone = SSDBackbone(numbers["width"])
    module, dims = neck(backbone.dims, numbers)
    return SSD(backbone, module, dims, num_classes, numbers["box_sizes"])


def _build_backbone(numbers: Mapping[str, Any]) -> SSDBackbone:
    return SSDBackbone(numbers["width"])


def _detector(model: str, neck: Neck, settings: Mapping[str, Setting] | None = None) -> Variant:
    params, macs = _TABLE_4.get(model, (None, None))
    return Variant(
        system="SSD" if model == "ssd300" else "CFSAM",
        task="detection",
        settings={**_settings(), **(settings or {})},
        build=partial(_build, neck=neck),
        build_backbone=_build_backbone,
        objective=DETECTION,
        paper_classes=20,
        paper_input=(3, 300, 300),
        counting="products",
        paper_params=params,
        paper_macs=macs,
        source="Xie et al., table 4" if params else "Xie et al., tables 5 and 6",
        notes=_NOTES.get(model, ""),
    )


CFSAM_VARIANTS = {
    "ssd300": _detector("ssd300", _no_neck),
    **{model: _detector(model, _cfsam, settings) for model, settings in _CFSAM.items()},
    "ssd300_se": _detector("ssd300_se", _se),
    "ssd300_cfam": _detector("ssd300_cfam", _cfam),
    "ssd300_mvit": _detector("ssd300_mvit", _mvit),
}
