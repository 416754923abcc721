"""Raw mask files: decoded, checked against their image and class list, stored as class ids.

What is stored is a single-channel 8-bit PNG whose pixel values are class ids; the bytes of a file
that is just that are kept. Masks whose raw values are other ids are written anew through a table of
`id_table`. Sizes are (width, height) in pixels, as in PIL.
"""

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.data.datasets import _files
from xattn.errors import DataError, MissingPackageError
from xattn.structures import DatasetInfo, Sample


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
    data, image = _decode_mask(path)
    _check_size(path, image.size, size)
    ids = np.asarray(image)
    known = np.zeros(256, bool)
    known[:num_classes] = known[list(ignore_ids)] = True
    besides = "".join(f" or {i}" for i in sorted(ignore_ids))
    _check_ids(path, np.bincount(ids.reshape(-1)), known, f"0..{num_classes - 1}{besides}")
    return data if image.mode == "L" else _files.encode_png(Image.fromarray(ids))


def id_table(classes: Mapping[int, int]) -> NDArray[np.int16]:
    """Return the table that `map_ids` looks up: class ids at raw values, -1 at unknown values."""
    table = np.full(max(classes) + 1, -1, np.int16)
    table[list(classes)] = list(classes.values())
    return table


def map_ids(
    raw: NDArray[Any], path: Path, size: tuple[int, int], table: NDArray[np.int16]
) -> bytes:
    """Write raw mask values as class ids: an 8-bit grey PNG.

    Args:
        raw: (height, width) whole numbers from 0.
        path: where they were read, for error messages.
        size: (width, height) in pixels of the image that the mask belongs to.
        table: of `id_table`, with class ids up to 255.

    Raises:
        DataError: the mask has another size or a value that the table does not know.
    """
    _check_size(path, (raw.shape[1], raw.shape[0]), size)
    borders = np.flatnonzero(np.diff(table >= 0, prepend=False, append=False)).reshape(-1, 2)
    runs = [f"{a}..{b - 1}" if b - a > 1 else f"{a}" for a, b in borders]
    _check_ids(path, np.bincount(raw.reshape(-1)), table >= 0, ", ".join(runs))
    return _files.encode_png(Image.fromarray(table[raw].astype(np.uint8)))


def read_mapped(entry: _files.Entry, table: NDArray[np.int16], mat_key: str = "") -> Sample:
    """Read an image and the mask whose path is the entry's target, mapped by `table`.

    Args:
        entry: its target is a PNG file of raw ids or a MATLAB file.
        table: of `id_table`.
        mat_key: name of the mask's variable in a MATLAB file.

    Raises:
        DataError: see `read_image`, `read_mask`, `read_mat` and `map_ids`.
    """
    image, path = _files.read_image(Path(entry.image)), Path(entry.target)
    raw = read_mat(path, mat_key) if path.suffix == ".mat" else np.asarray(_decode_mask(path)[1])
    mask = map_ids(raw, path, image.size, table)
    return Sample(entry.key, image.data, image.format, entry.image, mask)


def read_mat(path: Path, key: str) -> NDArray[np.uint16]:
    """Return the (height, width) label map `key` of a MATLAB file (up to version 7).

    Compressed files, which MATLAB writes since version 7, carry a checksum. In others, damage to a
    type code can end the process: scipy does not check it.

    Raises:
        DataError: the file is missing or damaged, or holds no such matrix of ids 0..65535.
        MissingPackageError: scipy is not installed.
    """
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped] # noqa: PLC0415 (slow, rare)
    except ImportError as error:
        raise MissingPackageError("masks in .mat files need scipy: pip install scipy") from error
    data = _files.read_bytes(path, "mask")
    try:
        found = loadmat(io.BytesIO(data), variable_names=[key]).get(key)
    except Exception as error:  # damaged bytes raise whatever the decoder stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"mask {path}: cannot be read as a MATLAB file ({reason}; {len(data)} bytes); replace"
            " the file"
        ) from error
    if found is None:
        raise DataError(f"mask {path}: no variable '{key}' in it")
    ids = np.asarray(found)
    is_map = ids.ndim == 2 and ids.size > 0 and ids.dtype.kind in "uif"
    if not (is_map and ids.min() >= 0 and ids.max() <= 65535 and (ids == np.trunc(ids)).all()):
        raise DataError(
            f"mask {path}: '{key}' is {ids.dtype} of shape {ids.shape}, expected a matrix of ids"
            " 0..65535"
        )
    return ids.astype(np.uint16)


def read_part(path: Path) -> NDArray[np.bool_]:
    """Return where an image file is not black: (height, width).

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    return np.asarray(_files.decode(path, "mask part")[1].convert("L")) > 0


def read_segmentation(entry: _files.Entry, info: DatasetInfo) -> Sample:
    """Read an image and the mask whose path is the entry's target.

    Raises:
        DataError: see `read_image` and `read_mask`.
    """
    image = _files.read_image(Path(entry.image))
    mask = read_mask(Path(entry.target), image.size, info.num_classes, info.ignore_ids)
    return Sample(entry.key, image.data, image.format, entry.image, mask)


def _decode_mask(path: Path) -> tuple[bytes, Image.Image]:
    """Return a mask's bytes and itself: mode L or P."""
    data, image = _files.decode(path, "mask")
    is_grey = image.mode == "L" and image.format == "PNG" and _files.png_depth(data) == 8
    if not is_grey and not (image.mode == "P" and image.format == "PNG"):
        raise DataError(
            f"mask {path}: found {image.format} of mode {image.mode}, expected a PNG of 8-bit grey"
            " or palette indices that are class ids; convert it"
        )
    return data, image


def _check_size(path: Path, found: tuple[int, int], size: tuple[int, int]) -> None:
    if found != size:
        raise DataError(
            f"mask {path}: {found[0]} x {found[1]} pixels (width x height), but its image"
            f" has {size[0]} x {size[1]}"
        )


def _check_ids(path: Path, counts: NDArray[Any], known: NDArray[np.bool_], allowed: str) -> None:
    """Check the ids of a mask that has `counts[i]` pixels of id i."""
    unknown = [i for i in np.flatnonzero(counts) if i >= known.size or not known[i]]
    if unknown:
        others = f" (and {len(unknown) - 1} more ids)" if len(unknown) > 1 else ""
        raise DataError(
            f"mask {path}: unknown class id {unknown[0]} in {counts[unknown[0]]} pixels{others};"
            f" allowed: {allowed}"
        )
