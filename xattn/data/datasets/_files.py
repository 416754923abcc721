"""Raw list, image and mask files: decoded in full, refused with one line that names the file.

The bytes of a file are kept wherever every decoder will read them alike. Masks are single-channel
8-bit PNG files whose pixel values are class ids; sizes are (width, height) in pixels, as in PIL.
"""

import io
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from xattn.errors import DataError, UnknownNameError
from xattn.structures import DatasetInfo, Sample

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
"""What PIL raises for broken files."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample of a raw data set before any of its files is opened; small, and may be pickled.

    Args:
        key: unique in its split, without dots or slashes.
        image: path of the raw image file; a string, since there may be millions.
        target: what its reader needs beside: a path, a label, boxes.
    """

    key: str
    image: str
    target: Any = None


@dataclass(frozen=True, slots=True)
class RawImage:
    """An encoded image that is known to decode.

    Args:
        data: the bytes of a grey or RGB 8-bit JPEG or PNG file.
        format: which of the two.
        size: (width, height) in pixels.
    """

    data: bytes
    format: Literal["jpg", "png"]
    size: tuple[int, int]


def read_image(path: Path) -> RawImage:
    """Read an image file and prove that it decodes.

    The bytes stay as they are when they hold a plain 8-bit grey or RGB JPEG or PNG. Everything else
    (palette, transparent, CMYK, 16-bit, one-bit, other containers) is written anew as an RGB PNG:
    16-bit values keep their high byte and transparency is dropped. EXIF orientation is not applied,
    because boxes and masks are drawn on the stored pixels.

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    data, image = _decode(path, "image")
    if image.mode in ("L", "RGB") and image.format == "JPEG":
        return RawImage(data, "jpg", image.size)
    if image.mode in ("L", "RGB") and image.format == "PNG" and _png_depth(data) == 8:
        return RawImage(data, "png", image.size)
    if image.mode.startswith("I"):
        high_byte = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(high_byte.astype(np.uint8))
    return RawImage(_encode_png(image.convert("RGB")), "png", image.size)


def read_mask(
    path: Path, size: tuple[int, int], num_classes: int, ignore_ids: Collection[int]
) -> bytes:
    """Read a mask of class ids.

    The bytes of an 8-bit grey PNG are kept; a palette PNG is written anew with its indices as grey.

    Args:
        path: a PNG file.
        size: (width, height) in pixels of the image that it belongs to.
        num_classes: ids 0..num_classes - 1 are allowed.
        ignore_ids: ids allowed besides.

    Raises:
        DataError: the file is missing, damaged, of another kind or size, or holds an unknown id.
    """
    data, image = _decode(path, "mask")
    is_grey = image.mode == "L" and image.format == "PNG" and _png_depth(data) == 8
    if not is_grey and not (image.mode == "P" and image.format == "PNG"):
        raise DataError(
            f"mask {path}: found {image.format} of mode {image.mode}, expected a PNG of 8-bit grey"
            " or palette indices that are class ids; convert it"
        )
    if image.size != size:
        raise DataError(
            f"mask {path}: {image.size[0]} x {image.size[1]} pixels (width x height), but its image"
            f" has {size[0]} x {size[1]}"
        )
    ids = np.asarray(image)
    counts = np.bincount(ids.reshape(-1), minlength=256)
    unknown = [i for i in np.flatnonzero(counts) if i >= num_classes and i not in ignore_ids]
    if unknown:
        others = f" (and {len(unknown) - 1} more ids)" if len(unknown) > 1 else ""
        besides = "".join(f" or {i}" for i in sorted(ignore_ids))
        raise DataError(
            f"mask {path}: unknown class id {unknown[0]} in {counts[unknown[0]]} pixels{others};"
            f" allowed: 0..{num_classes - 1}{besides}"
        )
    return data if is_grey else _encode_png(Image.fromarray(ids))


def read_segmentation(entry: Entry, info: DatasetInfo) -> Sample:
    """Read an image and the mask whose path is the entry's target.

    Raises:
        DataError: see `read_image` and `read_mask`.
    """
    image = read_image(Path(entry.image))
    mask = read_mask(Path(entry.target), image.size, info.num_classes, info.ignore_ids)
    return Sample(entry.key, image.data, image.format, entry.image, mask)


def read_list(path: Path) -> list[str]:
    """Return the lines of a split list, stripped, without the empty ones.

    Raises:
        DataError: the file is missing, no UTF-8 text or names nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"split list {path}: {_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"split list {path}: not UTF-8 text (byte {error.start})") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"split list {path}: empty, expected one sample a line")
    return names


def find_file(candidates: Iterable[Path], what: str) -> Path:
    """Return the first of `candidates` that is a file.

    Raises:
        DataError: none is; the message names the first and says that it is the missing `what`.
    """
    paths = list(candidates)
    for path in paths:
        if path.is_file():
            return path
    raise DataError(f"{paths[0]}: missing {what}; restore it or take the sample out of the split")


def check_split(root: Path, split: str, known: Collection[str]) -> None:
    """Raise a DataError with the nearest name unless `split` is among `known`."""
    if split not in known:
        raise DataError(f"{root}: {UnknownNameError('split', split, known)}")


def sample_key(name: str) -> str:
    """Turn a file's name, without its suffix, into a sample key: no dots, no slashes."""
    return name.replace(".", "_").replace("/", "_").replace("\\", "_")


def check_unique(entries: Iterable[Entry]) -> None:
    """Check that no two entries of a split share their key.

    Raises:
        DataError: two do; the message names both files.
    """
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.key in seen:
            raise DataError(
                f"{seen[entry.key]} and {entry.image}: both have the key '{entry.key}'; rename one"
            )
        seen[entry.key] = entry.image


def palette(num_colours: int, first: int = 0) -> tuple[tuple[int, int, int], ...]:
    """Return colours `first`, `first` + 1, ... of PASCAL VOC's colour map, which starts with black.

    The bits of the number are dealt to red, green and blue in turn, highest value first (VOC
    development kit), so that all colours differ.
    """
    colours = []
    for number in range(first, first + num_colours):
        channels = [0, 0, 0]
        for bit in range(number.bit_length()):
            channels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
        colours.append((channels[0], channels[1], channels[2]))
    return tuple(colours)


def _decode(path: Path, what: str) -> tuple[bytes, Image.Image]:
    """Return a file's bytes and its fully decoded first frame."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{what} {path}: {_reason(error)}") from error
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except DECODE_ERRORS as error:
        reason = "no image that PIL knows" if "cannot identify" in str(error) else str(error)
        raise DataError(
            f"{what} {path}: cannot be decoded ({reason}; {len(data)} bytes); replace the file"
        ) from error
    return data, image


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _png_depth(data: bytes) -> int:
    """Return the bits per channel of a PNG: byte 24, in its IHDR chunk."""
    return data[24]


def _encode_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
