"""Procedural scenes with exact masks: a small world that is hard for reasons of the real one.

What a thing is, is told by its shape (disk, ring, square, triangle, star, cross), by its texture
whatever the shape (striped, checkered), by its size (a dot is a disk of under 16 px), by its
posture (a pole is thin, upright and straight) or by its place (ground begins in the lower half and
reaches the lower border; the same textures above and behind it are background). Colour is a
hint and never an answer: things are vivid and backdrops muted, mostly, and each class has a usual
hue that it shares with another and often leaves. Slanted wires and empty outlines are vivid too and
background, as are shadows and textured backdrops. Things hide each other by order of painting.

Everything is painted by PIL in 8-bit integers, for speed and for equal bytes. Sizes are (width,
height); lengths are pixels; angles are radians; a region is an image of mode "L", 255 inside.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from xattn.data.datasets import _shapes
from xattn.data.datasets._shapes import Floats, Size

VERSION = 1
"""Raise it whenever the same seed gives other pixels."""

SHAPES = ("disk", "ring", "square", "triangle", "star", "cross")
TEXTURED = ("striped", "checkered")
THINGS = (*SHAPES, *TEXTURED, "pole", "dot")
STUFF = ("ground",)
NAMES = ("background", *THINGS, *STUFF)
PALETTE = (
    (70, 70, 70),
    (230, 60, 60),
    (250, 150, 40),
    (240, 220, 60),
    (60, 180, 75),
    (70, 220, 220),
    (50, 110, 230),
    (150, 60, 200),
    (240, 90, 200),
    (255, 255, 255),
    (170, 255, 120),
    (150, 110, 70),
)
"""Colours of `NAMES` in drawings of masks; chosen by us to be told apart."""

MIN_VISIBLE_PX = {"dot": 5, "pole": 12}
"""Things with fewer visible pixels get no box; 8 for all others. Their pixels stay in the mask."""
DIFFICULT_BELOW = 0.3
"""Visible part of a thing below which its box is marked as difficult."""

RAMP = np.arange(256)[:, None] / 255
NORMAL_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])
"""Turns a random byte into a normal number."""

HUES = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""Sixths of the colour circle: the strength, weak 0 to strong 2, of red, green and blue."""
USUAL_HUE = {name: HUES[i % len(HUES)] for i, name in enumerate(THINGS)}
USUAL_HUE_FRAC = 0.6
"""Share of vivid things in their usual hue: it leaves a guess by hue alone right 4 times in 10."""

Box = tuple[int, int, int, int]
Hue = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Thing:
    """One visible thing.

    Args:
        number: its value in `Scene.owners`.
        name: one of `THINGS`.
        box: x1, y1, x2, y2 of the visible part, at pixel edges.
        difficult: most of it is hidden.
    """

    number: int
    name: str
    box: Box
    difficult: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn scene.

    Args:
        image: RGB.
        mask: indices of `NAMES`, mode "L".
        owners: the number of the thing that a pixel belongs to, 0 for none; mode "L".
        things: those that are visible enough, in the order of painting.
    """

    image: Image.Image
    mask: Image.Image
    owners: Image.Image
    things: tuple[Thing, ...]


def draw_scene(
    rng: np.random.Generator, size: Size, noise: float, things: tuple[int, int] = (4, 9)
) -> Scene:
    """Draw one scene.

    Args:
        rng: the only source of chance.
        size: (width, height), at least 64 each.
        things: fewest and most things beside poles and dots, but for the scenes without any.
        noise: typical standard deviation of the pixel noise, in grey levels of 255.
    """
    canvas = _Canvas(rng, size)
    canvas.paint_backdrop()
    for name, radius in _choose_things(rng, min(size), things):
        canvas.paint_thing(name, radius)
    image = _photograph(rng, canvas.pixels, noise)
    return Scene(image, canvas.mask, canvas.owners, canvas.visible_things())


def _choose_things(
    rng: np.random.Generator, side: int, things: tuple[int, int]
) -> list[tuple[str, float]]:
    """Return (name, radius) in the order of painting: large ones mostly first, small ones last."""
    chosen: list[tuple[str, float]] = []
    only_small = rng.random() < 0.15
    if not only_small:
        for _ in range(rng.integers(things[0], things[1] + 1)):
            radius = 11.0 * (0.038 * side) ** rng.random()
            chosen.append((_pick(rng, *SHAPES, *TEXTURED), radius))
        chosen.sort(key=lambda thing: -thing[1] * rng.uniform(0.5, 1.5))
    poles = rng.integers(0, 5 if only_small else 3)
    dots = rng.integers(1, 7) if only_small else rng.integers(0, 5)
    small = [("pole", 0.0)] * int(poles) + [("dot", 0.0)] * int(dots)
    return chosen + [small[i] for i in rng.permutation(len(small))]


class _Canvas:
    """A scene in the making."""

    def __init__(self, rng: np.random.Generator, size: Size) -> None:
        self.rng = rng
        self.size = size
        self.pixels = Image.new("RGB", size)
        self.mask = Image.new("L", size)
        self.owners = Image.new("L", size)
        self.painted: list[tuple[str, int]] = []  # (name, area if nothing hid it)

    def paint_backdrop(self) -> None:
        """Paint background, ground and the distractors."""
        rng, size = self.rng, self.size
        self._fill(Image.new("L", size, 255), _backdrop_kind(rng), rng.uniform(10, 45))
        if rng.random() < 0.4:
            above = ImageChops.invert(
                _shapes.region_below_horizon(rng, size, rng.uniform(0.15, 0.4))
            )
            self._fill(above, _backdrop_kind(rng), rng.uniform(10, 45))
        if rng.random() < 0.6:
            ground = _shapes.region_below_horizon(rng, size, rng.uniform(0.55, 0.88))
            self._fill(ground, _backdrop_kind(rng), rng.uniform(10, 45))
            self.mask.paste(NAMES.index("ground"), mask=ground)
        for _ in range(rng.integers(0, 4)):
            distractor = (
                _shapes.outline_region(rng, size)
                if rng.random() < 0.5
                else _shapes.wire_region(rng, size)
            )
            self._fill(distractor, "plain", 15.0, hue=_any_hue(rng))

    def paint_thing(self, name: str, radius: float) -> None:
        """Paint one thing somewhere, over all that is there."""
        rng = self.rng
        radius = rng.uniform(2.5, 6.0) if name == "dot" else radius
        shape = _pick(rng, *SHAPES, "blob", "blob") if name in TEXTURED else name
        region = _shapes.shape_region(rng, shape, radius, self.size)
        box = region.getbbox()
        assert box is not None, "the centre of a thing is in the image"
        inside = region.crop(box)
        if radius > 8 and rng.random() < 0.4:
            self._cast_shadow(box, inside, max(2, round(radius * 0.2)))
        kind = {"striped": "stripes", "checkered": "checks"}.get(name, "")
        kind = kind or _pick(rng, "plain", "clouds", "grain")
        contrast = rng.uniform(45, 110) if name in TEXTURED else rng.uniform(5, 45)
        period = rng.uniform(0.22, 0.42) * max(radius, 12.0)
        hue = USUAL_HUE[name] if rng.random() < USUAL_HUE_FRAC else _any_hue(rng)
        self._fill(region, kind, contrast, hue if rng.random() < 0.85 else None, period)
        self.painted.append((name, inside.histogram()[255]))
        self.mask.paste(NAMES.index(name), box, inside)
        self.owners.paste(len(self.painted), box, inside)

    def visible_things(self) -> tuple[Thing, ...]:
        """Return what can still be seen of all that was painted."""
        numbers, visible = np.asarray(self.owners), self.owners.histogram()
        things = []
        for number, (name, area) in enumerate(self.painted, start=1):
            if visible[number] >= MIN_VISIBLE_PX.get(name, 8):
                box = Image.fromarray(numbers == number).getbbox()
                assert box is not None
                things.append(Thing(number, name, box, visible[number] < DIFFICULT_BELOW * area))
        return tuple(things)

    def _fill(
        self,
        region: Image.Image,
        kind: str,
        contrast: float,
        hue: Hue | None = None,
        period: float | None = None,
    ) -> None:
        """Paint a region with a texture between two colours, the first unlike what is there."""
        box = region.getbbox()
        if box is None:
            return
        inside = region.crop(box)
        histogram = np.reshape(self.pixels.crop(box).histogram(inside), (3, 256))
        beneath = histogram @ np.arange(256) / histogram[0].sum()
        first = _colour(self.rng, beneath, hue)
        second = first + contrast * _direction(self.rng)
        period = self.rng.uniform(9, 30) if period is None else max(period, 4.5)
        weight = _texture(self.rng, kind, inside.size, period)
        self.pixels.paste(_colorize(weight, first, second), box, inside)

    def _cast_shadow(self, box: Box, inside: Image.Image, shift: int) -> None:
        """Darken what lies to the lower right of a region: `inside` is its crop to `box`."""
        left, top, right, bottom = box
        moved = (left + shift, top + shift, right + shift, bottom + shift)
        strength = self.rng.uniform(0.2, 0.45)
        self.pixels.paste((0, 0, 0), moved, inside.point([int(strength * i) for i in range(256)]))


def _pick(rng: np.random.Generator, *names: str) -> str:
    return names[int(rng.integers(len(names)))]


def _backdrop_kind(rng: np.random.Generator) -> str:
    return _pick(rng, "clouds", "clouds", "grain", "soft stripes", "tiles")


def _colour(rng: np.random.Generator, beneath: Floats, hue: Hue | None) -> Floats:
    """Draw a colour, at least 40 grey levels away from `beneath` in some channel if 8 draws do.

    Args:
        rng: the source of chance.
        beneath: mean colour of what will be covered.
        hue: one of `HUES` for a strong colour of that kind, None for a tinted grey.
    """
    for _ in range(8):
        if hue:
            strengths = np.array([rng.uniform(20, 70), rng.uniform(70, 190), rng.uniform(190, 235)])
            colour = strengths[list(hue)]
        else:
            colour = rng.uniform(50, 210) + rng.uniform(-18, 18, 3)
        if np.abs(colour - beneath).max() >= 40:
            break
    return colour


def _any_hue(rng: np.random.Generator) -> Hue:
    return HUES[int(rng.integers(len(HUES)))]


def _direction(rng: np.random.Generator) -> Floats:
    """Draw a direction in colour space that changes the brightness more than the hue."""
    return (1.0 if rng.random() < 0.5 else -1.0) + rng.uniform(-0.4, 0.4, 3)


def _colorize(weight: Image.Image, first: Floats, second: Floats) -> Image.Image:
    """Map grey 0..255 linearly to the colours `first` .. `second`."""
    ramp = (first + RAMP * (second - first)).clip(0, 255).astype(np.uint8)
    indexed = Image.frombytes("P", weight.size, weight.tobytes())
    indexed.putpalette(ramp.tobytes())
    return indexed.convert("RGB")


def _texture(rng: np.random.Generator, kind: str, size: Size, period: float) -> Image.Image:
    """Draw a grey texture whose features are about `period` px wide."""
    if kind == "clouds":
        coarse = _smooth_noise(rng, size, period * 1.5)
        return Image.blend(coarse, _smooth_noise(rng, size, period * 0.4), 0.35)
    if kind == "grain":
        return _smooth_noise(rng, size, 2.0)
    along, across = _turned_axes(rng, size)
    if kind == "plain":
        return _grey((along - along.min()) / max(size))
    along = (along / np.float32(period) + np.float32(rng.random())) % 1
    across = (across / np.float32(period) + np.float32(rng.random())) % 1
    is_first = {"stripes": along < 0.5, "checks": (along < 0.5) ^ (across < 0.5)}
    is_first["tiles"] = np.minimum(along, across) < 0.12
    return _grey(np.abs(2 * along - 1) if kind == "soft stripes" else is_first[kind])


def _turned_axes(rng: np.random.Generator, size: Size) -> tuple[Floats, Floats]:
    """Return, for each pixel, its distances in px from two lines at right angles."""
    turn = rng.uniform(0, math.pi)
    cos, sin = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    x = np.arange(size[0], dtype=np.float32)[None, :]
    y = np.arange(size[1], dtype=np.float32)[:, None]
    return x * cos + y * sin, y * cos - x * sin


def _grey(weight: NDArray[Any]) -> Image.Image:
    """Return weights in [0, 1] as an image; larger ones are cut off."""
    return Image.fromarray((weight * np.float32(255)).clip(0, 255).astype(np.uint8))


def _smooth_noise(rng: np.random.Generator, size: Size, cell: float) -> Image.Image:
    """Draw grey noise whose features are about `cell` px wide."""
    grid = (math.ceil(size[1] / cell) + 2, math.ceil(size[0] / cell) + 2)
    coarse = Image.fromarray(rng.integers(0, 256, grid, dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BILINEAR)


def _photograph(rng: np.random.Generator, pixels: Image.Image, noise: float) -> Image.Image:
    """Light the scene unevenly, put it a little out of focus and add noise."""
    width, height = pixels.size
    darkest = rng.uniform(0.3, 0.85) * 255
    light = _smooth_noise(rng, pixels.size, max(pixels.size) / rng.uniform(1, 3))
    lit = ImageChops.multiply(pixels, _colorize(light, np.full(3, darkest), np.full(3, 255.0)))
    blurred = lit.filter(ImageFilter.BoxBlur(float(rng.uniform(0.3, 1.2))))
    strength = noise * rng.uniform(0.5, 1.5)
    levels = (128.5 + strength * NORMAL_QUANTILES).clip(0, 255).astype(int).tolist()
    grain = Image.frombytes("L", pixels.size, rng.bytes(width * height)).point(levels)
    return ImageChops.add(blurred, Image.merge("RGB", [grain] * 3), offset=-128)
