"""How stored pixels become what a model takes: the training and evaluation recipes of the papers.

Images come in as (3, H, W) uint8 in RGB and leave as (3, h, w) float32, normalised by the ImageNet
mean and deviation; masks are (H, W) uint8 of ids 0..K-1 and IGNORE_INDEX. Randomness comes only
from the `random.Random` that is passed in (`rng_for` makes it from integers), so that a sample is
augmented alike in whatever process and order; no global generator is read or changed.

Segmentation follows the training pipeline of SegFormer (Xie et al. 2021, appendix; HILA, SegViT's
code and mmsegmentation 0.x have the same), with these differences: colours are changed in float32
without rounding in between, hue turns by any angle instead of whole steps of two degrees, the
resize factor is not rounded to a base of whole pixels, and a `class_cap` of 1 still draws a crop of
one class again. As there, images are resized bilinearly without antialiasing. SegViT-L normalises
by 127.5 and 127.5 instead of ImageNet's numbers, and so pads with a slightly other grey: a model
whose weights want that has it as an affine map of its input.

Classification follows timm's pipeline, with which HILA, PVT and DeiT pretrained: random part,
flip, RandAugment or colour jitter, normalising, random erasing. Mixing of images is in `mixing`.
"""

import hashlib
import math
import random
import struct
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from xattn.data.colour import distort_colours
from xattn.data.pixels import (
    Ascending,
    Fraction,
    Interpolation,
    Positive,
    Probability,
    Size,
    draw_below,
    functional,
    normalise,
    normalise_in_place,
    resize,
    size_of,
    to_float,
)
from xattn.data.rand_augment import RandAugment
from xattn.structures import IGNORE_INDEX

_CROP_RETRIES = 10
_TRIES = 10  # of a part's or an erased rectangle's shape, in timm and torchvision


def rng_for(*numbers: int) -> random.Random:
    """Return a generator that is a function of integers alone, of how many there are too.

    A sample's are (seed, epoch, sample id), those of what a whole batch shares (seed, step).
    """
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    digest = hashlib.blake2b(packed, digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


class SegmentationAugment(BaseModel):
    """Random scale, crop, flip and colours for training a segmentation model.

    Args:
        base: short and long side, in either order, of the box that the image is scaled into
            keeping its aspect ratio, px.
        ratio: range of a further random factor of that scale.
        crop: (height, width) of the result, px; smaller images are padded at the right and below.
        class_cap: a crop is drawn again, up to ten times, unless every class covers less than this
            fraction of its valid pixels.
        flip: probability of a horizontal flip.
        photometric: whether to change brightness, contrast, saturation and hue.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Size
    ratio: Annotated[tuple[Positive, Positive], Ascending] = (0.5, 2.0)
    crop: Size
    class_cap: float = Field(default=0.75, gt=0, le=1)
    flip: Probability = 0.5
    photometric: bool = True

    def __call__(self, image: Tensor, mask: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Return the augmented image (3, *crop) and mask (*crop)."""
        size = _fit(size_of(image), self.base, rng.uniform(*self.ratio))
        image, mask = resize(image, size), _resize_mask(mask, size)
        top, left = self._choose_crop(mask, rng)
        height, width = self.crop
        image = image[:, top : top + height, left : left + width]
        mask = mask[top : top + height, left : left + width]
        if rng.random() < self.flip:
            image, mask = image.flip(-1), mask.flip(-1)
        pixels = to_float(image)
        if self.photometric:
            pixels = distort_colours(pixels, rng)
        return _pad(normalise_in_place(pixels), mask, self.crop)

    def _choose_crop(self, mask: Tensor, rng: random.Random) -> tuple[int, int]:
        """Return (top, left), drawn again while the crop is too uniform; the last draw stands."""
        height, width = mask.shape
        rows, columns = self.crop
        for retry in range(_CROP_RETRIES + 1):
            top = draw_below(max(height - rows, 0) + 1, rng)
            left = draw_below(max(width - columns, 0) + 1, rng)
            window = mask[top : top + rows, left : left + columns]
            if retry == _CROP_RETRIES or self._is_varied(window):
                break
        return top, left

    def _is_varied(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask.reshape(-1), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        return int(counts.max()) < self.class_cap * int(counts.sum())


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

    def prepare(self, image: Tensor, ratio: float = 1.0) -> Tensor:
        """Return the image alone, resized for a `ratio` and normalised."""
        return normalise(resize(image, self.output_size(size_of(image), ratio)))

    def output_size(self, size: Size, ratio: float = 1.0) -> Size:
        """Return the (height, width) that an image of `size` gets, px.

        `ratio` multiplies `size`, or `base`, or else the image's own size, before any rounding.
        """
        if self.size is not None:
            return _fit(self.size, self.size, ratio)
        size = _fit(size, size if self.base is None else self.base, ratio)
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        return height, width


class RandomErasing(BaseModel):
    """Noise in a random rectangle (Zhong et al. 2017; timm's `pixel` mode, once an image).

    Args:
        probability: of erasing anything.
        area: range of the rectangle's area, fraction of the image's.
        aspect: range of its height / width, drawn evenly on a logarithmic scale.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    probability: Probability = 0.25
    area: Annotated[tuple[Fraction, Fraction], Ascending] = (0.02, 1 / 3)
    aspect: Annotated[tuple[Positive, Positive], Ascending] = (0.3, 1 / 0.3)

    def __call__(self, pixels: Tensor, rng: random.Random) -> Tensor:
        """Overwrite part of the normalised `pixels` (3, H, W) with standard normal numbers."""
        if rng.random() >= self.probability:
            return pixels
        full_height, full_width = size_of(pixels)
        low, high = (math.log(end) for end in self.aspect)
        for _ in range(_TRIES):
            area = full_height * full_width * rng.uniform(*self.area)
            aspect = math.exp(rng.uniform(low, high))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height < full_height and width < full_width:
                top = draw_below(full_height - height + 1, rng)
                left = draw_below(full_width - width + 1, rng)
                noise = torch.Generator().manual_seed(draw_below(2**53, rng))
                part = pixels[:, top : top + height, left : left + width]
                part.normal_(generator=noise)
                break
        return pixels


class ClassificationAugment(BaseModel):
    """Random part of the image, flip and colours for training a classifier.

    Args:
        size: side of the square result, px.
        scale: range of the part's area, fraction of the image's.
        aspect: range of its width / height, drawn evenly on a logarithmic scale; the default is
            that of Szegedy et al. 2015.
        interpolation: how the part is resized (antialiased, as by PIL) and RandAugment moves it.
        flip: probability of a horizontal flip.
        colour_jitter: brightness, contrast and saturation are multiplied, in this order, by factors
            from 1 - colour_jitter to 1 + colour_jitter.
        rand_augment: random operations instead of the colour jitter; None for none.
        random_erasing: noise in a rectangle of the normalised image; None for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1)
    scale: Annotated[tuple[Fraction, Fraction], Ascending] = (0.08, 1.0)
    aspect: Annotated[tuple[Positive, Positive], Ascending] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    flip: Probability = 0.5
    colour_jitter: float = Field(default=0.0, ge=0, le=1)
    rand_augment: RandAugment | None = None
    random_erasing: RandomErasing | None = None

    @model_validator(mode="after")
    def _check_colours(self) -> Self:
        # timm drops the jitter without a word, so papers list both and mean RandAugment.
        if self.rand_augment is not None and self.colour_jitter > 0:
            raise ValueError(
                f"colour_jitter is {self.colour_jitter}, expected 0 beside rand_augment"
            )
        return self

    def __call__(self, image: Tensor, rng: random.Random) -> Tensor:
        """Return the augmented image (3, size, size)."""
        top, left, height, width = self._choose_part(size_of(image), rng)
        part = image[:, top : top + height, left : left + width]
        image = resize(part, (self.size, self.size), self.interpolation, antialias=True)
        if rng.random() < self.flip:
            image = image.flip(-1)
        if self.rand_augment is not None:
            image = self.rand_augment(image, self.interpolation, rng)
        elif self.colour_jitter > 0:
            image = self._jitter(image, rng)
        pixels = normalise(image)
        return pixels if self.random_erasing is None else self.random_erasing(pixels, rng)

    def _jitter(self, image: Tensor, rng: random.Random) -> Tensor:
        low, high = 1 - self.colour_jitter, 1 + self.colour_jitter
        for quality in ("brightness", "contrast", "saturation"):
            adjust = getattr(functional(), f"adjust_{quality}")
            image = adjust(image, rng.uniform(low, high))
        return image

    def _choose_part(self, size: Size, rng: random.Random) -> tuple[int, int, int, int]:
        """Return (top, left, height, width); the largest centred part if ten draws do not fit."""
        full_height, full_width = size
        low, high = self.aspect
        for _ in range(_TRIES):
            area = full_height * full_width * rng.uniform(*self.scale)
            aspect = low * (high / low) ** rng.random()
            height, width = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
            if 0 < height <= full_height and 0 < width <= full_width:
                top = draw_below(full_height - height + 1, rng)
                return top, draw_below(full_width - width + 1, rng), height, width
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
        height, width = size_of(image)
        scale = self.resize / min(height, width)
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        image = resize(image, size, "bicubic", antialias=True)
        return normalise(functional().center_crop(image, [self.size, self.size]))


def _pad(pixels: Tensor, mask: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Fill up to `size` at the right and below: zeros (the mean colour) and IGNORE_INDEX."""
    height, width = size_of(pixels)
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


def _resize_mask(mask: Tensor, size: Size) -> Tensor:
    resized: Tensor = functional().resize(mask[None], list(size), "nearest")
    return resized[0]
