"""Every model by name, with its numbers; the tables are in `variants_*`, a file a paper."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from xattn.errors import ConfigError, UnknownNameError
from xattn.evaluate.cost import ShapesOnly, count_macs, count_params
from xattn.models.variants import Variant, override
from xattn.models.variants_cfsam import CFSAM_VARIANTS
from xattn.models.variants_cla import CLA_VARIANTS
from xattn.models.variants_hila import HILA_VARIANTS
from xattn.models.variants_scaseg import SCASEG_VARIANTS
from xattn.models.variants_segvit import SEGVIT_VARIANTS
from xattn.structures import DatasetInfo, ModelCard, Recipe, Task

_VARIANTS: dict[str, Variant] = {
    **HILA_VARIANTS,
    **CLA_VARIANTS,
    **SEGVIT_VARIANTS,
    **SCASEG_VARIANTS,
    **CFSAM_VARIANTS,
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
        **overrides: numbers that differ from the published ones, of the model's settings in its
            `variants_*` table: drop_path; dropout and head_width for segmenters; stages, stride and
            the fields of `hila.ExchangeConfig` for HILA.

    Raises:
        UnknownNameError: there is no model `name`.
        ConfigError: `num_classes` is no count, or an override is unknown, of the wrong type or out
            of range.
    """
    if type(num_classes) is not int or num_classes < 1:
        raise ConfigError(f"num_classes: found {num_classes!r}, expected a whole number above 0")
    variant = _variant(name)
    numbers = override("overrides", f"'{name}'", variant.settings, overrides)
    with _named_overrides():
        return variant.build(num_classes, numbers)


def create_backbone(name: str, **overrides: Any) -> nn.Module:
    """Build a model's backbone alone, with fresh weights and every level's norm to be trained.

    That of a classifier, whose head reads the last level only, has those of the others frozen.

    Args:
        name: one of `list_models()`.
        **overrides: as in `create_model`.

    Raises:
        UnknownNameError: there is no model `name`.
        ConfigError: see `create_model`; or there is no backbone to be had alone.
    """
    variant = _variant(name)
    if variant.build_backbone is None:
        raise ConfigError(f"model: '{name}' has no backbone that stands alone")
    numbers = override("overrides", f"'{name}'", variant.settings, overrides)
    with _named_overrides():
        return variant.build_backbone(numbers)


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
        loss: numbers of the loss that differ from the papers', see the model's `Objective`:
            normalise ("all" or "valid" pixels) for segmentation, auxiliary_weight where there is an
            auxiliary head, label_smoothing for classification, negatives for detection.
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
    objective = variant.objective
    what = f"the loss of '{name}'"
    loss_numbers = override("loss", what, objective.settings, loss or {})
    model = create_model(name, num_classes=info.num_classes, **overrides)
    return Recipe(
        model,
        functools.partial(objective.loss, **loss_numbers),
        objective.decode,
        variant.task,
        variant.counting,
    )


@functools.cache
def model_card(name: str) -> ModelCard:
    """Return the model's numbers, counted at its paper's classes and input size.

    Raises:
        UnknownNameError: there is no model `name`.
    """
    variant = _variant(name)
    numbers = override("overrides", f"'{name}'", variant.settings, {})
    with ShapesOnly():
        model = variant.build(variant.paper_classes, numbers)
    notes = [variant.notes, variant.beside_authors(model)]
    return ModelCard(
        name=name,
        system=variant.system,
        task=variant.task,
        num_classes=variant.paper_classes,
        input=variant.paper_input,
        params=count_params(model),
        macs=count_macs(model, variant.paper_input, counting=variant.counting),
        counting=variant.counting,
        paper_params=variant.paper_params,
        paper_macs=variant.paper_macs,
        source=variant.source,
        notes="; ".join(filter(None, notes)),
    )


def _variant(name: str) -> Variant:
    if name not in _VARIANTS:
        raise UnknownNameError("model", name, _VARIANTS)
    return _VARIANTS[name]
