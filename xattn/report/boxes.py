"""Pictures of boxes: each in its class's colour, with a tag, and a legend that counts them.

The best scores lie on top: boxes are drawn from the lowest score up, and their tags are placed from
the highest score down, each where it covers no other one. A tag without a place shrinks to its
score, then goes; colour and legend still say the class. So a crowd stays legible.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from xattn.errors import DataError
from xattn.report.overlay import (
    INK,
    PAPER,
    Colour,
    Picture,
    enlarge,
    enlargement,
    font,
    shortened,
    with_legend,
)

_LINE_PX = 2
_DASH_PX, _GAP_PX = 6, 5
_TAG_PX = 16  # height
_TAG_PAD_PX = 3
_LONGEST_NAME_PX = 160

_Rectangle = tuple[int, int, int, int]
"""Left, top, right, bottom; pixels, all inside."""


def draw_boxes(
    image: Picture,
    boxes: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    scores: NDArray[np.floating[Any]] | None,
    class_names: Sequence[str],
    palette: Sequence[Colour],
    *,
    faint: NDArray[np.bool_] | None = None,
    words: bool = True,
    line_px: int = _LINE_PX,
) -> Image.Image:
    """Draw boxes on their image and add a legend below: classes with the number of their boxes.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4) x1, y1, x2, y2 in pixels of the image; what lies outside is cut off.
        labels: (N,) class ids 0..K-1.
        scores: (N,) in [0, 1]; None for boxes that have none, such as true ones.
        class_names: K names.
        palette: K colours, 0..255.
        faint: (N,) boxes to draw dashed, such as difficult or crowd ones; None means none.
        words: whether there are tags and a legend; without boxes there is none.
        line_px: width of lines.

    Raises:
        DataError: an unknown class id, or arrays of different lengths.
    """
    _check(boxes, labels, scores, faint, min(len(class_names), len(palette)))
    factor = enlargement(image)
    picture = Image.fromarray(enlarge(image, factor))
    draw = ImageDraw.Draw(picture)
    edges = [_edges(box, factor, picture.size) for box in np.asarray(boxes, np.float64)]
    order = _from_back_to_front(edges, scores)
    for i in order:
        is_faint = faint is not None and bool(faint[i])
        _draw_box(draw, edges[i], tuple(palette[labels[i]]), line_px, is_faint)
    if not words or not edges:
        return picture
    taken: list[_Rectangle] = []
    for i in reversed(order):
        score = None if scores is None else f"{float(scores[i]):.2f}"
        name = shortened(class_names[labels[i]], _LONGEST_NAME_PX)
        texts = [name] if score is None else [f"{name} {score}", score]
        _draw_tag(draw, edges[i], texts, tuple(palette[labels[i]]), taken)
    counts = np.bincount(labels)
    present = sorted(np.flatnonzero(counts).tolist(), key=lambda i: -counts[i])
    lines = [(class_names[i], str(counts[i]), tuple(palette[i])) for i in present]
    return with_legend(picture, lines)


def _check(
    boxes: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    scores: NDArray[np.floating[Any]] | None,
    faint: NDArray[np.bool_] | None,
    known: int,
) -> None:
    """Raise DataError when the arrays do not fit each other or the classes."""
    if boxes.shape != (len(labels), 4):
        raise DataError(f"boxes: found {boxes.shape} for {len(labels)} labels, expected (N, 4)")
    for name, array in (("scores", scores), ("faint", faint)):
        if array is not None and len(array) != len(labels):
            raise DataError(f"{name}: found {len(array)} for {len(labels)} boxes")
    unknown = (labels < 0) | (labels >= known)
    if unknown.any():
        raise DataError(
            f"a box has class id {int(labels[unknown][0])}, but there are only {known} classes "
            f"(0..{known - 1})"
        )


def _edges(box: NDArray[np.float64], factor: int, size: tuple[int, int]) -> _Rectangle:
    """Return the pixels of the enlarged picture that a box's line runs on; at least one."""
    width, height = size
    left, top = (min(max(round(factor * v), 0), n - 1) for v, n in zip(box[:2], size, strict=True))
    right = min(max(round(factor * box[2]) - 1, left), width - 1)
    bottom = min(max(round(factor * box[3]) - 1, top), height - 1)
    return left, top, right, bottom


def _from_back_to_front(
    edges: Sequence[_Rectangle], scores: NDArray[np.floating[Any]] | None
) -> list[int]:
    """Return the order to draw in: ascending scores, else descending areas."""
    if scores is not None:
        ranks: list[int] = np.argsort(scores, kind="stable").tolist()
        return ranks
    return sorted(range(len(edges)), key=lambda i: -_area(edges[i]))


def _area(edges: _Rectangle) -> int:
    left, top, right, bottom = edges
    return (right - left + 1) * (bottom - top + 1)


def _draw_box(
    draw: ImageDraw.ImageDraw,
    edges: _Rectangle,
    colour: tuple[int, ...],
    line_px: int,
    is_faint: bool,
) -> None:
    left, top, right, bottom = edges
    if not is_faint:
        # A hair of the ink that the colour stands out from keeps the line apart from the image.
        around = (max(left - 1, 0), max(top - 1, 0), right + 1, bottom + 1)
        draw.rectangle(around, outline=ink_on(colour))
        draw.rectangle(edges, outline=colour, width=line_px)
        return
    last = line_px - 1
    for start, stop in _dashes(left, right):
        draw.rectangle((start, top, stop, min(top + last, bottom)), fill=colour)
        draw.rectangle((start, max(bottom - last, top), stop, bottom), fill=colour)
    for start, stop in _dashes(top, bottom):
        draw.rectangle((left, start, min(left + last, right), stop), fill=colour)
        draw.rectangle((max(right - last, left), start, right, stop), fill=colour)


def _dashes(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last + 1, _DASH_PX + _GAP_PX):
        yield start, min(start + _DASH_PX - 1, last)


def _draw_tag(
    draw: ImageDraw.ImageDraw,
    edges: _Rectangle,
    texts: Sequence[str],
    colour: tuple[int, ...],
    taken: list[_Rectangle],
) -> None:
    """Draw the first of `texts` that has a place, and note the place in `taken`."""
    for text in texts:
        width = round(font().getlength(text)) + 2 * _TAG_PAD_PX
        for place in _places(edges, width, draw.im.size):
            if not any(_overlap(place, other) for other in taken):
                taken.append(place)
                draw.rectangle(place, fill=colour)
                middle = (place[1] + place[3] + 1) // 2
                at = place[0] + _TAG_PAD_PX, middle
                draw.text(at, text, fill=ink_on(colour), font=font(), anchor="lm")
                return


def _places(edges: _Rectangle, width: int, size: tuple[int, int]) -> Iterator[_Rectangle]:
    """Yield where a tag may stand: on the box, in it, under it; at its left, then at its right."""
    left, top, right, bottom = edges
    for y in (top - _TAG_PX, top, bottom + 1 - _TAG_PX, bottom + 1):
        for x in (left, right + 1 - width):
            inside = min(max(x, 0), size[0] - width)
            if 0 <= y <= size[1] - _TAG_PX:
                yield inside, y, inside + width - 1, y + _TAG_PX - 1


def _overlap(one: _Rectangle, other: _Rectangle) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def ink_on(colour: Sequence[int]) -> tuple[int, int, int]:
    """Return the ink, dark or white, that has more contrast with a colour (WCAG 2, section 1.4.3).

    It is at least 4.1:1.
    """
    light = _luminance(colour) + 0.05
    return PAPER if (_luminance(PAPER) + 0.05) / light > light / (_luminance(INK) + 0.05) else INK


def _luminance(colour: Sequence[int]) -> float:
    channels = np.asarray(colour, np.float64) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
