"""What every recipe does with pixels: normalise, resize, draw from the generator it was given."""

import random
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor

MEAN = (123.675, 116.28, 103.53)
"""Mean of red, green, blue on ImageNet, of values 0..255."""
STD = (58.395, 57.12, 57.375)
"""Their standard deviation."""
MAX_VALUE = 255.0

_MEAN = torch.tensor(MEAN).view(3, 1, 1)
_STD = torch.tensor(STD).view(3, 1, 1)

Interpolation = Literal["bilinear", "bicubic"]
Size = tuple[PositiveInt, PositiveInt]
"""(height, width) in pixels."""


def _check_ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"expected the lower end first, found {list(value)}")
    return value


Ascending = AfterValidator(_check_ascending)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


def functional() -> Any:
    """Return torchvision's functions, which take longer to import than torch itself.

    Who only reads the settings, as the driver of a training does, need not wait for them.
    """
    from torchvision.transforms.v2 import functional as functions  # noqa: PLC0415

    return functions


def normalise(image: Tensor) -> Tensor:
    """Return `image` (3, H, W) of values 0..255, any dtype, as normalised contiguous float32."""
    return normalise_in_place(to_float(image))


def normalise_in_place(pixels: Tensor) -> Tensor:
    """Return `pixels` (3, H, W) float32 of values 0..255, overwritten with normalised ones."""
    return pixels.sub_(_MEAN.to(pixels.device)).div_(_STD.to(pixels.device))


def to_float(image: Tensor) -> Tensor:
    """Return a contiguous float32 copy of the same values."""
    return image.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def mean_colour(size: Size) -> Tensor:
    """Return (3, *size) float32 of the mean colour: zeros, once normalised."""
    return _MEAN.expand(3, *size).clone()


def resize(
    image: Tensor, size: Size, interpolation: Interpolation = "bilinear", antialias: bool = False
) -> Tensor:
    """Return `image` (3, H, W) at `size`, in its dtype."""
    resized: Tensor = functional().resize(image, list(size), interpolation, antialias=antialias)
    return resized


def size_of(image: Tensor) -> Size:
    """Return (height, width)."""
    return image.shape[-2], image.shape[-1]


def coin(rng: random.Random) -> bool:
    """Return True half of the time."""
    return rng.random() < 0.5


def draw_below(end: int, rng: random.Random) -> int:
    """Return an integer in 0..end-1; unlike randrange's, this rule is fixed for every Python."""
    return int(rng.random() * end)
