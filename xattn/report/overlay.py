"""Pictures for people: a class mask over its image with a legend, or an image with its label.

The legend stands below the picture and never covers it. Small pictures are enlarged (the image
smoothly, the mask by repetition) until the legend's text has room.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from xattn.errors import DataError
from xattn.structures import IGNORE_INDEX

Colour = Sequence[int]
Picture = NDArray[np.uint8]

IGNORE_COLOUR = (224, 224, 224)
"""What `colourise` paints ignored pixels: lighter than the colours that classes usually have."""

_MIN_WIDTH_PX = 480  # two legend columns fit
_MAX_HEIGHT_PX = 4096  # that narrow pictures are enlarged to
_FONT_PX = 13
_LINE_PX = 22
_MARGIN_PX = 12
_SWATCH_PX = 12
_LONGEST_NAME_PX = 260  # about 36 letters
_SHARE_PX = 60
_BESIDE_NAME_PX = _SHARE_PX + 40  # swatch, percentage and the gaps
PAPER = (255, 255, 255)
INK = (28, 30, 33)
QUIET = (104, 110, 118)
_TRACK = (232, 234, 237)
BAR_COLOUR = (0, 104, 168)


def colourise(mask: NDArray[np.integer], palette: Sequence[Colour]) -> Picture:
    """Return the mask in its palette's colours.

    Args:
        mask: (H, W) class ids 0..K-1, or IGNORE_INDEX.
        palette: K colours (red, green, blue), 0..255.

    Returns:
        (H, W, 3) uint8; ignored pixels have IGNORE_COLOUR.

    Raises:
        DataError: the mask holds an id without a colour.
    """
    _check_ids(mask, len(palette), "colours")
    picture: Picture = colour_table(palette)[mask]
    return picture


def colour_table(palette: Sequence[Colour]) -> Picture:
    """Return (256, 3): the colour of each id that a mask may hold, IGNORE_COLOUR for the rest."""
    table = np.full((256, 3), IGNORE_COLOUR, np.uint8)
    colours = np.asarray(palette[:IGNORE_INDEX], np.uint8).reshape(-1, 3)
    table[: len(colours)] = colours
    return table


def areas(mask: NDArray[np.integer], num_classes: int) -> list[tuple[int, float]]:
    """Return (class id, fraction of all pixels) of the classes present, largest first.

    Ignored pixels count as area but are not listed, so the fractions add up to 1 or less.
    """
    _check_ids(mask, num_classes, "class names")
    counts = np.bincount(mask.ravel(), minlength=IGNORE_INDEX + 1)[:num_classes]
    present = [(int(i), float(counts[i] / mask.size)) for i in np.flatnonzero(counts)]
    return sorted(((i, part) for i, part in present if i != IGNORE_INDEX), key=lambda e: -e[1])


def draw_overlay(
    image: Picture,
    mask: NDArray[np.integer],
    class_names: Sequence[str],
    palette: Sequence[Colour],
    alpha: float = 0.5,
    legend: bool = True,
) -> Image.Image:
    """Blend a mask into its image, mark the borders between classes and add a legend below.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) class ids 0..K-1; pixels of IGNORE_INDEX keep the image's colour.
        class_names: K names.
        palette: K colours, 0..255.
        alpha: weight of the class colour, in [0, 1].
        legend: list the classes present with their share of the picture's pixels, largest first.

    Raises:
        DataError: image and mask differ in size, or the mask holds an unknown id.
    """
    if image.shape[:2] != mask.shape:
        raise DataError(
            f"the mask is {mask.shape[0]} x {mask.shape[1]} pixels, its image "
            f"{image.shape[0]} x {image.shape[1]}; resize the mask to the image"
        )
    factor = enlargement(image)
    big_mask = np.repeat(np.repeat(mask, factor, axis=0), factor, axis=1)
    picture = Image.fromarray(_blend(enlarge(image, factor), big_mask, palette, alpha))
    if not legend:
        return picture
    lines = [
        (class_names[i], f"{100 * part:.1f} %", tuple(palette[i]))
        for i, part in areas(mask, len(class_names))
    ]
    return with_legend(picture, lines)


def draw_label(image: Picture, labels: Sequence[tuple[str, float]]) -> Image.Image:
    """Put the most probable classes of a whole image below it, each with a bar.

    Args:
        image: (H, W, 3) uint8.
        labels: (class name, probability in [0, 1]), in the order to draw.
    """
    picture = Image.fromarray(enlarge(image, enlargement(image)))
    canvas = _extended(picture, len(labels) * _LINE_PX + 2 * _MARGIN_PX)
    width = canvas.width
    draw = ImageDraw.Draw(canvas)
    bar_left, bar_right = width // 2, width - _MARGIN_PX - 64
    for row, (name, probability) in enumerate(labels):
        top = picture.height + _MARGIN_PX + row * _LINE_PX
        text = shortened(name, bar_left - 2 * _MARGIN_PX)
        draw.text((_MARGIN_PX, top), text, fill=INK, font=font())
        filled = bar_left + round((bar_right - bar_left) * min(max(probability, 0.0), 1.0))
        draw.rectangle((bar_left, top + 4, bar_right, top + 13), fill=_TRACK)
        draw.rectangle((bar_left, top + 4, filled, top + 13), fill=BAR_COLOUR)
        share = f"{100 * probability:.1f} %"
        draw.text((width - _MARGIN_PX, top), share, fill=QUIET, font=font(), anchor="ra")
    return canvas


def _check_ids(mask: NDArray[np.integer], known: int, what: str) -> None:
    """Raise DataError when `mask` holds an id that is neither below `known` nor ignored."""
    unknown = (mask >= known) & (mask != IGNORE_INDEX)
    if unknown.any():
        raise DataError(
            f"the mask holds class id {int(mask[unknown][0])}, but there are only {known} {what} "
            f"(0..{known - 1}; {IGNORE_INDEX} = ignored)"
        )


def _blend(
    image: Picture, mask: NDArray[np.integer], palette: Sequence[Colour], alpha: float
) -> Picture:
    """Return `image` tinted by class, darker at the pixels where two classes meet."""
    weight = round(256 * alpha)  # integers: a third of the time that floats take
    tinted = image.astype(np.uint16) * (256 - weight) + colourise(mask, palette) * np.uint16(weight)
    blended = (tinted >> 8).astype(np.uint8)
    edge = np.zeros(mask.shape, bool)
    edge[:, :-1] |= mask[:, 1:] != mask[:, :-1]
    edge[:-1, :] |= mask[1:, :] != mask[:-1, :]
    blended[edge] //= 2
    ignored = mask == IGNORE_INDEX
    blended[ignored] = image[ignored]
    return blended


def enlargement(image: Picture) -> int:
    """Return the whole factor that makes a picture wide enough for its legend, if not too high."""
    height, width = map(int, image.shape[:2])
    return max(1, min(math.ceil(_MIN_WIDTH_PX / width), _MAX_HEIGHT_PX // height))


def enlarge(image: Picture, factor: int) -> Picture:
    """Return (H * factor, W * factor, 3), interpolated."""
    if factor == 1:
        return image
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _extended(picture: Image.Image, height: int) -> Image.Image:
    """Return the picture with `height` pixels of white paper below, wide enough for a legend."""
    width = max(picture.width, _MIN_WIDTH_PX)
    canvas = Image.new("RGB", (width, picture.height + height), PAPER)
    canvas.paste(picture)
    return canvas


def with_legend(
    picture: Image.Image, lines: Sequence[tuple[str, str, tuple[int, ...]]]
) -> Image.Image:
    """Add (name, share, colour) lines below, in columns that are read from top to bottom."""
    longest = max((font().getlength(name) for name, _, _ in lines), default=0)
    column = math.ceil(min(longest, _LONGEST_NAME_PX)) + _BESIDE_NAME_PX
    columns = max(1, (max(picture.width, _MIN_WIDTH_PX) - _MARGIN_PX) // column)
    rows = math.ceil(len(lines) / columns)
    canvas = _extended(picture, rows * _LINE_PX + 2 * _MARGIN_PX)
    draw = ImageDraw.Draw(canvas)
    pitch = min((canvas.width - _MARGIN_PX) // columns, column + 2 * _MARGIN_PX)
    for index, (name, share, colour) in enumerate(lines):
        left = _MARGIN_PX + index // rows * pitch
        top = picture.height + _MARGIN_PX + index % rows * _LINE_PX
        box = (left, top + 3, left + _SWATCH_PX, top + 3 + _SWATCH_PX)
        draw.rectangle(box, fill=colour, outline=QUIET)
        text_left, right = left + _SWATCH_PX + 8, left + pitch - _MARGIN_PX
        room = right - text_left - _SHARE_PX
        draw.text((text_left, top), shortened(name, room), fill=INK, font=font())
        draw.text((right, top), share, fill=QUIET, font=font(), anchor="ra")
    return canvas


@lru_cache(maxsize=1)
def font() -> ImageFont.FreeTypeFont:
    """Return the font that matplotlib carries: it is always there, and Pillow's has no accents."""
    path = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), _FONT_PX, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def shortened(text: str, room_px: int) -> str:
    """Return `text`, cut and ended by dots when it is wider than `room_px`."""
    if font().getlength(text) <= room_px:
        return text
    lengths, room = range(len(text)), float(room_px)
    fitting = bisect_right(lengths, room, key=lambda n: float(font().getlength(text[:n] + "...")))
    return text[: max(0, fitting - 1)].rstrip() + "..."
