"""What a model's name stands for, and which of its numbers a caller may change."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xattn.errors import ConfigError, check_choice, nearest
from xattn.structures import Counting, Task


@dataclass(frozen=True, slots=True)
class Setting:
    """A number of a model or of its loss that a caller may change.

    Args:
        default: as published.
        expected: what may stand there, in words.
        fits: whether a value is that.
        choices: the names there are, where they are known here.
    """

    default: Any
    expected: str
    fits: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def rate(default: float) -> Setting:
    """Return a setting for a share that something happens with."""
    return Setting(
        default, "a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1
    )


def number(default: float) -> Setting:
    """Return a setting for any finite number."""
    return Setting(default, "a number", _is_number)


def count(default: int) -> Setting:
    """Return a setting for how many there are of something."""
    return Setting(default, "a whole number above 0", lambda value: _is_whole(value) and value > 0)


def flag(default: bool) -> Setting:
    """Return a setting for whether or not."""
    return Setting(default, "true or false", lambda value: isinstance(value, bool))


def name(default: str, *others: str) -> Setting:
    """Return a setting for one of these names; with one alone, whoever takes it knows the rest."""
    choices = (default, *others) if others else ()
    return Setting(default, "a name", lambda value: isinstance(value, str), choices)


def whole_numbers(default: tuple[int, ...], expected: str) -> Setting:
    """Return a setting for a list of whole numbers, of any length."""
    return Setting(default, expected, is_whole_list)


def is_whole_list(value: Any) -> bool:
    """Tell whether `value` is a list or tuple of whole numbers."""
    return isinstance(value, list | tuple) and all(_is_whole(item) for item in value)


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def override(
    section: str, owner: str, settings: Mapping[str, Setting], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return every number, the published ones with `overrides` put in.

    Args:
        section: what the overrides are called, for messages.
        owner: whose numbers they are, for messages.
        settings: every number there is.
        overrides: those to change.

    Raises:
        ConfigError: an override is unknown or of the wrong type; the message opens with the section
            and the key.
    """
    for key, value in overrides.items():
        if key not in settings:
            near = nearest(key, settings)
            hint = f"did you mean '{near}'?" if near else f"known: {', '.join(sorted(settings))}"
            raise ConfigError(f"{section}.{key}: {owner} has no such setting; {hint}")
        setting = settings[key]
        if not setting.fits(value):
            raise ConfigError(
                f"{section}.{key}: found {value!r}, expected {setting.expected}, "
                f"e.g. {setting.default!r}"
            )
        if setting.choices:
            check_choice(f"{section}.{key}", value, setting.choices)
    return {key: setting.default for key, setting in settings.items()} | dict(overrides)


@dataclass(frozen=True, slots=True)
class Objective:
    """How a model's outputs become a loss and a prediction.

    Args:
        loss: (outputs, target, mean_over_ranks, **numbers) -> named scalars, see
            `structures.Recipe`.
        decode: (outputs, (height, width)) -> prediction, likewise.
        settings: the loss's numbers.
    """

    loss: Callable[..., dict[str, Tensor]]
    decode: Callable[[Any, tuple[int, int]], Any]
    settings: Mapping[str, Setting]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What a name stands for.

    Args:
        system: the paper's system.
        task: what it is for.
        settings: the numbers that a caller may change.
        build: (num_classes, numbers) -> model with fresh weights; `numbers` has every setting.
        build_backbone: numbers -> the backbone alone; None where there is none to be had.
        objective: loss and decoding.
        paper_classes: classes of the paper's data set.
        paper_input: (C, H, W) at which the paper counts.
        counting: how it counts multiply-adds, see `evaluate.cost`.
        paper_params: parameters as printed, None where the paper does not say.
        paper_macs: likewise.
        source: where these were printed.
        notes: what a reader must know before comparing.
        beside_authors: model -> what the authors' code counts for it, and why; "" if the same.
    """

    system: str
    task: Task
    settings: Mapping[str, Setting]
    build: Callable[[int, Mapping[str, Any]], nn.Module]
    build_backbone: Callable[[Mapping[str, Any]], nn.Module] | None = None
    objective: Objective
    paper_classes: int
    paper_input: tuple[int, int, int]
    counting: Counting = "segformer"
    paper_params: float | None
    paper_macs: float | None
    source: str
    notes: str = ""
    beside_authors: Callable[[nn.Module], str] = lambda _model: ""
