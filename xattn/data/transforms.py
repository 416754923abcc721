"""How stored pixels become what a model takes: the training and evaluation recipes of the papers.

Images come in as (3, H, W) uint8 in RGB and leave as (3, h, w) float32, normalised by the ImageNet
mean and deviation; masks are (H, W) uint8 of ids 0..K-1 and IGNORE_INDEX. Randomness comes only
from the `random.Random` that is passed in (`rng_for` makes it from integers), so that a sample is
augmented alike in whatever process and order; no global generator is read or changed.

Segmentation follows the training pipeline of SegFormer (Xie et al. 2021, appendix; HILA uses the
same), with these differences: colours are changed in float32 without rounding in between, hue
turns by any angle instead of whole steps of two degrees, and the resize factor is not rounded to a
base of whole pixels. As there, images are resized bilinearly without antialiasing.
"""

import hashlib
import random
import struct
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor

from xattn.structures import IGNORE_INDEX

MEAN = (123.675, 116.28, 103.53)
"""Mean of red, green, blue on ImageNet, of values 0..255."""
STD = (58.395, 57.12, 57.375)
"""Their standard deviation."""

_MEAN = torch.tensor(MEAN).view(3, 1, 1)
_STD = torch.tensor(STD).view(3, 1, 1)
_MAX_VALUE = 255.0
_CROP_RETRIES = 10
_BRIGHTNESS_SHIFT = 32.0
_CONTRAST_FACTORS = (0.5, 1.5)
_SATURATION_FACTORS = (0.5, 1.5)
_HUE_SHIFT_FRAC = 18 / 180  # of the full circle
_ASPECT_RATIOS = (3 / 4, 4 / 3)  # width / height (Szegedy et al. 2015)
_AREA_TRIES = 10

Size = tuple[PositiveInt, PositiveInt]
"""(height, width) in pixels."""


def _check_ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"expected the lower end first, found {list(value)}")
    return value


_Ascending = AfterValidator(_check_ascending)
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Fraction = Annotated[float, Field(gt=0, le=1)]


def rng_for(seed: int, epoch: int, sample_id: int) -> random.Random:
    """Return the generator of one sample in one epoch: a function of three integers."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, sample_id), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


def normalise(image: Tensor) -> Tensor:
    """Return `image` (3, H, W) of values 0..255, any dtype, as normalised contiguous float32."""
    pixels = image.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return _normalise_in_place(pixels)


class SegmentationAugment(BaseModel):
    """Random scale, crop, flip and colours for training a segmentation model.

    Args:
        base: short and long side, in either order, of the box that the image is scaled into
            keeping its aspect ratio, px.
        ratio: range of a further random factor of that scale.
        crop: (height, width) of the result, px; smaller images are padded at the right and below.
        class_cap: a crop is drawn again, up to ten times, while one class covers more than this
            fraction of its valid pixels or it has fewer than two classes.
        flip: probability of a horizontal flip.
        photometric: whether to change brightness, contrast, saturation and hue.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Size
    ratio: Annotated[tuple[_Positive, _Positive], _Ascending] = (0.5, 2.0)
    crop: Size
    class_cap: float = Field(default=0.75, gt=0, le=1)
    flip: float = Field(default=0.5, ge=0, le=1)
    photometric: bool = True

    def __call__(self, image: Tensor, mask: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Return the augmented image (3, *crop) and mask (*crop)."""
        size = _fit(_size(image), self.base, rng.uniform(*self.ratio))
        image, mask = _resize(image, size), _resize_mask(mask, size)
        top, left = self._choose_crop(mask, rng)
        height, width = self.crop
        image = image[:, top : top + height, left : left + width]
        mask = mask[top : top + height, left : left + width]
        if rng.random() < self.flip:
            image, mask = image.flip(-1), mask.flip(-1)
        pixels = image.to(torch.float32, memory_format=torch.contiguous_format)
        if self.photometric:
            pixels = distort_colours(pixels, rng)
        return _pad(_normalise_in_place(pixels), mask, self.crop)

    def _choose_crop(self, mask: Tensor, rng: random.Random) -> tuple[int, int]:
        """Return (top, left), drawn again while the crop is too uniform; the last draw stands."""
        height, width = mask.shape
        rows, columns = self.crop
        for retry in range(_CROP_RETRIES + 1):
            top = _draw_below(max(height - rows, 0) + 1, rng)
            left = _draw_below(max(width - columns, 0) + 1, rng)
            window = mask[top : top + rows, left : left + columns]
            if retry == _CROP_RETRIES or self._is_varied(window):
                break
        return top, left

    def _is_varied(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask.reshape(-1), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        largest, valid = int(counts.max()), int(counts.sum())
        return largest < valid and largest <= self.class_cap * valid


class SegmentationEval(BaseModel):
    """Resize for scoring a segmentation model; the mask keeps the size in which it is stored.

    Args:
        size: (height, width) that every image is stretched to, px; None keeps the aspect ratio.
        base: with `size` None: short and long side, in either order, of the box that the image is
            scaled into; None keeps its size.
        multiple: with `size` None: both sides are then rounded up to a multiple of it, px.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size | None = None
    base: Size | None = None
    multiple: int = Field(default=32, ge=1)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised image and the untouched mask."""
        return self.prepare(image), mask

    def prepare(self, image: Tensor) -> Tensor:
        """Return the resized, normalised image alone."""
        return normalise(_resize(image, self.output_size(_size(image))))

    def output_size(self, size: Size) -> Size:
        """Return the (height, width) that an image of `size` gets, px."""
        if self.size is not None:
            return self.size
        if self.base is not None:
            size = _fit(size, self.base, 1.0)
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        return height, width


class ClassificationAugment(BaseModel):
    """Random part of the image (bicubic), flip and colours for training a classifier.

    Args:
        size: side of the square result, px.
        scale: range of the part's area, fraction of the image's.
        flip: probability of a horizontal flip.
        colour_jitter: brightness, contrast and saturation are multiplied, in this order, by factors
            from 1 - colour_jitter to 1 + colour_jitter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1)
    scale: Annotated[tuple[_Fraction, _Fraction], _Ascending] = (0.08, 1.0)
    flip: float = Field(default=0.5, ge=0, le=1)
    colour_jitter: float = Field(default=0.0, ge=0, le=1)

    def __call__(self, image: Tensor, rng: random.Random) -> Tensor:
        """Return the augmented image (3, size, size)."""
        top, left, height, width = self._choose_part(_size(image), rng)
        part = image[:, top : top + height, left : left + width]
        image = _resize(part, (self.size, self.size), "bicubic")
        if rng.random() < self.flip:
            image = image.flip(-1)
        if self.colour_jitter > 0:
            low, high = 1 - self.colour_jitter, 1 + self.colour_jitter
            for quality in ("brightness", "contrast", "saturation"):
                adjust = getattr(_functional(), f"adjust_{quality}")
                image = adjust(image, rng.uniform(low, high))
        return normalise(image)

    def _choose_part(self, size: Size, rng: random.Random) -> tuple[int, int, int, int]:
        """Return (top, left, height, width); the largest centred part if ten draws do not fit."""
        full_height, full_width = size
        low, high = _ASPECT_RATIOS
        for _ in range(_AREA_TRIES):
            area = full_height * full_width * rng.uniform(*self.scale)
            aspect = low * (high / low) ** rng.random()
            height, width = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
            if 0 < height <= full_height and 0 < width <= full_width:
                top = _draw_below(full_height - height + 1, rng)
                return top, _draw_below(full_width - width + 1, rng), height, width
        height = max(1, min(full_height, int(full_width / low)))
        width = max(1, min(full_width, int(full_height * high)))
        return (full_height - height) // 2, (full_width - width) // 2, height, width


class ClassificationEval(BaseModel):
    """Resize (bicubic) and centre crop for scoring a classifier.

    Args:
        size: side of the square result, px.
        resize: length that the short side is scaled to beforehand, px, at least `size`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1)
    resize: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_crop_fits(self) -> Self:
        if self.resize < self.size:
            raise ValueError(f"resize is {self.resize}, expected at least size, {self.size}")
        return self

    def __call__(self, image: Tensor) -> Tensor:
        """Return the normalised image (3, size, size)."""
        height, width = _size(image)
        scale = self.resize / min(height, width)
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        image = _resize(image, size, "bicubic")
        return normalise(_functional().center_crop(image, [self.size, self.size]))


def _functional() -> Any:
    """Return torchvision's functions, which take longer to import than torch itself.

    Who only reads the settings, as the driver of a training does, need not wait for them.
    """
    from torchvision.transforms.v2 import functional  # noqa: PLC0415

    return functional


def distort_colours(pixels: Tensor, rng: random.Random) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with probability 1/2 (SSD's recipe).

    Contrast comes before saturation and hue or after them, with equal chance.

    Args:
        pixels: (3, H, W) float32 RGB of values 0..255; overwritten.
        rng: the only source of chance.

    Returns:
        The same shape and range.
    """
    if _coin(rng):
        pixels.add_(rng.uniform(-_BRIGHTNESS_SHIFT, _BRIGHTNESS_SHIFT)).clamp_(0, _MAX_VALUE)
    contrast_first = _coin(rng)
    contrast = rng.uniform(*_CONTRAST_FACTORS) if _coin(rng) else 1.0
    if contrast_first and contrast != 1.0:
        pixels.mul_(contrast).clamp_(0, _MAX_VALUE)
    if _coin(rng):
        pixels = _scale_saturation(pixels, rng.uniform(*_SATURATION_FACTORS))
    if _coin(rng):
        pixels = _turn_hue(pixels, rng.uniform(-_HUE_SHIFT_FRAC, _HUE_SHIFT_FRAC))
    if not contrast_first and contrast != 1.0:
        pixels.mul_(contrast).clamp_(0, _MAX_VALUE)
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


def _normalise_in_place(pixels: Tensor) -> Tensor:
    return pixels.sub_(_MEAN).div_(_STD)


def _pad(pixels: Tensor, mask: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Fill up to `size` at the right and below: zeros (the mean colour) and IGNORE_INDEX."""
    height, width = _size(pixels)
    if (height, width) == size:
        return pixels, mask.contiguous()
    full, full_mask = pixels.new_zeros(3, *size), mask.new_full(size, IGNORE_INDEX)
    full[:, :height, :width] = pixels
    full_mask[:height, :width] = mask
    return full, full_mask


def _fit(size: Size, base: Size, ratio: float) -> Size:
    """Return `size` scaled by the largest factor that fits it into `base` x `ratio`."""
    factor = ratio * min(max(base) / max(size), min(base) / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def _resize(
    image: Tensor, size: Size, interpolation: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    # Bicubic is what classifiers were trained with in PIL, which always antialiases.
    antialias = interpolation == "bicubic"
    resized: Tensor = _functional().resize(image, list(size), interpolation, antialias=antialias)
    return resized


def _resize_mask(mask: Tensor, size: Size) -> Tensor:
    resized: Tensor = _functional().resize(mask[None], list(size), "nearest")
    return resized[0]


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _coin(rng: random.Random) -> bool:
    return rng.random() < 0.5


def _draw_below(end: int, rng: random.Random) -> int:
    """Return an integer in 0..end-1; unlike randrange's, this rule is fixed for every Python."""
    return int(rng.random() * end)
