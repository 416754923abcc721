"""Every published variant with its numbers, by name.

Reading the tables is reading the papers: `_MIT` is table 6 of SegFormer (Xie et al. 2021), `_SWIN`
section 3.3 of Swin (Liu et al. 2021), `_HILA` what HILA (Leung et al. 2022) adds to their rows,
with what that paper reports of all.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from xattn.errors import ConfigError, UnknownNameError, check_choice, nearest
from xattn.evaluate.cost import ShapesOnly, count_macs, count_params
from xattn.losses import classification_cross_entropy, segmentation_cross_entropy
from xattn.models.hila import ExchangeConfig, Hila, HilaMiT
from xattn.models.hila_swin import HilaSwin
from xattn.models.mit import MiT
from xattn.models.pyramid import Classifier, Pyramid
from xattn.models.segformer import SegFormerHead, Segmenter
from xattn.models.swin import Swin
from xattn.models.upernet import FCNHead, UPerHead, WithAuxiliary
from xattn.nn.interlevel import BottomUpAttention, TopDownAttention
from xattn.structures import DatasetInfo, MeanOverRanks, ModelCard, Recipe, Task


@dataclass(frozen=True, slots=True)
class _MiTNumbers:
    """One row of SegFormer's table 6; arguments as in `mit.build_stages`."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...] = (1, 2, 5, 8)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratio: int = 4


_WIDE = (64, 128, 320, 512)
_MIT = {
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
_BASES: dict[str, _MiTNumbers | _SwinNumbers] = {**_MIT, **_SWIN}

_HEAD_WIDTH = {"b0": 256, "b1": 256, "swin_t": 512}
"""Channels of the heads: SegFormer's from Xie et al. 2021, section 4.1, 768 from B2 on; UPerNet's
from mmsegmentation's configuration for Swin, as the next two."""
_AUXILIARY_WIDTH = 256
_AUXILIARY_WEIGHT = 0.4

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
_EXCHANGE = asdict(ExchangeConfig())
_SWIN_SOURCE = "Liu et al. 2021, table 1"
_UNREAD_NORM = "the norm of the refined low map is frozen, since no gradient reaches it here"


@dataclass(frozen=True, slots=True)
class _Variant:
    """What a name stands for.

    Args:
        system: the paper's system.
        task: what it is for.
        base: row of `_BASES`.
        defaults: the numbers that a caller may override, as published.
        paper_params: parameters as printed, None where the paper does not say.
        paper_macs: likewise.
        source: where these were printed.
        hila: whether the backbone exchanges between stages.
        notes: what a reader must know before comparing.
    """

    system: str
    task: Task
    base: str
    defaults: Mapping[str, Any]
    paper_params: float | None
    paper_macs: float | None
    source: str
    hila: bool = False
    notes: str = ""


def _plain(base: str, task: Task) -> _Variant:
    """Return the segmenter on a backbone, or the backbone as a classifier."""
    head = {"dropout": 0.1, "head_width": _HEAD_WIDTH.get(base, 768)}
    if task == "segmentation":
        params, macs = _PRINTED.get(base, (None, None))
        is_swin = base in _SWIN
        return _Variant(
            system="Swin" if is_swin else "SegFormer",
            task=task,
            base=base,
            defaults={"drop_path": 0.3 if is_swin else 0.1, **head},
            paper_params=params,
            paper_macs=macs,
            source="Leung et al. 2022, table 1" if params else "Xie et al. 2021, table 6",
            notes=_19_CLASSES if is_swin else "",
        )
    if base in _SWIN:
        return _Variant("Swin", task, base, {"drop_path": 0.2}, 29e6, 4.5e9, _SWIN_SOURCE)
    source = "Xie et al. 2021, table 6"
    return _Variant("SegFormer", task, base, {"drop_path": 0.1}, None, None, source)


def _with_hila(row: _HilaNumbers, task: Task) -> _Variant:
    """Return the same with HILA."""
    plain = _plain(row.base, task)
    classifies = task == "classification"
    exchange = {
        "stages": row.stages,
        "stride": row.stride,
        **_EXCHANGE,
        "ffn_ratio": row.ffn_ratio,
    }
    return replace(
        plain,
        system="HILA",
        defaults={**plain.defaults, **exchange},
        paper_params=None if classifies else row.params,
        paper_macs=None if classifies else row.macs,
        source=f"Leung et al. 2022, table {5 if classifies else 1}",
        hila=True,
        notes="; ".join(filter(None, (row.note, _UNREAD_NORM if classifies else ""))),
    )


_SIZES = ("b0", "b1", "b2", "b3", "b4", "b5")
_VARIANTS = {
    **{f"mit_{size}": _plain(size, "classification") for size in _SIZES},
    **{name: _plain(name, "classification") for name in _SWIN},
    **{
        f"hila_{name if row.base in _SWIN else f'mit_{name}'}": _with_hila(row, "classification")
        for name, row in _HILA.items()
    },
    **{f"segformer_{size}": _plain(size, "segmentation") for size in _SIZES},
    **{f"upernet_{name}": _plain(name, "segmentation") for name in _SWIN},
    **{
        f"hila_{'upernet' if row.base in _SWIN else 'segformer'}_{name}": _with_hila(
            row, "segmentation"
        )
        for name, row in _HILA.items()
    },
}

_PAPER_CLASSES: dict[Task, int] = {"classification": 1000, "segmentation": 150}
_PAPER_INPUT: dict[Task, tuple[int, int, int]] = {
    "classification": (3, 224, 224),
    "segmentation": (3, 512, 512),
}
# The ImageNet recipe smooths (PVT's, which SegFormer's authors point to); mmsegmentation 0.x, which
# trained the published segmenters, divides by all pixels.
_LOSS_DEFAULTS: dict[Task, dict[str, Any]] = {
    "classification": {"label_smoothing": 0.1},
    "segmentation": {"normalise": "all"},
}


def list_models(task: Task | None = None, system: str | None = None) -> list[str]:
    """Return the names of all models, or of those for one task or of one paper's system."""
    return [
        name
        for name, variant in _VARIANTS.items()
        if task in (None, variant.task) and system in (None, variant.system)
    ]


def create_model(name: str, *, num_classes: int, **overrides: Any) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: one of `list_models()`.
        num_classes: foreground classes.
        **overrides: numbers that differ from the published ones: drop_path; dropout and
            head_width for segmenters; stages, stride and the fields of `hila.ExchangeConfig` for
            HILA.

    Raises:
        UnknownNameError: there is no model `name`.
        ConfigError: `num_classes` is no count, or an override is unknown, of the wrong type or out
            of range.
    """
    if type(num_classes) is not int or num_classes < 1:
        raise ConfigError(f"num_classes: found {num_classes!r}, expected a whole number above 0")
    variant = _variant(name)
    numbers = _override("overrides", f"'{name}'", variant.defaults, overrides)
    with _named_overrides():
        return _build(variant, num_classes, numbers)


def create_backbone(name: str, **overrides: Any) -> Pyramid:
    """Build a model's backbone alone, with fresh weights and every level's norm to be trained.

    That of a classifier, whose head reads the last level only, has those of the others frozen.

    Args:
        name: one of `list_models()`.
        **overrides: as in `create_model`.

    Raises:
        UnknownNameError: there is no model `name`.
        ConfigError: see `create_model`.
    """
    variant = _variant(name)
    numbers = _override("overrides", f"'{name}'", variant.defaults, overrides)
    with _named_overrides():
        return _build_backbone(variant, numbers)


@contextmanager
def _named_overrides() -> Iterator[None]:
    """Say of a fault of numbers that do not go together that it is among the overrides."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"overrides.{error}") from None


def create_recipe(
    name: str, info: DatasetInfo, loss: Mapping[str, Any] | None = None, **overrides: Any
) -> Recipe:
    """Build a model for a data set, with its loss and its decoding.

    Args:
        name: one of `list_models()`.
        info: the data set; gives the number of classes.
        loss: numbers of the loss that differ from the papers': normalise ("all" or "valid" pixels)
            for segmentation, auxiliary_weight where there is an auxiliary head, label_smoothing for
            classification.
        **overrides: as in `create_model`.

    Raises:
        UnknownNameError: there is no model `name`.
        ConfigError: the data set cannot train this model's task, or a number is wrong; the message
            opens with "overrides" or "loss" and its key.
    """
    variant = _variant(name)
    if variant.task not in info.tasks:
        raise ConfigError(
            f"model: '{name}' is for {variant.task}, but data set '{info.name}' trains "
            f"{' and '.join(info.tasks)}; try one of {', '.join(list_models(info.tasks[0]))}"
        )
    what = f"the loss for {variant.task}"
    loss_defaults = dict(_LOSS_DEFAULTS[variant.task])
    if variant.task == "segmentation" and variant.base in _SWIN:
        loss_defaults["auxiliary_weight"] = _AUXILIARY_WEIGHT
    loss_numbers = _override("loss", what, loss_defaults, loss or {})
    model = create_model(name, num_classes=info.num_classes, **overrides)
    if variant.task == "classification":
        loss_function: Any = functools.partial(_classification_loss, **loss_numbers)
        return Recipe(model, loss_function, _decode_classification, variant.task)
    check_choice("loss.normalise", loss_numbers["normalise"], ("all", "valid"))
    loss_function = functools.partial(_segmentation_loss, **loss_numbers)
    return Recipe(model, loss_function, _decode_segmentation, variant.task)


@functools.cache
def model_card(name: str) -> ModelCard:
    """Return the model's numbers, counted at its paper's classes and input size.

    Raises:
        UnknownNameError: there is no model `name`.
    """
    variant = _variant(name)
    num_classes, input_size = _PAPER_CLASSES[variant.task], _PAPER_INPUT[variant.task]
    with ShapesOnly():
        model = _build(variant, num_classes, dict(variant.defaults))
    notes = [variant.notes, _beside_authors(model)]
    return ModelCard(
        name=name,
        system=variant.system,
        task=variant.task,
        num_classes=num_classes,
        input=input_size,
        params=count_params(model),
        macs=count_macs(model, input_size),
        paper_params=variant.paper_params,
        paper_macs=variant.paper_macs,
        source=variant.source,
        notes="; ".join(filter(None, notes)),
    )


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


def _variant(name: str) -> _Variant:
    if name not in _VARIANTS:
        raise UnknownNameError("model", name, _VARIANTS)
    return _VARIANTS[name]


def _build(variant: _Variant, num_classes: int, numbers: dict[str, Any]) -> nn.Module:
    """Build a model of complete, checked numbers."""
    backbone = _build_backbone(variant, numbers)
    if variant.task == "classification":
        return Classifier(backbone, num_classes)
    width, dropout = numbers["head_width"], numbers["dropout"]
    if variant.base not in _SWIN:
        head: nn.Module = SegFormerHead(backbone.dims, width, num_classes, dropout)
    else:
        auxiliary = FCNHead(backbone.dims[2], _AUXILIARY_WIDTH, num_classes, dropout, level=2)
        head = WithAuxiliary(UPerHead(backbone.dims, width, num_classes, dropout), auxiliary)
    return Segmenter(backbone, head)


def _build_backbone(variant: _Variant, numbers: dict[str, Any]) -> Pyramid:
    base = _BASES[variant.base]
    given = {**asdict(base), "drop_path": numbers["drop_path"]}
    kinds: tuple[type[Pyramid], type[Hila]] = MiT, HilaMiT
    if isinstance(base, _SwinNumbers):
        given["shifts_lone_window"] = variant.task == "segmentation"
        kinds = Swin, HilaSwin
    if not variant.hila:
        return kinds[0](**given)
    exchange = ExchangeConfig(**{key: numbers[key] for key in _EXCHANGE})
    return kinds[1](**given, stages=numbers["stages"], stride=numbers["stride"], exchange=exchange)


def _override(
    section: str, owner: str, defaults: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `defaults` with `overrides` put in.

    Args:
        section: what the overrides are called, for messages.
        owner: whose numbers they are, for messages.
        defaults: every number there is.
        overrides: those to change.

    Raises:
        ConfigError: see `create_model`.
    """
    for key, value in overrides.items():
        if key not in defaults:
            near = nearest(key, defaults)
            hint = f"did you mean '{near}'?" if near else f"known: {', '.join(sorted(defaults))}"
            raise ConfigError(f"{section}.{key}: {owner} has no such setting; {hint}")
        try:
            _check_type(key, value, defaults[key])
        except ConfigError as error:
            raise ConfigError(f"{section}.{error}") from None
    return {**defaults, **overrides}


_RATES = ("drop_path", "dropout", "label_smoothing")
_COUNTS = ("patch", "ffn_ratio", "head_width")


def _check_type(key: str, value: Any, default: Any) -> None:
    """Raise ConfigError unless `value` can stand where `default` stands."""
    number = type(value) in (int, float) and math.isfinite(value)
    if key in _RATES:
        fits, expected = number and 0 <= value < 1, "a number in [0, 1)"
    elif key in _COUNTS:
        fits, expected = type(value) is int and value > 0, "a whole number above 0"
    elif key == "share":
        fits, expected = (
            value in ("bu", True, False) and type(value) is not int,
            "true, false or bu",
        )
    elif isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif key == "stride":
        fits, expected = _is_whole(value) or type(value) is int, "a whole number or a list of them"
    elif key == "stages":
        fits, expected = _is_whole(value), "a list of stage numbers"
    elif isinstance(default, str):
        fits, expected = isinstance(value, str), "a name"
    else:
        fits, expected = number, "a number"
    if not fits:
        raise ConfigError(f"{key}: found {value!r}, expected {expected}, e.g. {default!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is int for item in value)


def _classification_loss(
    outputs: Tensor, target: Tensor, _mean_over_ranks: MeanOverRanks, *, label_smoothing: float
) -> dict[str, Tensor]:
    return classification_cross_entropy(outputs, target, label_smoothing)


def _segmentation_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    target: Tensor,
    mean_over_ranks: MeanOverRanks,
    *,
    normalise: Any,
    auxiliary_weight: float = 0.0,
) -> dict[str, Tensor]:
    """Return the cross entropy of the logits, or, of a pair, the first's and the second's sum."""
    if isinstance(outputs, Tensor):
        return segmentation_cross_entropy(outputs, target, normalise, mean_over_ranks)
    main, auxiliary = (
        segmentation_cross_entropy(logits, target, normalise, mean_over_ranks)["loss"]
        for logits in outputs
    )
    loss = main + auxiliary_weight * auxiliary
    return {"loss": loss, "loss_main": main, "loss_auxiliary": auxiliary}


def _decode_classification(outputs: Tensor, _size: tuple[int, int]) -> Tensor:
    return outputs


def _decode_segmentation(outputs: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(outputs, size, mode="bilinear", align_corners=False)
