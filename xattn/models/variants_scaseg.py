"""SCASeg on MiT and on MSCAN: our reconstruction's variants, named by their backbones.

The paper's own variants and numbers (Xu et al., arXiv 2411.17061) could not be had; what is a fact
and what is inferred is told in `scaseg`. `_MSCAN` is table 2 of SegNeXt (Guo et al. 2022), `_WIDTH`
the head of U-MixFormer (Yeom and von Klitzing 2023), whose published rows the counting follows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from torch import nn

from xattn.models.mit import MiT
from xattn.models.mscan import Mscan
from xattn.models.objectives import SEGMENTATION
from xattn.models.pyramid import Pyramid
from xattn.models.scaseg import ScasegConfig, ScasegHead
from xattn.models.segformer import Segmenter
from xattn.models.variants import Setting, Variant, count, flag, name, rate, whole_numbers
from xattn.models.variants_hila import MIT


@dataclass(frozen=True, slots=True)
class _MscanNumbers:
    """One column of SegNeXt's table 2; arguments as in `mscan.Mscan`."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)


_MSCAN = {
    "t": _MscanNumbers(dims=(32, 64, 160, 256), depths=(3, 3, 5, 2)),
    "s": _MscanNumbers(dims=(64, 128, 320, 512), depths=(2, 2, 4, 2)),
    "b": _MscanNumbers(dims=(64, 128, 320, 512), depths=(3, 3, 12, 3)),
    "l": _MscanNumbers(dims=(64, 128, 320, 512), depths=(3, 5, 27, 3)),
}
_DROP_PATH = {"mscan_l": 0.3}  # of the backbone; SegNeXt's configurations, 0.1 elsewhere

_WIDTH = {f"mit_b{size}": 768 for size in range(2, 6)}
"""Channels before the classifier where they are not 128."""

_NOTES = (
    "reconstruction: the paper's text, tables and code could not be had; its parameters, GFLOPs "
    "and ablations would confirm or correct it; multiply-adds leave out the final enlargement"
)
_CONFIG = ScasegConfig()


def _settings(backbone: str) -> dict[str, Setting]:
    return {
        "drop_path": rate(_DROP_PATH.get(backbone, 0.1)),
        "dropout": rate(0.1),
        "head_width": count(_WIDTH.get(backbone, 128)),
        "heads": whole_numbers(_CONFIG.heads, "a list of whole numbers, one a level"),
        "scale": name(_CONFIG.scale),
        "local": name(_CONFIG.local),
        "gate": flag(_CONFIG.gate),
        "merge": name(_CONFIG.merge),
        "residual": name(_CONFIG.residual),
        "decoder_drop_path": rate(_CONFIG.drop_path),
    }


def _build_backbone(numbers: Mapping[str, Any], *, backbone: str) -> Pyramid:
    family, _, size = backbone.partition("_")
    if family == "mit":
        return MiT(**asdict(MIT[size]), drop_path=numbers["drop_path"])
    return Mscan(**asdict(_MSCAN[size]), drop_path=numbers["drop_path"])


def _build(num_classes: int, numbers: Mapping[str, Any], *, backbone: str) -> nn.Module:
    built = _build_backbone(numbers, backbone=backbone)
    given = {field.name: numbers[field.name] for field in fields(ScasegConfig)}
    given |= {"heads": tuple(numbers["heads"]), "drop_path": numbers["decoder_drop_path"]}
    width, dropout = numbers["head_width"], numbers["dropout"]
    head = ScasegHead(built.dims, width, num_classes, dropout, ScasegConfig(**given))
    return Segmenter(built, head)


def _segmenter(backbone: str) -> Variant:
    return Variant(
        system="SCASeg",
        task="segmentation",
        settings=_settings(backbone),
        build=partial(_build, backbone=backbone),
        build_backbone=partial(_build_backbone, backbone=backbone),
        objective=SEGMENTATION,
        paper_classes=150,
        paper_input=(3, 512, 512),
        paper_params=None,
        paper_macs=None,
        source="reconstruction of Xu et al. 2024, arXiv 2411.17061",
        notes=_NOTES,
        counting="fvcore",
    )


_BACKBONES = (*(f"mit_b{size}" for size in range(6)), *(f"mscan_{size}" for size in _MSCAN))
SCASEG_VARIANTS = {f"scaseg_{backbone}": _segmenter(backbone) for backbone in _BACKBONES}
