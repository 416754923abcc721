"""The recipe that SSD trains with (Liu et al. 2016, section 2.2 and, for zooming out, 3.6).

Photometric distortion, zooming out on a canvas of the mean colour, a patch that overlaps an object
enough, flip, resize without keeping the aspect ratio. Numbers that the paper leaves open are those
of its code (caffe, ssd_pascal.py). Differences: the code also draws one of five interpolations to
resize by, here it is bilinear without antialiasing; the object that has to overlap the patch enough
is one whose centre lies in it, as in torchvision's RandomIoUCrop, so that a patch is never empty;
images are normalised by mean and deviation as everywhere here, the code subtracts a mean.

Boxes are (N, 4) float32, x1, y1, x2, y2 in pixels, edges at pixel borders.
"""

import random
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from xattn.data.colour import distort_colours
from xattn.data.pixels import (
    Ascending,
    Fraction,
    Positive,
    Probability,
    draw_below,
    mean_colour,
    normalise,
    normalise_in_place,
    resize,
    size_of,
    to_float,
)

_CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

_Window = tuple[int, int, int, int]
"""(x1, y1, x2, y2) in pixels of the image; may reach beyond it."""


class DetectionAugment(BaseModel):
    """Colours, zooming out, patch and flip for training a detector.

    Args:
        size: side of the square result, px.
        photometric: whether to change brightness, contrast, saturation and hue.
        swap_channels: probability of a random order of the channels (0 in SSD's code, 1/2 in its
            best known port to PyTorch).
        zoom_out: probability of laying the image on a larger canvas of the mean colour.
        max_zoom: most that both sides of the canvas are longer by, a factor.
        min_ious: IoU that a patch has at least with some object whose centre it holds; one of
            these, or the whole image instead, with equal chance.
        patch: range of each side of a patch, fraction of the image's.
        patch_aspect: range of a patch's width / height, px / px.
        tries: patches drawn before another of `min_ious` is.
        flip: probability of a horizontal flip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1)
    photometric: bool = True
    swap_channels: Probability = 0.0
    zoom_out: Probability = 0.5
    max_zoom: float = Field(default=4.0, ge=1, allow_inf_nan=False)
    min_ious: tuple[Probability, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    patch: Annotated[tuple[Fraction, Fraction], Ascending] = (0.3, 1.0)
    patch_aspect: Annotated[tuple[Positive, Positive], Ascending] = (0.5, 2.0)
    tries: int = Field(default=50, ge=1)
    flip: Probability = 0.5

    def __call__(
        self, image: Tensor, boxes: Tensor, rng: random.Random
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Augment one image.

        A box stays if its centre lies in the patch, and is clipped to it. Boxes are first clipped
        to the image; those without area go. An image without boxes is shown whole.

        Args:
            image: (3, H, W) uint8.
            boxes: (N, 4), of which N may be 0.
            rng: the only source of chance.

        Returns:
            The image (3, size, size), the boxes (M, 4) in its pixels, each with an area, and their
            M indices among those that came in, ascending.
        """
        height, width = size_of(image)
        boxes = _clip(boxes, (0, 0, width, height))
        kept = _has_area(boxes).nonzero()[:, 0]
        window = self._choose_patch(self._choose_canvas(height, width, rng), boxes[kept], rng)
        kept = kept[_is_centred_in(boxes[kept], torch.tensor([window]))[0]]
        pixels = resize(self._cut(image, window, rng), (self.size, self.size))
        boxes = self._to_result(_clip(boxes[kept], window), window)
        if rng.random() < self.flip:
            pixels = pixels.flip(-1)
            boxes[:, [0, 2]] = self.size - boxes[:, [2, 0]]
        has_area = _has_area(boxes)  # scaled down, the tiniest may have lost it
        return normalise_in_place(pixels.contiguous()), boxes[has_area], kept[has_area]

    def _choose_canvas(self, height: int, width: int, rng: random.Random) -> _Window:
        if rng.random() >= self.zoom_out:
            return 0, 0, width, height
        factor = rng.uniform(1, self.max_zoom)
        full_width, full_height = int(width * factor), int(height * factor)
        left = draw_below(full_width - width + 1, rng)
        top = draw_below(full_height - height + 1, rng)
        return -left, -top, full_width - left, full_height - top

    def _choose_patch(self, canvas: _Window, boxes: Tensor, rng: random.Random) -> _Window:
        while self.min_ious and len(boxes):
            choice = draw_below(len(self.min_ious) + 1, rng)
            if choice == len(self.min_ious):
                break
            patches = self._draw_patches(canvas, rng)
            overlaps = _is_centred_in(boxes, patches) & (
                _iou(patches, boxes) >= self.min_ious[choice]
            )
            good = patches[overlaps.any(1)]
            if len(good):
                left, top, right, bottom = good[0].tolist()
                return left, top, right, bottom
        return canvas

    def _draw_patches(self, canvas: _Window, rng: random.Random) -> Tensor:
        """Return those of `tries` windows (T, 4) int64 on the canvas that have a good shape."""
        left, top, right, bottom = canvas
        draws = [rng.random() for _ in range(4 * self.tries)]
        fractions, places = torch.tensor(draws, dtype=torch.float64).view(2, self.tries, 2)
        full = torch.tensor([right - left, bottom - top])
        low, high = self.patch
        sizes = (full * (low + (high - low) * fractions)).long().clamp_(min=1)
        corners = ((full - sizes + 1) * places).long() + torch.tensor([left, top])
        aspects = sizes[:, 0] / sizes[:, 1]
        fits = (aspects >= self.patch_aspect[0]) & (aspects <= self.patch_aspect[1])
        return torch.cat([corners, corners + sizes], 1)[fits]

    def _cut(self, image: Tensor, window: _Window, rng: random.Random) -> Tensor:
        """Return the window (3, h, w) float32 of 0..255, with the mean colour around the image.

        Colours change before the image is laid on the canvas, as in SSD's code; as they change each
        pixel by itself, only those in the window have to.
        """
        left, top, right, bottom = window
        height, width = size_of(image)
        rows = slice(max(top, 0), min(bottom, height))
        columns = slice(max(left, 0), min(right, width))
        pixels = to_float(image[:, rows, columns])
        if self.photometric:
            pixels = distort_colours(pixels, rng)
        if rng.random() < self.swap_channels:
            pixels = pixels[list(_CHANNEL_ORDERS[draw_below(len(_CHANNEL_ORDERS), rng)])]
        if size_of(pixels) == (bottom - top, right - left):
            return pixels
        full = mean_colour((bottom - top, right - left))
        full[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = (
            pixels
        )
        return full

    def _to_result(self, boxes: Tensor, window: _Window) -> Tensor:
        left, top, right, bottom = window
        corner = boxes.new_tensor([left, top, left, top])
        scale = boxes.new_tensor([self.size / (right - left), self.size / (bottom - top)])
        return (boxes - corner) * scale.repeat(2)


class DetectionEval(BaseModel):
    """Resize for scoring a detector.

    Args:
        size: side of the square that every image is stretched to, px.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1)

    def __call__(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised image (3, size, size) and the boxes (N, 4) in its pixels."""
        height, width = size_of(image)
        scale = boxes.new_tensor([self.size / width, self.size / height]).repeat(2)
        return self.prepare(image), boxes * scale

    def prepare(self, image: Tensor) -> Tensor:
        """Return the resized, normalised image alone."""
        return normalise(resize(image, (self.size, self.size)))


def _clip(boxes: Tensor, window: _Window) -> Tensor:
    """Return the parts of `boxes` (N, 4) in the window; outside of it they have no area."""
    low, high = boxes.new_tensor([*window[:2]] * 2), boxes.new_tensor([*window[2:]] * 2)
    return boxes.clamp(low, high)


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def _is_centred_in(boxes: Tensor, windows: Tensor) -> Tensor:
    """Return (T, N): whether the centre of a box (N, 4) lies inside a window (T, 4)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres > windows[:, None, :2]) & (centres < windows[:, None, 2:])).all(-1)


def _iou(windows: Tensor, boxes: Tensor) -> Tensor:
    """Return (T, N), the intersection over union of windows (T, 4) int64 and boxes (N, 4)."""
    # Imported by who augments, as in `pixels.functional`.
    from torchvision.ops import box_iou  # noqa: PLC0415

    overlap: Tensor = box_iou(windows.to(boxes.dtype), boxes)
    return overlap
