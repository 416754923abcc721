"""Raw list and image files: decoded in full, refused with one line that names the file.

The bytes of a file are kept wherever every decoder will read them alike. Sizes are (width, height)
in pixels, as in PIL.
"""

import io
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from xattn.data.index import DECODE_ERRORS
from xattn.errors import DataError, UnknownNameError
from xattn.structures import Sample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


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
    data, image = decode(path, "image")
    if image.mode in ("L", "RGB") and image.format == "JPEG":
        return RawImage(data, "jpg", image.size)
    if image.mode in ("L", "RGB") and image.format == "PNG" and png_depth(data) == 8:
        return RawImage(data, "png", image.size)
    if image.mode.startswith("I"):
        high_byte = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(high_byte.astype(np.uint8))
    return RawImage(encode_png(image.convert("RGB")), "png", image.size)


def read_labelled(entry: Entry) -> Sample:
    """Read an image whose label is the entry's target.

    Raises:
        DataError: see `read_image`.
    """
    image = read_image(Path(entry.image))
    return Sample(entry.key, image.data, image.format, entry.image, label=entry.target)


def list_folders(path: Path) -> list[str]:
    """Return the sorted names of the folders in `path` that are not hidden.

    Raises:
        DataError: there is no such folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    with os.scandir(path) as found:
        return sorted(f.name for f in found if not f.name.startswith(".") and f.is_dir())


def list_images(path: Path) -> list[str]:
    """Return the sorted names of the files in `path` with an image's suffix, hidden ones apart.

    Raises:
        DataError: there is no such folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    names = (name for name in os.listdir(path) if not name.startswith("."))
    return sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))


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


def refuse_missing(paths: Sequence[Path], what: str) -> None:
    """Raise a DataError unless `paths`, which are known to be missing, are none.

    Args:
        paths: the missing files or folders; the message names up to ten of them.
        what: what they are, for the message.
    """
    if paths:
        shown = ", ".join(str(path) for path in paths[:10])
        others = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
        raise DataError(f"missing {what}: {shown}{others}; restore them")


def pair_files(
    images: Path, image_end: str, masks: Path, mask_end: str, skip_end: str | None = None
) -> list[Entry]:
    """Pair the images and masks of two folders, and of those below, that have the same name.

    Args:
        images: folder of the images.
        image_end: what follows an image's name, for example "_leftImg8bit.png".
        masks: folder of the masks.
        mask_end: what follows a mask's name.
        skip_end: files that end so are no masks, though they end in `mask_end`.

    Returns:
        One entry an image, sorted by name; its target is the path of the mask.

    Raises:
        DataError: a folder is missing or empty, or a file has no partner; names the partners.
    """
    names, drawn = _names(images, image_end), _names(masks, mask_end, skip_end)
    refuse_missing([images / f"{name}{image_end}" for name in sorted(drawn - names)], "images")
    return pair_listed(sorted(names), images, image_end, masks, mask_end)


def pair_listed(
    names: Iterable[str], images: Path, image_end: str, masks: Path, mask_end: str
) -> list[Entry]:
    """Return an entry for each name, with the path of its mask as the target.

    Raises:
        DataError: files are missing, which it names, or two names make the same key.
    """
    paths = [(images / f"{name}{image_end}", masks / f"{name}{mask_end}") for name in names]
    refuse_missing([image for image, _ in paths if not image.is_file()], "images")
    refuse_missing([mask for _, mask in paths if not mask.is_file()], "masks")
    found = [
        Entry(sample_key(image.name.removesuffix(image_end)), str(image), str(mask))
        for image, mask in paths
    ]
    check_unique(found)
    return found


def find_folder(candidates: Iterable[Path]) -> Path:
    """Return the first of `candidates` that is a folder, otherwise the first."""
    paths = list(candidates)
    return next((path for path in paths if path.is_dir()), paths[0])


def check_split(root: Path, split: str, known: Collection[str]) -> None:
    """Raise a DataError with the nearest name unless `split` is among `known`."""
    if split not in known:
        raise DataError(f"{root}: {UnknownNameError('split', split, known)}")


def sample_key(name: str) -> str:
    """Turn a file's name, without its suffix, into a sample key: no dots, no slashes."""
    return name.replace(".", "_").replace("/", "_").replace("\\", "_")


def check_unique(entries: Iterable[Entry]) -> None:
    """Check that no two entries of a split share their key, and that each can be stored.

    Raises:
        DataError: two do, or a file's name is not UTF-8; the message names the files.
    """
    seen: dict[str, str] = {}
    for entry in entries:
        try:
            f"{entry.key}{entry.image}".encode()
        except UnicodeEncodeError:
            raise DataError(f"{entry.image!r}: the name is not UTF-8; rename the file") from None
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


def read_bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{what} {path}: {_reason(error)}") from error


def decode(path: Path, what: str) -> tuple[bytes, Image.Image]:
    """Return a file's bytes and its fully decoded first frame."""
    data = read_bytes(path, what)
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except DECODE_ERRORS as error:
        reason = "no image that PIL knows" if "cannot identify" in str(error) else str(error)
        raise DataError(
            f"{what} {path}: cannot be decoded ({reason}; {len(data)} bytes); replace the file"
        ) from error
    return data, image


def _names(folder: Path, end: str, skip_end: str | None = None) -> set[str]:
    """Return the files of `folder` and below that end in `end`: "below/name" without it."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected files *{end} in it")
    found = {
        Path(parent, name).relative_to(folder).as_posix().removesuffix(end)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(end) and not name.startswith(".")
        if skip_end is None or not name.endswith(skip_end)
    }
    if not found:
        raise DataError(f"{folder}: no file *{end} in it")
    return found


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def png_depth(data: bytes) -> int:
    """Return the bits per channel of a PNG: byte 24, in its IHDR chunk."""
    return data[24]


def encode_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
