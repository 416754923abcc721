"""MiT, SegFormer, Swin, UPerNet and HILA on them: every published variant with its numbers.

Reading the tables is reading the papers: `MIT` is table 6 of SegFormer (Xie et al. 2021), `_SWIN`
section 3.3 of Swin (Liu et al. 2021), `_HILA` what HILA (Leung et al. 2022) adds to their rows,
with what that paper reports of all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from torch import nn

from xattn.models.hila import ExchangeConfig, Hila, HilaMiT
from xattn.models.hila_swin import HilaSwin
from xattn.models.mit import MiT
from xattn.models.objectives import AUXILIARY_SEGMENTATION, CLASSIFICATION, SEGMENTATION
from xattn.models.pyramid import Classifier, Pyramid
from xattn.models.segformer import SegFormerHead, Segmenter
from xattn.models.swin import Swin
from xattn.models.upernet import FCNHead, UPerHead, WithAuxiliary
from xattn.models.variants import (
    Setting,
    Variant,
    count,
    flag,
    is_whole_list,
    name,
    number,
    rate,
    whole_numbers,
)
from xattn.nn.interlevel import BottomUpAttention, TopDownAttention
from xattn.structures import Task


@dataclass(frozen=True, slots=True)
class _MiTNumbers:
    """One row of SegFormer's table 6; arguments as in `mit.build_stages`."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...] = (1, 2, 5, 8)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratio: int = 4


_WIDE = (64, 128, 320, 512)
MIT = {
    "b0": _MiTNumbers(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "b1": _MiTNumbers(dims=_WIDE, depths=(2, 2, 2, 2)),
    "b2": _MiTNumbers(dims=_WIDE, depths=(3, 4, 6, 3)),
    "b3": _MiTNumbers(dims=_WIDE, depths=(3, 4, 18, 3)),
    "b4": _MiTNumbers(dims=_WIDE, depths=(3, 8, 27, 3)),
    "b5": _MiTNumbers(dims=_WIDE, depths=(3, 6, 40, 3)),
    "b2_short": _MiTNumbers(dims=_WIDE, depths=(2, 2, 6, 2)),  # HILA's "B2", its table 5
}


@dataclass(frozen=True, slots=True)
class _SwinNumbers:
    """One of Swin's variants; arguments as in `swin.build_stages`."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7
    mlp_ratio: int = 4


_SWIN = {"swin_t": _SwinNumbers((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24))}
_BASES: dict[str, _MiTNumbers | _SwinNumbers] = {**MIT, **_SWIN}

_HEAD_WIDTH = {"b0": 256, "b1": 256, "swin_t": 512}
"""Channels of the heads: SegFormer's from Xie et al. 2021, section 4.1, 768 from B2 on; UPerNet's
from mmsegmentation's configuration for Swin, as the next."""
_AUXILIARY_WIDTH = 256

_PRINTED = {
    "b0": (3.7e6, 8.4e9),
    "b1": (13.7e6, 15.9e9),
    "b2": (27.4e6, 62.4e9),
    "swin_t": (59.8e6, 235.7e9),
}
"""Parameters and multiply-adds (512 x 512) of the plain segmenters in HILA's table 1."""
_19_CLASSES = "the paper's parameters are those of 19 classes"


@dataclass(frozen=True, slots=True)
class _HilaNumbers:
    """One row of HILA's tables 5 and 1: backbone, exchanging stages, strides; what was printed."""

    base: str
    stages: tuple[int, ...]
    stride: int | tuple[int, ...]
    params: float
    macs: float
    note: str = ""
    ffn_ratio: int = 4


_HILA = {
    "b0_s3": _HilaNumbers("b0", (3,), 1, 4.2e6, 9.8e9),
    "b1_s3": _HilaNumbers(
        "b1", (3,), 1, 16.3e6, 20.9e9, "the paper's count is that of share='bu' (16,336,310)"
    ),
    "b1_s234": _HilaNumbers("b1", (2, 3, 4), 1, 21.6e6, 31.4e9),
    "b2_s234": _HilaNumbers(
        "b2_short", (2, 3, 4), (1, 3, 1), 30.8e6, 76.5e9,
        "depths 2, 2, 6, 2; the paper's parameters are those of 19 classes; its multiply-adds, and "
        "ours here, charge attention at every block of stage 3, where only every third exchanges",
    ),
    "swin_t_s234": _HilaNumbers(
        "swin_t", (2, 3, 4), (1, 2, 1), 68.5e6, 266.02e9,
        "norms of maps that refined ones take the place of are frozen; multiply-adds, the paper's "
        "and ours, charge attention at every block of stage 3, where every second exchanges",
        ffn_ratio=2,
    ),
}  # fmt: skip
_UNREAD_NORM = "the norm of the refined low map is frozen, since no gradient reaches it here"


def _exchange_settings(row: _HilaNumbers) -> dict[str, Setting]:
    published = ExchangeConfig(ffn_ratio=row.ffn_ratio)
    return {
        "stages": whole_numbers(row.stages, "a list of stage numbers"),
        "stride": Setting(
            row.stride,
            "a whole number or a list of them",
            lambda value: type(value) is int or is_whole_list(value),
        ),
        "patch": count(published.patch),
        "alpha": number(published.alpha),
        "beta": number(published.beta),
        "ffn_ratio": count(published.ffn_ratio),
        "share": Setting(
            published.share,
            "true, false or bu",
            lambda value: isinstance(value, bool) or value == "bu",
        ),
        "top_down": flag(published.top_down),
        "bottom_up": flag(published.bottom_up),
        "scale": name(published.scale),
        "border": name(published.border),
        "schedule": name(published.schedule),
    }


def _build_backbone(numbers: Mapping[str, Any], *, base: str, task: Task, hila: bool) -> Pyramid:
    row = _BASES[base]
    given = {**asdict(row), "drop_path": numbers["drop_path"]}
    kinds: tuple[type[Pyramid], type[Hila]] = MiT, HilaMiT
    if isinstance(row, _SwinNumbers):
        given["shifts_lone_window"] = task == "segmentation"
        kinds = Swin, HilaSwin
    if not hila:
        return kinds[0](**given)
    exchange = ExchangeConfig(
        **{field.name: numbers[field.name] for field in fields(ExchangeConfig)}
    )
    return kinds[1](**given, stages=numbers["stages"], stride=numbers["stride"], exchange=exchange)


def _build_classifier(
    num_classes: int, numbers: Mapping[str, Any], *, base: str, hila: bool
) -> nn.Module:
    backbone = _build_backbone(numbers, base=base, task="classification", hila=hila)
    return Classifier(backbone, num_classes)


def _build_segmenter(
    num_classes: int, numbers: Mapping[str, Any], *, base: str, hila: bool
) -> nn.Module:
    backbone = _build_backbone(numbers, base=base, task="segmentation", hila=hila)
    width, dropout = numbers["head_width"], numbers["dropout"]
    if base not in _SWIN:
        return Segmenter(backbone, SegFormerHead(backbone.dims, width, num_classes, dropout))
    auxiliary = FCNHead(backbone.dims[2], _AUXILIARY_WIDTH, num_classes, dropout, level=2)
    main = UPerHead(backbone.dims, width, num_classes, dropout)
    return Segmenter(backbone, WithAuxiliary(main, auxiliary))


def _beside_authors(model: nn.Module) -> str:
    """Return what the authors' code counts for the model, and why; nothing if it is the same."""
    vectors = sum(
        module.position_bias.numel()
        for module in model.modules()
        if isinstance(module, BottomUpAttention | TopDownAttention)
    )
    head = getattr(model, "head", None)
    idle = head.idle_params if isinstance(head, SegFormerHead) else 0
    reasons = []
    if idle:
        reasons.append(f"{idle:,} of a convolution that it never uses")
    if vectors:
        reasons.append(f"{vectors} of second position vectors, which only add to the first")
    total = sum(parameter.numel() for parameter in model.parameters()) + idle + vectors
    return f"the authors' code counts {total:,}, with {' and '.join(reasons)}" if reasons else ""


def _classifier(base: str, row: _HilaNumbers | None = None) -> Variant:
    """Return the backbone, with HILA where `row` is given, as a classifier."""
    is_swin = base in _SWIN
    settings = {"drop_path": rate(0.2 if is_swin else 0.1)}
    shared: dict[str, Any] = {"base": base, "hila": row is not None}
    plain = Variant(
        system="Swin" if is_swin else "SegFormer",
        task="classification",
        settings=settings,
        build=partial(_build_classifier, **shared),
        build_backbone=partial(_build_backbone, task="classification", **shared),
        objective=CLASSIFICATION,
        paper_classes=1000,
        paper_input=(3, 224, 224),
        paper_params=29e6 if is_swin else None,
        paper_macs=4.5e9 if is_swin else None,
        source="Liu et al. 2021, table 1" if is_swin else "Xie et al. 2021, table 6",
        beside_authors=_beside_authors,
    )
    if row is None:
        return plain
    return replace(
        plain,
        system="HILA",
        settings=settings | _exchange_settings(row),
        paper_params=None,
        paper_macs=None,
        source="Leung et al. 2022, table 5",
        notes="; ".join(filter(None, (row.note, _UNREAD_NORM))),
    )


def _segmenter(base: str, row: _HilaNumbers | None = None) -> Variant:
    """Return the segmenter on a backbone, with HILA where `row` is given."""
    is_swin = base in _SWIN
    params, macs = _PRINTED.get(base, (None, None))
    settings = {
        "drop_path": rate(0.3 if is_swin else 0.1),
        "dropout": rate(0.1),
        "head_width": count(_HEAD_WIDTH.get(base, 768)),
    }
    shared: dict[str, Any] = {"base": base, "hila": row is not None}
    plain = Variant(
        system="Swin" if is_swin else "SegFormer",
        task="segmentation",
        settings=settings,
        build=partial(_build_segmenter, **shared),
        build_backbone=partial(_build_backbone, task="segmentation", **shared),
        objective=AUXILIARY_SEGMENTATION if is_swin else SEGMENTATION,
        paper_classes=150,
        paper_input=(3, 512, 512),
        paper_params=params,
        paper_macs=macs,
        source="Leung et al. 2022, table 1" if params else "Xie et al. 2021, table 6",
        notes=_19_CLASSES if is_swin else "",
        beside_authors=_beside_authors,
    )
    if row is None:
        return plain
    return replace(
        plain,
        system="HILA",
        settings=settings | _exchange_settings(row),
        paper_params=row.params,
        paper_macs=row.macs,
        source="Leung et al. 2022, table 1",
        notes=row.note,
    )


_SIZES = ("b0", "b1", "b2", "b3", "b4", "b5")
HILA_VARIANTS = {
    **{f"mit_{size}": _classifier(size) for size in _SIZES},
    **{size: _classifier(size) for size in _SWIN},
    **{
        f"hila_{size if row.base in _SWIN else f'mit_{size}'}": _classifier(row.base, row)
        for size, row in _HILA.items()
    },
    **{f"segformer_{size}": _segmenter(size) for size in _SIZES},
    **{f"upernet_{size}": _segmenter(size) for size in _SWIN},
    **{
        f"hila_{'upernet' if row.base in _SWIN else 'segformer'}_{size}": _segmenter(row.base, row)
        for size, row in _HILA.items()
    },
}
