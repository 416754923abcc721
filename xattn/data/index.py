"""What a shard folder holds and where: open it, check it, read one sample of it.

A shard folder is `<split>-000000.tar ...` (plain WebDataset), `<split>.index.npy` (one row for each
sample, see `record_dtype`) and `index.json`, which is written last: a folder without it is not
finished. Tars are never walked: a sample is read by its offsets, and every byte that is read is
checked against the crc32 of its row. Neither webdataset nor torch is needed here.
"""

import contextlib
import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xattn.errors import DamageError, DataError
from xattn.structures import DatasetInfo

SCHEMA = 1
INDEX_NAME = "index.json"
TAR_BLOCK_BYTES = 512
SUFFIXES = {
    "image": ("jpg", "png"),
    "mask": ("seg.png",),
    "label": ("cls",),
    "boxes": ("boxes.json",),
}
"""Names of a field's tar members after the key, in the order in which a sample's are stored."""

RESHARD = "make the folder again with `xattn shard`"
RESTORE = (
    "restore the file from its remote (`dvc pull`) or make the folder again with `xattn shard`"
)

_SPAN = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])


def record_dtype(key_bytes: int) -> np.dtype[np.void]:
    """Return the type of one row of `<split>.index.npy`.

    `key` is UTF-8, padded with NUL; `shard` counts from 0; each field of `SUFFIXES` is a span of
    payload bytes in that tar, its offset 0 where the sample has no such field; `height` and `width`
    are those of the stored image in pixels.
    """
    spans = [(field, _SPAN) for field in SUFFIXES]
    sides = [("height", "<u2"), ("width", "<u2")]
    return np.dtype([("key", f"S{key_bytes}"), ("shard", "<u4"), *spans, *sides])


def records_name(split: str) -> str:
    """Return the file name of a split's rows."""
    return f"{split}.index.npy"


def decode_mask(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode a mask to (H, W) ids; a palette image gives its indices.

    Raises:
        ValueError: not a single-channel 8-bit image.
        OSError: not an image at all (from PIL).
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"the mask has mode {image.mode}, expected 8-bit grey or palette")
        return np.asarray(image)


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file as it was written."""

    name: str
    num_bytes: int
    num_samples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Split:
    """What is known of a split without opening its rows.

    Args:
        count: number of samples.
        shards: its tars, in the order of the rows.
        fields: for each of image, mask, label, boxes: how many samples have it.
        pixels: K counts of mask pixels per class (zeros where there are no masks).
        ignored_pixels: mask pixels that hold one of the data set's ignore ids.
        images: K counts of labelled images per class (zeros where there are no labels).
        records_sha256: hash of the file of rows.
    """

    count: int
    shards: tuple[Shard, ...]
    fields: Mapping[str, int]
    pixels: tuple[int, ...]
    ignored_pixels: int
    images: tuple[int, ...]
    records_sha256: str


def fingerprint_of(document: Mapping[str, Any]) -> str:
    """Return the sha256 that stands for all data of an index.json, itself left out.

    The document names only files of its own folder, so the value is the same on every machine.
    """
    content = {name: value for name, value in document.items() if name != "fingerprint"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class ShardIndex:
    """A finished shard folder.

    Args:
        root: the folder.
        info: the data set that was sharded.
        splits: name -> what is known of it.
        fingerprint: sha256 over everything in index.json; equal fingerprints mean equal data.
    """

    root: Path
    info: DatasetInfo
    splits: Mapping[str, Split]
    fingerprint: str

    @classmethod
    def open(cls, path: Path) -> "ShardIndex":
        """Read `path`/index.json.

        Raises:
            DataError: there is none, it is not JSON, or it was written by another schema.
            DamageError: its content does not give the fingerprint that stands in it.
        """
        file = path / INDEX_NAME
        try:
            document = json.loads(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            message = f"{path} has no {INDEX_NAME}: not a shard folder; make it with `xattn shard`"
            raise DataError(message) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not readable as JSON ({error}); {RESTORE}") from error
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise DataError(f"{file} has schema {schema}, this program reads {SCHEMA}; {RESHARD}")
        actual, expected = fingerprint_of(document), document.get("fingerprint")
        if actual != expected:
            raise DamageError(
                f"{file}: its content has fingerprint {actual}, but it states {expected}; {RESTORE}"
            )
        splits = {name: _parse_split(entry) for name, entry in document["splits"].items()}
        return cls(path, _parse_info(document["dataset"]), splits, actual)

    def split(self, name: str) -> Split:
        """Return the split called `name`.

        Raises:
            DataError: there is none; the message lists those there are.
        """
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"{self.root} has no split '{name}'; it has {known}")
        return self.splits[name]

    def records(self, split: str) -> npt.NDArray[np.void]:
        """Map the rows of a split into memory: (count,) of `record_dtype`, read only.

        Raises:
            DamageError: the file is missing, unreadable or has another number of rows.
        """
        expected = self.split(split).count
        file = self.root / records_name(split)
        try:
            rows: npt.NDArray[np.void] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DamageError(f"{file} cannot be read ({error}); {RESTORE}") from error
        if len(rows) != expected:
            raise DamageError(f"{file} has {len(rows)} rows, expected {expected}; {RESTORE}")
        return rows

    def shard_path(self, split: str, shard: int) -> Path:
        """Return the path of the tar with number `shard` of a split."""
        return self.root / self.split(split).shards[shard].name


def _parse_info(entry: Mapping[str, Any]) -> DatasetInfo:
    lists = {name: tuple(value) for name, value in entry.items() if isinstance(value, list)}
    lists["palette"] = tuple(tuple(colour) for colour in entry["palette"])
    return DatasetInfo(**{**entry, **lists})


def _parse_split(entry: Mapping[str, Any]) -> Split:
    counts = entry["class_counts"]
    return Split(
        count=entry["samples"],
        shards=tuple(
            Shard(shard["name"], shard["bytes"], shard["samples"], shard["sha256"])
            for shard in entry["shards"]
        ),
        fields=entry["fields"],
        pixels=tuple(counts["pixels"]),
        ignored_pixels=counts["ignored_pixels"],
        images=tuple(counts["images"]),
        records_sha256=entry["records_sha256"],
    )


class ShardReader:
    """Random access to the samples of one split, checked at every read.

    May be pickled and may be carried through a fork: each process opens the tars for itself.

    Args:
        index: the folder.
        split: name of the split.
        max_open: how many tars are kept open; the one not read for longest is closed first.
    """

    def __init__(self, index: ShardIndex, split: str, max_open: int = 64) -> None:
        self._index, self._split, self._max_open = index, split, max_open
        self._records = index.records(split)
        self._files: dict[int, int] = {}
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[ShardIndex, str, int]]:
        return ShardReader, (self._index, self._split, self._max_open)

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __len__(self) -> int:
        return len(self._records)

    def close(self) -> None:
        """Close the tars; a later read opens them again."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                os.close(file)
        self._files = {}

    def key(self, position: int) -> str:
        """Return the key of the sample in row `position`."""
        return bytes(self._records[position]["key"]).decode()

    def size(self, position: int) -> tuple[int, int]:
        """Return (height, width) of the stored image in pixels."""
        row = self._records[position]
        return int(row["height"]), int(row["width"])

    def place(self, position: int) -> str:
        """Return "shard NAME, key KEY" of a row, for messages."""
        shard = self._index.split(self._split).shards[int(self._records[position]["shard"])]
        return f"shard {shard.name}, key {self.key(position)}"

    def read(self, position: int) -> dict[str, bytes]:
        """Return the stored bytes of each field that the sample in row `position` has.

        Raises:
            DamageError: a tar is missing or cut, or bytes have another crc32 than the row says.
        """
        row = self._records[position]
        file = self._open(int(row["shard"]))
        found = {}
        for field in SUFFIXES:
            offset, size, crc32 = row[field].item()
            if offset == 0:
                continue
            data = os.pread(file, size, offset)
            actual = zlib.crc32(data)
            if actual != crc32:
                raise DamageError(
                    f"{self.place(position)}, offset {offset}: {len(data)} bytes of the {field} "
                    f"have crc32 {actual:08x}, expected {size} bytes with {crc32:08x}; {RESTORE}"
                )
            found[field] = data
        return found

    def _open(self, shard: int) -> int:
        if self._owner != os.getpid():
            self.close()
            self._owner = os.getpid()
        file = self._files.pop(shard, None)
        if file is None:
            path = self._index.shard_path(self._split, shard)
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                message = f"shard {path.name} cannot be opened ({error.strerror}) in {path.parent}"
                raise DamageError(f"{message}; {RESTORE}") from error
        self._files[shard] = file
        if len(self._files) > self._max_open:
            os.close(self._files.pop(next(iter(self._files))))
        return file
