"""Regions of the drawn scenes: images of mode "L", 255 inside.

Sizes are (width, height); lengths are pixels; angles are radians.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Size = tuple[int, int]
Points = list[tuple[float, float]]
Floats = NDArray[np.floating[Any]]


def region_below_horizon(rng: np.random.Generator, size: Size, level: float) -> Image.Image:
    """Return the region below a wavy horizon; `level` is where, 0 top .. 1 bottom."""
    width, height = size
    knots = np.linspace(0, width, int(rng.integers(3, 8)))
    waves = (
        level
        + rng.uniform(-0.08, 0.08, len(knots))
        + np.linspace(-0.5, 0.5, len(knots)) * rng.uniform(-0.2, 0.2)
    ) * height
    x = np.arange(0, width + 4, 4)
    line = list(zip(x.tolist(), np.interp(x, knots, waves).tolist(), strict=True))
    return _polygon_region(size, [*line, (width + 4, height), (0, height)])


def _polygon_region(size: Size, points: Points) -> Image.Image:
    region = Image.new("L", size)
    ImageDraw.Draw(region).polygon(points, fill=255)
    return region


def wire_region(rng: np.random.Generator, size: Size) -> Image.Image:
    """Return a thin line that is anything but upright."""
    angle = math.pi / 2 + rng.uniform(0.25, math.pi - 0.25)
    length = rng.uniform(0.3, 1.0) * min(size)
    x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
    end = (x + length * math.cos(angle), y + length * math.sin(angle))
    region = Image.new("L", size)
    ImageDraw.Draw(region).line([(x, y), end], fill=255, width=int(rng.integers(2, 5)))
    return region


def outline_region(rng: np.random.Generator, size: Size) -> Image.Image:
    """Return the thin outline of a polygon: there is nothing in it."""
    points = _corners(rng, str(rng.choice(["square", "triangle", "star"])), size, 0.2 * min(size))
    region = Image.new("L", size)
    ImageDraw.Draw(region).line([*points, points[0]], fill=255, width=int(rng.integers(1, 3)))
    return region


def _pole(rng: np.random.Generator, size: Size) -> Image.Image:
    """Return an upright bar, 2..4 px wide and a quarter to three quarters of the height long."""
    bar, length = int(rng.integers(2, 5)), int(rng.uniform(0.25, 0.75) * size[1])
    left = int(rng.integers(2, size[0] - bar - 2))
    top = int(rng.integers(0, size[1] - length // 2))
    region = Image.new("L", size)
    region.paste(255, (left, top, left + bar, top + length))
    return region


def shape_region(rng: np.random.Generator, name: str, radius: float, size: Size) -> Image.Image:
    """Return the region of a shape somewhere, turned and squeezed by chance."""
    if name == "pole":
        return _pole(rng, size)
    points = _corners(rng, name, size, radius)
    region = _polygon_region(size, points)
    if name == "ring":
        x, y = np.mean(points, axis=0)
        share = rng.uniform(0.45, 0.7)
        hole = [(x + share * (px - x), y + share * (py - y)) for px, py in points]
        ImageDraw.Draw(region).polygon(hole, fill=0)
    return region


def _corners(rng: np.random.Generator, name: str, size: Size, radius: float) -> Points:
    """Return the corners of a shape of about `radius` px whose centre is in the image."""
    radii, angles = _polar_corners(rng, name)
    centre_x, centre_y = rng.uniform(0.04, 0.96) * size[0], rng.uniform(0.06, 0.94) * size[1]
    angles = angles + rng.uniform(0, 2 * math.pi)
    x = centre_x + radius * radii * np.cos(angles)
    y = centre_y + radius * radii * np.sin(angles) * rng.uniform(0.85, 1.0)
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _polar_corners(rng: np.random.Generator, name: str) -> tuple[Floats, Floats]:
    """Return the radii, about 1, and the angles of a shape's corners."""
    circle = np.arange(40) * (2 * math.pi / 40)
    if name in ("disk", "ring", "dot"):
        return np.ones(40), circle
    if name == "blob":
        waves = [
            0.35 / k * rng.random() * np.cos(k * circle + rng.uniform(0, 6)) for k in (2, 3, 5)
        ]
        return 0.9 + np.sum(waves, axis=0), circle
    if name == "cross":
        arm = rng.uniform(0.2, 0.32)
        radii = np.tile([math.hypot(1, arm), math.hypot(1, arm), arm * math.sqrt(2)], 4)
        quarter = np.array([-math.atan(arm), math.atan(arm), math.pi / 4])
        return radii, np.concatenate([quarter + k * math.pi / 2 for k in range(4)])
    if name == "star":
        return np.tile([1.1, rng.uniform(0.42, 0.55)], 5), np.arange(10) * (math.pi / 5)
    sides = {"square": 4, "triangle": 3}[name]
    return np.full(sides, 1.15), np.arange(sides) * (2 * math.pi / sides)
