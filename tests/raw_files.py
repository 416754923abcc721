"""Raw files as a data set's owner would have them, and what a reader makes of them."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xattn.structures import Sample


def samples_of(reader: Any, root: Path, split: str, settings: Any) -> Iterator[Sample]:
    """Read a split as sharding does: all entries first, then one sample after the other."""
    info = reader.describe(root, settings)
    for entry in reader.entries(root, split, settings):
        yield reader.read(entry, info, settings)


def write_image(path: Path, size=(8, 6), mode="RGB", value=90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fill = value if mode in ("L", "P", "I;16") else (value,) * len(mode)
    Image.new(mode, size, fill).save(path)
    return path


def write_mask(path: Path, ids, mode="L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.asarray(ids, np.uint8)
    image = Image.frombytes(mode, ids.shape[::-1], ids.tobytes())
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
