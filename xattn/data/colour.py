"""The photometric distortion of SSD (Liu et al. 2016), which SegFormer and its kin train with too.

mmsegmentation, which the segmentation papers use, rounds to uint8 after each change and turns hue
by whole steps of two degrees; here everything is float32, as in SSD's ports to PyTorch.
"""

import random

import torch
from torch import Tensor

from xattn.data.pixels import MAX_VALUE, coin

_BRIGHTNESS_SHIFT = 32.0
_CONTRAST_FACTORS = (0.5, 1.5)
_SATURATION_FACTORS = (0.5, 1.5)
_HUE_SHIFT_FRAC = 18 / 180  # of the full circle


def distort_colours(pixels: Tensor, rng: random.Random) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with probability 1/2 (SSD's recipe).

    Contrast comes before saturation and hue or after them, with equal chance.

    Args:
        pixels: (3, H, W) float32 RGB of values 0..255; overwritten.
        rng: the only source of chance.

    Returns:
        The same shape and range.
    """
    if coin(rng):
        pixels.add_(rng.uniform(-_BRIGHTNESS_SHIFT, _BRIGHTNESS_SHIFT)).clamp_(0, MAX_VALUE)
    contrast_first = coin(rng)
    contrast = rng.uniform(*_CONTRAST_FACTORS) if coin(rng) else 1.0
    if contrast_first and contrast != 1.0:
        pixels.mul_(contrast).clamp_(0, MAX_VALUE)
    if coin(rng):
        pixels = _scale_saturation(pixels, rng.uniform(*_SATURATION_FACTORS))
    if coin(rng):
        pixels = _turn_hue(pixels, rng.uniform(-_HUE_SHIFT_FRAC, _HUE_SHIFT_FRAC))
    if not contrast_first and contrast != 1.0:
        pixels.mul_(contrast).clamp_(0, MAX_VALUE)
    return pixels


def _scale_saturation(pixels: Tensor, factor: float) -> Tensor:
    """Multiply the S of HSV, at most to 1, in place.

    With V = max(r, g, b) and S = (V - min) / V, hue and V stay while every V - channel is
    multiplied by the same number: no conversion to HSV is needed.
    """
    value = pixels.amax(0)
    chroma = value - pixels.amin(0)
    most = value.div(chroma.clamp_(min=1e-6)).clamp_(max=factor)
    return pixels.sub_(value).mul_(most).add_(value)


def _turn_hue(pixels: Tensor, turn: float) -> Tensor:
    """Add `turn` circles to the H of HSV; 3 to 5 times as fast as `torchvision`'s adjust_hue.

    Masks are multiplied instead of `torch.where`, and the circle is closed by floor instead of
    remainder, since both are several times slower than plain arithmetic on the CPU.
    """
    red, green, blue = pixels
    value = pixels.amax(0)
    chroma = value - pixels.amin(0)
    is_red = (value == red).float()
    is_green = (value == green).float().mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    sextant = (green - blue).mul_(is_red)
    sextant.addcmul_(blue - red, is_green).addcmul_(red - green, is_blue)
    sextant.div_(chroma.clamp(min=1e-6)).add_(is_green, alpha=2).add_(is_blue, alpha=4)
    sextant.add_(6 * turn)
    sextant.sub_((sextant / 6).floor_(), alpha=6)
    # Each channel's share of the chroma is a trapezium over the six sextants.
    shares = torch.empty_like(pixels)
    torch.sub(sextant, 3, out=shares[0]).abs_().sub_(1)
    torch.sub(sextant, 2, out=shares[1]).abs_().neg_().add_(2)
    torch.sub(sextant, 4, out=shares[2]).abs_().neg_().add_(2)
    return shares.clamp_(0, 1).sub_(1).mul_(chroma).add_(value)
