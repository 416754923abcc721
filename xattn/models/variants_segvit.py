"""SegViT: every published variant with its numbers.

`_VIT` is the backbones that Zhang et al. (2022) take from Dosovitskiy et al. (2021), with the taps
of table 5 (ViT-L's are the authors' code's); the rows below it are those of tables 1, 4, 6 and 8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from xattn.errors import ConfigError
from xattn.models.objectives import SEGMENTATION
from xattn.models.segformer import Segmenter
from xattn.models.segvit import (
    CascadeHead,
    MaskSegmenter,
    NaiveHead,
    NaiveShrunkHead,
    ShrunkHead,
)
from xattn.models.segvit_loss import MASKS
from xattn.models.swin import Swin
from xattn.models.variants import Setting, Variant, count, flag, name, rate, whole_numbers
from xattn.models.vit import ViT


@dataclass(frozen=True, slots=True)
class _ViTNumbers:
    """One of ViT's variants as SegViT uses it.

    Args:
        dim, depth, heads, taps, drop_path, pixels: see `vit.ViT`.
        crop: of ADE20K, px.
        shrink_after: blocks before QD.
        head_width: channels of SegViT's head: half the backbone's.
    """

    dim: int
    depth: int
    heads: int
    taps: tuple[int, ...]
    drop_path: float
    pixels: str
    crop: tuple[int, int]
    shrink_after: int
    head_width: int


_VIT = {
    "b": _ViTNumbers(768, 12, 12, (6, 8, 12), 0.1, "imagenet", (512, 512), 6, 384),
    "l": _ViTNumbers(1024, 24, 16, (8, 16, 24), 0.3, "half", (640, 640), 8, 512),
}
_NAIVE_WIDTH = 256  # channels of SETR's naive head

# Swin-T as in `variants_hila`; SegViT's table 6 gives no numbers but its cost, which fits four taps
# of 256 channels.
_SWIN_T = ((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24))  # channels, blocks, heads
_SWIN_HEAD_WIDTH = 256

_SOURCE = "Zhang et al. 2022, table {}"
_RESIZED_TWICE = "the paper's multiply-adds hold a second resize of the scores to the same size"


def _vit_settings(row: _ViTNumbers) -> dict[str, Setting]:
    """Return the settings of every ViT; what `ViT` wants of crop and taps it says itself."""
    other = "half" if row.pixels == "imagenet" else "imagenet"
    return {
        "dim": count(row.dim),
        "depth": count(row.depth),
        "heads": count(row.heads),
        "crop": whole_numbers(row.crop, "a list of height and width, px"),
        "drop_path": rate(row.drop_path),
        "pixels": name(row.pixels, other),
        "checkpoint": flag(False),
    }


def _head_settings(width: int) -> dict[str, Setting]:
    return {"head_width": count(width), "dropout": rate(0.1)}


def _vit(numbers: Mapping[str, Any]) -> ViT:
    """Build the backbone; without `taps` its maps are those of the Shrunk structure."""
    depth, heads, dim = (numbers[key] for key in ("depth", "heads", "dim"))
    if dim % heads:
        raise ConfigError(f"heads: found {heads}, expected a divisor of dim, {dim}")
    shrink_after = numbers.get("shrink_after")
    if shrink_after is not None and shrink_after >= depth:
        raise ConfigError(
            f"shrink_after: found {shrink_after}, expected fewer than the {depth} blocks"
        )
    return ViT(
        dim,
        depth,
        heads,
        numbers["crop"],
        numbers["taps"] if shrink_after is None else (shrink_after, depth),
        drop_path=numbers["drop_path"],
        shrink_after=shrink_after,
        sampling=numbers.get("sampling", "nearest"),
        pixels=numbers["pixels"],
        checkpoint=numbers["checkpoint"],
    )


def _swin(numbers: Mapping[str, Any]) -> Swin:
    return Swin(*_SWIN_T, drop_path=numbers["drop_path"])


def _of_cascade(num_classes: int, numbers: Mapping[str, Any]) -> nn.Module:
    backbone: ViT | Swin = _vit(numbers) if "crop" in numbers else _swin(numbers)
    head = CascadeHead(
        backbone.dims,
        numbers["head_width"],
        num_classes,
        numbers["dropout"],
        lateral=numbers.get("lateral", False),
    )
    return MaskSegmenter(backbone, head)


def _of_shrunk(num_classes: int, numbers: Mapping[str, Any]) -> nn.Module:
    backbone, width, dropout = _vit(numbers), numbers["head_width"], numbers["dropout"]
    head = ShrunkHead(backbone.dims, width, num_classes, dropout, numbers["crop"])
    return MaskSegmenter(backbone, head)


def _of_naive_shrunk(num_classes: int, numbers: Mapping[str, Any]) -> nn.Module:
    backbone, width, dropout = _vit(numbers), numbers["head_width"], numbers["dropout"]
    return MaskSegmenter(backbone, NaiveShrunkHead(backbone.dims, width, num_classes, dropout))


def _of_setr(num_classes: int, numbers: Mapping[str, Any]) -> nn.Module:
    backbone = _vit({**numbers, "taps": (numbers["depth"],)})
    return Segmenter(backbone, NaiveHead(backbone.dims[-1], numbers["head_width"], num_classes))


def _variant(
    size: str,
    build: Callable[[int, Mapping[str, Any]], nn.Module],
    paper_macs: float,
    table: int,
    **settings: Setting,
) -> Variant:
    """Return a SegViT on a ViT of a size with these settings beside the common ones."""
    row = _VIT[size]
    return Variant(
        system="SegViT",
        task="segmentation",
        settings={**_vit_settings(row), **settings, **_head_settings(row.head_width)},
        build=build,
        build_backbone=_vit,
        objective=MASKS,
        paper_classes=150,
        paper_input=(3, *row.crop),
        counting="fvcore",
        paper_params=None,
        paper_macs=paper_macs,
        source=_SOURCE.format(table),
        notes=_RESIZED_TWICE,
    )


def _cascade(size: str, paper_macs: float) -> Variant:
    taps = whole_numbers(_VIT[size].taps, "a list of block numbers")
    return _variant(size, _of_cascade, paper_macs, 1, taps=taps)


def _shrunk(size: str, paper_macs: float, table: int) -> Variant:
    return _variant(size, _of_shrunk, paper_macs, table, **_shrinking(_VIT[size].shrink_after))


def _shrinking(after: int) -> dict[str, Setting]:
    return {
        "shrink_after": count(after),
        "sampling": name("nearest", "conv", "nearest_qkv"),
    }


_SETR = Variant(
    system="SETR",
    task="segmentation",
    settings={**_vit_settings(_VIT["b"]), "head_width": count(_NAIVE_WIDTH)},
    build=_of_setr,
    build_backbone=lambda numbers: _vit({**numbers, "taps": (numbers["depth"],)}),
    objective=SEGMENTATION,
    paper_classes=150,
    paper_input=(3, 512, 512),
    counting="fvcore",
    paper_params=None,
    paper_macs=107.3e9,
    source=_SOURCE.format(8),
    notes="the paper's multiply-adds hold the resize of the logits to the image's size",
)
_ON_SWIN_T = Variant(
    system="SegViT",
    task="segmentation",
    settings={
        "drop_path": rate(0.3),
        "lateral": flag(False),
        **_head_settings(_SWIN_HEAD_WIDTH),
    },
    build=_of_cascade,
    build_backbone=_swin,
    objective=MASKS,
    paper_classes=150,
    paper_input=(3, 512, 512),
    counting="fvcore",
    paper_params=None,
    paper_macs=48.0e9,
    source=_SOURCE.format(6),
    notes=f"taps, width and drop path are ours: the paper gives its cost alone; {_RESIZED_TWICE}",
)

SEGVIT_VARIANTS = {
    "segvit_b": _cascade("b", 120.9e9),
    "segvit_l": _cascade("l", 637.9e9),
    "segvit_shrunk_b": _shrunk("b", 97.1e9, 8),
    "segvit_shrunk_l": _shrunk("l", 373.5e9, 1),
    "segvit_naive_shrunk_b": _variant(
        "b", _of_naive_shrunk, 74.1e9, 8, **_shrinking(_VIT["b"].shrink_after)
    ),
    "segvit_swin_t": _ON_SWIN_T,
    "setr_naive_b": _SETR,
}
