"""Pictures of hierarchical attention: a token's box, and its share in the cells around it.

Where attention is zero the photograph stays as it is, in grey; colour and cover grow with the
weight, so that the image is seen through it. Each map is coloured by its own largest value: the
finer the cells, the less one of them can hold. The box is the token's patch, where its first map
lives; with each further stage a map reaches a cell or two further.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from xattn.errors import DataError
from xattn.report.overlay import INK, PAPER, QUIET, Picture, font
from xattn.structures import AttentionMap, BoxXyxyPx, TokenAttention

_PANEL_PX = 320  # longer side of a panel
_SURROUNDINGS = 3.0  # sides of the box that a map's panel shows at least
_COLOURS = "inferno"
_DARKEST = 0.25  # of the colour map: below it, colours are nearly black
_COVER = (0.1, 0.65)  # of the image by the least and by the largest weight
_GREY = 0.75  # how much of the photograph's colours goes
_BOX_COLOUR = (255, 45, 45)
_GAP_PX = 10
_CAPTION_PX = 22
_LEAST_COLUMN_PX = 230  # a caption fits
_BAR_PX = (200, 12)


def read_attention(path: Path) -> TokenAttention:
    """Read what `evaluate` left.

    Raises:
        DataError: the file breaks its format.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return TokenAttention(
            point=_numbers(document["point"], 2),
            box=_numbers(document["box"], 4),
            maps=tuple(_read_map(entry) for entry in document["maps"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not an attention file ({type(error).__name__}: {error}); repeat `dvc repro`"
        ) from None


def _read_map(entry: Mapping[str, Any]) -> AttentionMap:
    values = np.asarray(entry["values"], np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("values are not rows of numbers of at least 0")
    rows = tuple(tuple(row) for row in values.tolist())
    return AttentionMap(tuple(map(int, entry["stages"])), _numbers(entry["box"], 4), rows)


def _numbers(values: Sequence[float], count: int) -> Any:
    if len(values) != count:
        raise ValueError(f"{len(values)} numbers instead of {count}")
    return tuple(map(float, values))


def draw_sheet(image: Picture, tokens: Sequence[TokenAttention]) -> Image.Image:
    """Draw a column a token and a row a stage: the image, then its maps, coarsest first.

    Args:
        image: (H, W, 3) uint8.
        tokens: of this image and one model, at least one.
    """
    columns = [[draw_token(image, token), *draw_maps(image, token)] for token in tokens]
    titles = ["image", *(level.title for level in tokens[0].maps)]
    gutter = 2 * _GAP_PX + math.ceil(max(font().getlength(title) for title in titles))
    width, height = columns[0][0].size
    row_px = height + _CAPTION_PX + _GAP_PX
    column_px = max(width, _LEAST_COLUMN_PX) + _GAP_PX
    right = gutter + max(len(tokens) * column_px, 2 * _BAR_PX[0])
    bottom = _GAP_PX + len(titles) * row_px
    sheet = Image.new("RGB", (right, bottom + _CAPTION_PX + _GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, title in enumerate(titles):
        top = _GAP_PX + row * row_px
        draw.text((_GAP_PX, top + height // 2), title, fill=INK, font=font(), anchor="lm")
        for column, (panels, token) in enumerate(zip(columns, tokens, strict=True)):
            left = gutter + column * column_px
            sheet.paste(panels[row], (left, top))
            about = describe(token.maps[row - 1]) if row else f"point {_point_words(token)}"
            draw.text((left, top + height + 4), about, fill=QUIET, font=font())
    draw_bar(sheet, gutter, bottom)
    return sheet


def draw_token(image: Picture, token: TokenAttention) -> Image.Image:
    """Draw the whole image with the token's box, the point and a frame around what maps show."""
    height, width = image.shape[:2]
    frame = (0.0, 0.0, float(width), float(height))
    panel = _cut(image, frame)
    draw = ImageDraw.Draw(panel)
    shown = _surroundings(image, token.box)
    if shown != frame:
        corners = [_place(frame, panel.size, corner) for corner in (shown[:2], shown[2:])]
        draw.rectangle((*corners[0], corners[1][0] - 1, corners[1][1] - 1), outline=PAPER)
    _draw_box(panel, frame, token.box)
    x, y = _place(frame, panel.size, token.point)
    draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_BOX_COLOUR, outline=PAPER)
    return panel


def draw_maps(image: Picture, token: TokenAttention) -> list[Image.Image]:
    """Draw each map over the part of the image around the token's box, coarsest map first."""
    frame = _surroundings(image, token.box)
    return [_draw_map(image, frame, level, token.box) for level in token.maps]


def describe(level: AttentionMap) -> str:
    """Say how many cells a map has and what the largest holds."""
    cells = len(level.values) * len(level.values[0])
    return f"largest of {cells} cells: {max(map(max, level.values)):.3g}"


def _point_words(token: TokenAttention) -> str:
    return ", ".join(f"{part:g}" for part in token.point)


def _surroundings(image: Picture, box: BoxXyxyPx) -> BoxXyxyPx:
    """Return a part of the image with the image's own proportions around a box."""
    height, width = image.shape[:2]
    left, top, right, bottom = box
    share = min(1.0, _SURROUNDINGS * max((right - left) / width, (bottom - top) / height))
    part = share * width, share * height
    x = min(max((left + right - part[0]) / 2, 0.0), width - part[0])
    y = min(max((top + bottom - part[1]) / 2, 0.0), height - part[1])
    return x, y, x + part[0], y + part[1]


def _cut(image: Picture, frame: BoxXyxyPx) -> Image.Image:
    """Return a part of the image with its longer side at _PANEL_PX."""
    left, top, right, bottom = frame
    factor = _PANEL_PX / max(right - left, bottom - top)
    size = max(1, round(factor * (right - left))), max(1, round(factor * (bottom - top)))
    resampling = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize(size, resampling, box=frame)


def _draw_map(image: Picture, frame: BoxXyxyPx, level: AttentionMap, box: BoxXyxyPx) -> Image.Image:
    panel = _cut(image, frame)
    panel = cover(panel, _spread(level, frame, panel.size))
    _draw_box(panel, frame, box)
    return panel


def cover(
    panel: Image.Image, share: NDArray[np.floating[Any]], least: float = _COVER[0]
) -> Image.Image:
    """Return a photograph in grey under the colours of (height, width) shares in [0, 1].

    Args:
        panel: the photograph.
        share: 0 leaves it as it is, in grey.
        least: how much of it the smallest share above 0 covers: with 0.1 the border of what has a
            share is seen, with 0 there is none.
    """
    grey = Image.blend(panel, panel.convert("L").convert("RGB"), _GREY)
    weight = np.where(share > 0, least + (_COVER[1] - least) * share, 0)[..., None]
    mixed = (1 - weight) * np.asarray(grey, np.float64) + weight * _coloured(share)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _spread(
    level: AttentionMap, frame: BoxXyxyPx, size: tuple[int, int]
) -> NDArray[np.floating[Any]]:
    """Return (height, width) of a panel: each pixel's weight over the map's largest one."""
    values = np.asarray(level.values, np.float32)
    largest = float(values.max())
    cells = Image.fromarray(values / largest if largest > 0 else values)
    (left, top, right, bottom), (frame_left, frame_top, frame_right, frame_bottom) = (
        level.box,
        frame,
    )
    # Cells per pixel of the image, pixels of the image per pixel of the panel.
    across, down = values.shape[1] / (right - left), values.shape[0] / (bottom - top)
    coarser = (frame_right - frame_left) / size[0], (frame_bottom - frame_top) / size[1]
    to_cells = (
        *(across * coarser[0], 0, across * (frame_left - left)),
        *(0, down * coarser[1], down * (frame_top - top)),
    )
    spread = cells.transform(size, Image.Transform.AFFINE, to_cells, Image.Resampling.BILINEAR)
    return np.asarray(spread, np.float64).clip(0, 1)


def _coloured(share: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return (..., 3) colours, 0..255, of shares in [0, 1]."""
    rgba = mpl.colormaps[_COLOURS](_DARKEST + (1 - _DARKEST) * share)
    colours: NDArray[np.floating[Any]] = 255 * np.asarray(rgba)[..., :3]
    return colours


def _place(
    frame: BoxXyxyPx, size: tuple[int, int], point: tuple[float, float]
) -> tuple[float, float]:
    """Return where a point of the image is in a panel that shows `frame`."""
    left, top, right, bottom = frame
    x = (point[0] - left) / (right - left) * size[0]
    return x, (point[1] - top) / (bottom - top) * size[1]


def _draw_box(panel: Image.Image, frame: BoxXyxyPx, box: BoxXyxyPx) -> None:
    left, top = _place(frame, panel.size, box[:2])
    right, bottom = _place(frame, panel.size, box[2:])
    width, height = panel.size
    edges = max(left, 0), max(top, 0), min(right, width) - 1, min(bottom, height) - 1
    draw = ImageDraw.Draw(panel)
    draw.rectangle(edges, outline=PAPER, width=3)
    draw.rectangle(tuple(edges), outline=_BOX_COLOUR, width=2)


def draw_bar(sheet: Image.Image, left: int, top: int) -> None:
    """Draw the scale of colours with its ends."""
    draw = ImageDraw.Draw(sheet)
    draw.text((left, top), "0", fill=QUIET, font=font())
    width, height = _BAR_PX
    ramp = np.repeat(_coloured(np.linspace(0, 1, width))[None], height, axis=0)
    sheet.paste(Image.fromarray(np.rint(ramp).astype(np.uint8)), (left + 14, top + 2))
    draw.text((left + 22 + width, top), "largest of the map", fill=QUIET, font=font())
