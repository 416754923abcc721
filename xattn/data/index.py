"""What a shard folder holds and where: open it, check it, read one sample of it.

A shard folder is `<split>-000000.tar ...` (plain WebDataset), `<split>.index.npy` (one row for each
sample, see `record_dtype`) and `index.json`, which is written last: a folder without it is not
finished. Tars are never walked: a sample is read by its offsets, and every byte that is read is
checked against the crc32 of its row. Neither webdataset nor torch is needed here.

A folder may also lie in a store ("s3://bucket/folder"), or here without its tars, with a
`location.json` {"shards": "s3://bucket/folder"} that says where they are. What such a folder lacks
is fetched when it is read, and kept by `xattn.data.cache`.
"""

import contextlib
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xattn.data.cache import ShardCache, cache_bytes, cache_folder
from xattn.errors import DamageError, DataError
from xattn.remote import Bucket, is_remote
from xattn.storage import crc32_file, read_json, write_atomic
from xattn.structures import DatasetInfo

SCHEMA = 1
INDEX_NAME = "index.json"
LOCATION_NAME = "location.json"
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

_INDEXES_BYTES = 2 << 30  # what is kept of indexes where no shards are: 17 M rows
_MAX_EVICTIONS = 5  # a file that was fetched is evicted again before it could be opened

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


DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
"""What PIL raises for broken files."""


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
        records_crc32: its checksum, compared whenever it is opened.
    """

    count: int
    shards: tuple[Shard, ...]
    fields: Mapping[str, int]
    pixels: tuple[int, ...]
    ignored_pixels: int
    images: tuple[int, ...]
    records_sha256: str
    records_crc32: int


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
        root: the folder; of one in a store, the local one with a copy of its index.json.
        info: the data set that was sharded.
        splits: name -> what is known of it.
        fingerprint: sha256 over everything in index.json; equal fingerprints mean equal data.
        location: "s3://bucket/folder" where the tars are, None where they lie in `root`.
    """

    root: Path
    info: DatasetInfo
    splits: Mapping[str, Split]
    fingerprint: str
    location: str | None = None

    @classmethod
    def open(cls, place: Path | str) -> "ShardIndex":
        """Read the index.json of a folder.

        Args:
            place: the folder, or "s3://bucket/folder".

        Raises:
            DataError: there is none, it is not JSON, it was written by another schema, or the
                store cannot be read.
            DamageError: its content does not give the fingerprint that stands in it.
        """
        if is_remote(place):
            return cls._open_remote(Bucket(str(place)))
        path = Path(place)
        try:
            data = (path / INDEX_NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            message = f"{path} has no {INDEX_NAME}: not a shard folder; make it with `xattn shard`"
            raise DataError(message) from None
        except OSError as error:
            raise DataError(f"{path / INDEX_NAME} is not readable ({error}); {RESTORE}") from error
        return cls(path, *_parse(data, str(path / INDEX_NAME)), _read_location(path))

    @classmethod
    def _open_remote(cls, bucket: Bucket) -> "ShardIndex":
        data = bucket.read(INDEX_NAME)
        info, splits, fingerprint = _parse(data, f"{bucket.place}/{INDEX_NAME}")
        root = cache_folder() / "indexes" / fingerprint
        if not (root / INDEX_NAME).exists():
            write_atomic(root / INDEX_NAME, lambda partial: partial.write_bytes(data))
        return cls(root, info, splits, fingerprint, bucket.place)

    @property
    def place(self) -> str:
        """Where the shards are, for messages."""
        return self.location or str(self.root)

    def split(self, name: str) -> Split:
        """Return the split called `name`.

        Raises:
            DataError: there is none; the message lists those there are.
        """
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"{self.place} has no split '{name}'; it has {known}")
        return self.splits[name]

    def records(self, split: str) -> npt.NDArray[np.void]:
        """Map the rows of a split into memory: (count,) of `record_dtype`, read only.

        The file's crc32 is checked, once for each state of the file in a process: 0.05 s for the
        rows of ImageNet-1k (113 MB), half a second for those of ImageNet-21k.

        Raises:
            DamageError: the file is missing, unreadable, or not the one that index.json names.
            DataError: the store cannot be read.
        """
        summary = self.split(split)
        file = self.root / records_name(split)
        if self.location is None or file.exists():
            return _map_rows(file, summary)
        try:
            return _map_rows(self._fetch_rows(split), summary)
        except DamageError:  # the disk changed it, or another process needed its room
            self._cache.drop_damaged(summary.records_sha256)
            return _map_rows(self._fetch_rows(split), summary)

    def shard_path(self, split: str, shard: int) -> Path:
        """Return the path of the tar with number `shard` of a split, fetching it if it is remote.

        Raises:
            DataError, DamageError, CapacityError: it cannot be fetched.
        """
        entry = self.split(split).shards[shard]
        if self.location is None:
            return self.root / entry.name
        return self._cache.fetch(self._bucket, entry.name, entry.sha256, entry.num_bytes)

    def drop_damaged(self, split: str, shard: int) -> bool:
        """Return whether a tar is worth another read: remote, and no damaged copy is kept of it."""
        if self.location is None:
            return False
        if self.is_cached:
            self._cache.drop_damaged(self.split(split).shards[shard].sha256)
        return True

    def read_range(self, split: str, shard: int, offset: int, size: int) -> bytes:
        """Return bytes of a remote tar without keeping it.

        Raises:
            DataError: it cannot be read.
        """
        return self._bucket.read_range(self.split(split).shards[shard].name, offset, size)

    @property
    def is_cached(self) -> bool:
        """Whether remote tars are fetched whole; otherwise each sample is a request."""
        return cache_bytes() > 0

    @cached_property
    def _bucket(self) -> Bucket:
        assert self.location is not None, "everything is local"
        return Bucket(self.location)

    @property
    def _cache(self) -> ShardCache:
        return ShardCache(cache_folder(), cache_bytes() or _INDEXES_BYTES)

    def _fetch_rows(self, split: str) -> Path:
        name, sha256 = records_name(split), self.split(split).records_sha256
        return self._cache.fetch(self._bucket, name, sha256)


def _read_location(path: Path) -> str | None:
    file = path / LOCATION_NAME
    if not file.exists():
        return None
    location = read_json(file).get("shards")
    if not isinstance(location, str) or not is_remote(location):
        raise DataError(f'{file}: expected {{"shards": "s3://BUCKET/FOLDER"}}, found {location!r}')
    return Bucket(location).place


def _parse(data: bytes, file: str) -> tuple[DatasetInfo, dict[str, Split], str]:
    try:
        document = json.loads(data)
    except ValueError as error:
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
    return _parse_info(document["dataset"]), splits, actual


def _map_rows(file: Path, split: Split) -> npt.NDArray[np.void]:
    try:
        stat = file.stat()
        actual = _crc32_of(file, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if actual != split.records_crc32:
            expected = split.records_crc32
            raise DamageError(f"{file}: crc32 is {actual:08x}, expected {expected:08x}; {RESTORE}")
        rows: npt.NDArray[np.void] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DamageError(f"{file} cannot be read ({error}); {RESTORE}") from error
    if len(rows) != split.count:
        raise DamageError(f"{file} has {len(rows)} rows, expected {split.count}; {RESTORE}")
    return rows


@lru_cache(maxsize=256)
def _crc32_of(file: Path, *_state: int) -> int:
    return crc32_file(file)  # three times as fast as sha256: each start waits for this


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
        records_crc32=entry["records_crc32"],
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
        self._by_request = index.location is not None and not index.is_cached
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
            DataError, CapacityError: a remote tar cannot be fetched.
        """
        try:
            return self._read(position)
        except DamageError:
            shard = int(self._records[position]["shard"])
            if not self._index.drop_damaged(self._split, shard):
                raise
            self.close()
        return self._read(position)

    def _read(self, position: int) -> dict[str, bytes]:
        row = self._records[position]
        if self._by_request:
            start, block = self._request(row)
        else:
            file = self._open(int(row["shard"]))
        found = {}
        for field in SUFFIXES:
            offset, size, crc32 = row[field].item()
            if offset == 0:
                continue
            if self._by_request:
                data = block[offset - start : offset - start + size]
            else:
                data = os.pread(file, size, offset)
            actual = zlib.crc32(data)
            if actual != crc32:
                raise DamageError(
                    f"{self.place(position)}, offset {offset}: {len(data)} bytes of the {field} "
                    f"have crc32 {actual:08x}, expected {size} bytes with {crc32:08x}; {RESTORE}"
                )
            found[field] = data
        return found

    def _request(self, row: np.void) -> tuple[int, bytes]:
        """Fetch all fields of a sample, which lie side by side; return (offset, bytes)."""
        spans = [(offset, size) for offset, size, _ in (row[f].item() for f in SUFFIXES) if offset]
        start = min(offset for offset, _ in spans)
        size = max(offset + size for offset, size in spans) - start
        return start, self._index.read_range(self._split, int(row["shard"]), start, size)

    def _open(self, shard: int) -> int:
        if self._owner != os.getpid():
            self.close()
            self._owner = os.getpid()
        file = self._files.pop(shard, None)
        if file is None:
            file = self._open_tar(shard)
        self._files[shard] = file
        if len(self._files) > self._max_open:
            os.close(self._files.pop(next(iter(self._files))))
        return file

    def _open_tar(self, shard: int, tries: int = _MAX_EVICTIONS) -> int:
        path = self._index.shard_path(self._split, shard)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self._index.location and tries > 1:
                return self._open_tar(shard, tries - 1)
            name = self._index.split(self._split).shards[shard].name
            message = f"shard {name} cannot be opened ({error.strerror}) in {path.parent}"
            raise DamageError(f"{message}; {RESTORE}") from error
