"""A sheet of class activation maps: the image with its boxes, a panel a level, and their mean.

Every panel follows one rule, for all models and methods: grey where the map is 0, and from violet
to yellow, covering more and more, up to the map's own largest value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from xattn.report.attention_maps import cover, draw_bar
from xattn.report.boxes import draw_boxes
from xattn.report.overlay import INK, PAPER, QUIET, Colour, Picture, font

_COLUMNS = 3
_PANEL_PX = 480  # width: tags of boxes fit
_HIGHEST_PX = 960  # of a panel; the image of a high one is narrower than it
_GAP_PX = 12
_LINE_PX = 20


@dataclass(frozen=True, slots=True)
class Detections:
    """What is drawn on the image; arguments as of `draw_boxes`."""

    boxes: NDArray[np.floating[Any]]
    labels: NDArray[np.integer[Any]]
    scores: NDArray[np.floating[Any]]
    class_names: Sequence[str]
    palette: Sequence[Colour]


def draw_cam_sheet(
    image: Picture,
    detections: Detections,
    maps: Sequence[tuple[str, NDArray[np.floating[Any]]]],
    caption: Sequence[str],
) -> Image.Image:
    """Draw the panels in rows of three.

    Args:
        image: (H, W, 3) uint8.
        detections: of this image.
        maps: (words, (H, W) in [0, 1]) of each panel.
        caption: lines above the panels.
    """
    scale = min(_PANEL_PX / image.shape[1], _HIGHEST_PX / image.shape[0])
    size = max(1, round(scale * image.shape[1])), max(1, round(scale * image.shape[0]))
    small = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    panels = [("image", _with_boxes(small, image, detections))]
    for words, values in maps:
        share = Image.fromarray(np.asarray(values, np.float32)).resize(
            size, Image.Resampling.BILINEAR
        )
        panels.append((words, cover(small, np.asarray(share, np.float64).clip(0, 1), least=0.0)))
    return _joined(panels, caption)


def _with_boxes(small: Image.Image, image: Picture, detections: Detections) -> Image.Image:
    factor = np.array([small.width / image.shape[1], small.height / image.shape[0]] * 2)
    panel = Image.new("RGB", (_PANEL_PX, small.height), PAPER)
    panel.paste(small)
    return draw_boxes(
        np.asarray(panel),
        detections.boxes * factor,
        detections.labels,
        detections.scores,
        detections.class_names,
        detections.palette,
    )


def _joined(panels: Sequence[tuple[str, Image.Image]], caption: Sequence[str]) -> Image.Image:
    """Put panels in rows under their words, below a caption and above the scale of colours."""
    rows = [panels[start : start + _COLUMNS] for start in range(0, len(panels), _COLUMNS)]
    heights = [max(panel.height for _, panel in row) + _LINE_PX + _GAP_PX for row in rows]
    top = _GAP_PX + len(caption) * _LINE_PX
    widest = max(math.ceil(font().getlength(line)) for line in caption)
    columns = min(_COLUMNS, len(panels)) * (_PANEL_PX + _GAP_PX)
    sheet = Image.new(
        "RGB",
        (_GAP_PX + max(columns, widest + _GAP_PX), top + sum(heights) + _LINE_PX + _GAP_PX),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(caption):
        draw.text((_GAP_PX, _GAP_PX + number * _LINE_PX), line, fill=INK, font=font())
    for row, height in zip(rows, heights, strict=True):
        for column, (words, panel) in enumerate(row):
            left = _GAP_PX + column * (_PANEL_PX + _GAP_PX)
            draw.text((left, top), words, fill=QUIET, font=font())
            sheet.paste(panel, (left, top + _LINE_PX))
        top += height
    draw_bar(sheet, _GAP_PX, top)
    return sheet
