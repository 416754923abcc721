"""RandAugment (Cubuk et al. 2019) as timm has it under the name "rand-m9-mstd0.5-inc1".

That is what DeiT, PVT and HILA pretrained with. Of 15 operations some are drawn with replacement,
each is done with probability 1/2, and its magnitude 0..10 is drawn from a normal distribution. More
magnitude always changes the image more ("inc1"). Names and ranges are facts of timm 1.0.31,
data/auto_augment.py. The tests compare each result with timm's on a PIL image: at most 1 of 255
apart, and some more for bicubic moves, since torch's kernel has the parameter -0.75, PIL's -0.5.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from xattn.data.pixels import (
    MAX_VALUE,
    MEAN,
    Interpolation,
    Probability,
    coin,
    draw_below,
    functional,
    size_of,
)

_MAX_MAGNITUDE = 10.0
_MAX_ROTATION_DEG = 30.0
_MAX_SHEAR = 0.3
_MAX_SHIFT_FRAC = 0.45
_MAX_ADDED = 110
_ADDED_BELOW = 128
_FILL = torch.tensor(MEAN).round().to(torch.uint8).view(3, 1, 1)

_Colour = Callable[[Any, Tensor, float], Any]
"""(torchvision's functions, image, strength from -1 to 1) -> image."""
_Matrix = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f), px: at (x, y) comes to stand what was at (ax + by + c, dx + ey + f)."""
_Move = Callable[[float, int, int], _Matrix]
"""(strength from -1 to 1, height, width) -> where pixels come from."""


class RandAugment(BaseModel):
    """Random operations on one image.

    Args:
        num_operations: how many are drawn.
        probability: that a drawn one is done.
        magnitude: mean of the magnitude of an operation, 0..10.
        magnitude_std: its standard deviation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_operations: int = Field(default=2, ge=1)
    probability: Probability = 0.5
    magnitude: float = Field(default=9.0, ge=0, le=_MAX_MAGNITUDE)
    magnitude_std: float = Field(default=0.5, ge=0, allow_inf_nan=False)

    def __call__(self, image: Tensor, interpolation: Interpolation, rng: random.Random) -> Tensor:
        """Return the changed image; `interpolation` is of the operations that move pixels."""
        for _ in range(self.num_operations):
            name = OPERATIONS[draw_below(len(OPERATIONS), rng)]
            if rng.random() < self.probability:
                magnitude = rng.gauss(self.magnitude, self.magnitude_std)
                strength = min(max(magnitude, 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE
                sign = 1 if coin(rng) else -1
                image = apply_operation(name, image, sign * strength, interpolation)
        return image


def apply_operation(
    name: str, image: Tensor, strength: float, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Do one operation.

    Args:
        name: one of `OPERATIONS`.
        image: (3, H, W) uint8.
        strength: a tenth of the magnitude, from -1 to 1; the sign is the direction of those
            operations that have one.
        interpolation: for the operations that move pixels.

    Returns:
        The same shape and dtype.
    """
    if name in _MOVES:
        return _move(image, _MOVES[name](strength, *size_of(image)), interpolation)
    changed: Tensor = _COLOURS[name](functional(), image, strength)
    return changed


def _move(image: Tensor, matrix: _Matrix, interpolation: Interpolation) -> Tensor:
    """Fetch each pixel from where `matrix` says; from outside of the image comes the mean colour.

    torchvision moves tensors bilinearly only, and blends their edges with the fill; PIL, hence
    timm, repeats the edge up to the border.
    """
    height, width = size_of(image)
    a, b, c, d, e, f = matrix
    # Of pixels to of fractions of half the sides, from the middle.
    b, d = b * height / width, d * width / height
    theta = image.new_tensor(
        [[a, b, a + b - 1 + 2 * c / width], [d, e, d + e - 1 + 2 * f / height]], dtype=torch.float32
    )
    grid = F.affine_grid(theta[None], [1, 3, height, width], align_corners=False)
    moved = F.grid_sample(
        image[None].float(), grid, interpolation, padding_mode="border", align_corners=False
    )[0]
    is_inside = ((grid[0] >= -1) & (grid[0] < 1)).all(-1)
    return torch.where(is_inside, moved.round_().clamp_(0, MAX_VALUE).to(torch.uint8), _FILL)


def _rotation(strength: float, height: int, width: int) -> _Matrix:
    """Turn about the middle, counter-clockwise for a positive strength."""
    angle = math.radians(_MAX_ROTATION_DEG * strength)
    cosine, sine = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return (
        *(cosine, -sine, x - cosine * x + sine * y),
        *(sine, cosine, y - sine * x - cosine * y),
    )


def _factor(strength: float) -> float:
    """Return 1 for no change, from 0.1 (grey, black or blurred) to 1.9."""
    return max(0.1, 1 + 0.9 * strength)


def _posterize(functions: Any, image: Tensor, strength: float) -> Any:
    """Keep 4 bits down to 1; timm goes down to none, a black image, which Pillow now refuses."""
    return functions.posterize(image, max(1, 4 - int(4 * abs(strength))))


def _solarize(functions: Any, image: Tensor, strength: float) -> Any:
    """Invert values from a threshold on, 256 (none) down to 0 (all)."""
    threshold = 256 - int(256 * abs(strength))
    return functions.solarize(image, threshold) if threshold <= MAX_VALUE else image


def _solarize_add(_: Any, image: Tensor, strength: float) -> Tensor:
    """Add up to 110 to values below 128."""
    return torch.where(image < _ADDED_BELOW, image + int(_MAX_ADDED * abs(strength)), image)


_COLOURS: dict[str, _Colour] = {
    "auto_contrast": lambda functions, image, _: functions.autocontrast(image),
    "equalize": lambda functions, image, _: functions.equalize(image),
    "invert": lambda functions, image, _: functions.invert(image),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "saturation": lambda functions, image, s: functions.adjust_saturation(image, _factor(s)),
    "contrast": lambda functions, image, s: functions.adjust_contrast(image, _factor(s)),
    "brightness": lambda functions, image, s: functions.adjust_brightness(image, _factor(s)),
    "sharpness": lambda functions, image, s: functions.adjust_sharpness(image, _factor(s)),
}
_MOVES: dict[str, _Move] = {
    "rotate": _rotation,
    "shear_x": lambda s, _, __: (1, _MAX_SHEAR * s, 0, 0, 1, 0),
    "shear_y": lambda s, _, __: (1, 0, 0, _MAX_SHEAR * s, 1, 0),
    "translate_x": lambda s, _, width: (1, 0, _MAX_SHIFT_FRAC * s * width, 0, 1, 0),
    "translate_y": lambda s, height, _: (1, 0, 0, 0, 1, _MAX_SHIFT_FRAC * s * height),
}
OPERATIONS = (*_COLOURS, *_MOVES)
