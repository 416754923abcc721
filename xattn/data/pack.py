"""One shard: raw entries to a tar with its rows and counts. The only place that knows webdataset.

The tar is plain WebDataset (KEY.jpg|png, KEY.seg.png, KEY.cls, KEY.boxes.json), so that any tool
can read it, and the same entries give the same bytes on every run and machine.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xattn.data.datasets import Entry
from xattn.data.index import DECODE_ERRORS, SUFFIXES, TAR_BLOCK_BYTES, decode_mask, record_dtype
from xattn.data.stored import Recode, recode
from xattn.errors import DataError
from xattn.remote import Bucket
from xattn.storage import read_json, write_atomic, write_json
from xattn.structures import Box, DatasetInfo, Sample

KEY_BYTES = 88
"""Longest key: a ustar name without a directory has 100, the longest suffix 11."""
_MAX_SIDE_PX = 65535


@dataclass(frozen=True, slots=True)
class Packing:
    """What every shard of a folder is packed with; must pickle where there are several processes.

    Args:
        info: the data set.
        read: opens the files of an entry.
        recode: how images are stored.
        quarantine: corrupt samples that may be set aside; 0 stops at the first.
        folder: where tars, rows and records go.
        bucket: where the tars go from there, if not by the parent's hand.
    """

    info: DatasetInfo
    read: Callable[[Entry], Sample]
    recode: Recode
    quarantine: int
    folder: Path
    bucket: Bucket | None = None


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A shard to pack.

    Args:
        split: its split.
        number: 0, 1, ... in the split.
        entries: its samples in their order.
        fingerprint: sha256 over everything that decides its bytes, raw files by size and time.
    """

    split: str
    number: int
    entries: tuple[Entry, ...]
    fingerprint: str

    @property
    def name(self) -> str:
        """File name of the tar."""
        return f"{self.split}-{self.number:06d}.tar"


@dataclass(frozen=True, slots=True)
class PackedShard:
    """What is known of a finished tar.

    Args:
        name: its file name.
        num_bytes: its size.
        num_samples: samples in it.
        sha256: of its bytes.
        pixels: 256 counts of mask pixels per id.
        images: K counts of labelled images per class.
        quarantined: key -> what was wrong with a sample that was set aside.
        plan: fingerprint of the plan that it fulfils.
    """

    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    pixels: tuple[int, ...]
    images: tuple[int, ...]
    quarantined: Mapping[str, str]
    plan: str

    def save(self, folder: Path, rows: npt.NDArray[np.void]) -> None:
        """Write rows and, last, the record that vouches for tar and rows."""
        write_rows(folder / f"{self.name}.npy", rows)
        write_json(folder / f"{self.name}.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path, name: str) -> "PackedShard":
        """Read a record; DataError if there is none or it is none."""
        values = read_json(folder / f"{name}.json")
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        try:
            return cls(**{**values, **lists})
        except TypeError as error:
            raise DataError(f"{folder / name}.json: not a record of a shard ({error})") from None

    def rows(self, folder: Path) -> npt.NDArray[np.void]:
        """Read the rows of `save`."""
        rows: npt.NDArray[np.void] = np.load(folder / f"{self.name}.npy", allow_pickle=False)
        return rows


def write_rows(path: Path, rows: npt.NDArray[np.void]) -> None:
    """Write rows of `record_dtype` as .npy, whole or not at all."""

    def write(partial: Path) -> None:
        with partial.open("wb") as stream:
            np.lib.format.write_array(stream, rows, allow_pickle=False)

    write_atomic(path, write)


def pack_shard(packing: Packing, plan: ShardPlan, after_sample: Callable[[], None]) -> PackedShard:
    """Write the tar, rows and record of one shard, each whole or not at all.

    Args:
        packing: what all shards have in common.
        plan: the samples.
        after_sample: called after each; may raise to stop.

    Raises:
        DataError: a sample cannot be read or breaks its promise, and is not to be set aside.
        CapacityError: the disk is full.
    """
    counts = _Counts(packing.info)
    rows: list[tuple[Any, ...]] = []
    quarantined: dict[str, str] = {}
    digest: list[tuple[int, str]] = []

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            file = _HashingFile(stream)
            with _tar_writer(file) as tar:
                for entry in plan.entries:
                    try:
                        sample = recode(packing.read(entry), packing.recode)
                        _check_promised_key(sample, entry)
                        sides = counts.check(sample)
                    except DataError as error:
                        quarantined[entry.key] = str(error)
                        if len(quarantined) > packing.quarantine:
                            raise
                    else:
                        counts.add(sample)
                        spans = _write_members(tar, sample.key, _members(sample))
                        rows.append((sample.key.encode(), plan.number, *spans, *sides))
                    after_sample()
            digest.append((file.num_bytes, file.sha256))

    write_atomic(packing.folder / plan.name, write)
    ((num_bytes, sha256),) = digest
    packed = PackedShard(
        name=plan.name,
        num_bytes=num_bytes,
        num_samples=len(rows),
        sha256=sha256,
        pixels=tuple(counts.pixels.tolist()),
        images=tuple(counts.images.tolist()),
        quarantined=quarantined,
        plan=plan.fingerprint,
    )
    if packing.bucket is not None:
        packing.bucket.upload(packing.folder / plan.name, plan.name)
        (packing.folder / plan.name).unlink()
    packed.save(packing.folder, np.array(rows, record_dtype(KEY_BYTES)))
    return packed


class _HashingFile:
    """Passes what is written on to a stream and hashes it; stops passing on after a failure.

    tarfile writes its end blocks whenever it is closed; after a full disk they have nowhere to go.
    """

    def __init__(self, stream: io.BufferedWriter) -> None:
        self._stream, self._digest, self._broken = stream, hashlib.sha256(), False
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes, /) -> int:
        if not self._broken:
            try:
                self._stream.write(data)
            except OSError:
                self._broken = True
                raise
            self._digest.update(data)
            self.num_bytes += len(data)
        return len(data)


def _tar_writer(file: _HashingFile) -> Any:
    import webdataset  # noqa: PLC0415 (it imports torch)

    tar = webdataset.TarWriter(file, mtime=0, encoder=False)
    # Its default, PAX, puts a second header before members whose names are not ASCII.
    tar.tarstream.format, tar.tarstream.encoding = tarfile.USTAR_FORMAT, "utf-8"
    return tar


class _Counts:
    """Checks samples against the data set and counts what the index states."""

    def __init__(self, info: DatasetInfo) -> None:
        self._info = info
        self.pixels = np.zeros(256, np.int64)
        self.images = np.zeros(info.num_classes, np.int64)
        self._known_ids = np.zeros(256, bool)
        self._known_ids[[*range(info.num_classes), *info.ignore_ids]] = True
        self._mask_pixels = self.pixels

    def check(self, sample: Sample) -> tuple[int, int]:
        """Check what a reader promises; return (height, width) in pixels."""
        _check_key(sample)
        sides = _image_size(sample)
        self._mask_pixels = np.zeros(256, np.int64)
        if sample.mask is not None:
            self._mask_pixels = self._count_pixels(sample, sample.mask, sides)
        if sample.label is not None:
            self._check_class(sample, sample.label)
        for box in sample.boxes or ():
            self._check_class(sample, box.class_id)
        return sides

    def add(self, sample: Sample) -> None:
        """Count the sample that was checked last."""
        self.pixels += self._mask_pixels
        if sample.label is not None:
            self.images[sample.label] += 1

    def _check_class(self, sample: Sample, class_id: int) -> None:
        last = self._info.num_classes - 1
        if not 0 <= class_id <= last:
            raise _broken(sample, f"class id {class_id} is not in 0..{last}")

    def _count_pixels(
        self, sample: Sample, data: bytes, sides: tuple[int, int]
    ) -> npt.NDArray[np.int64]:
        try:
            mask = decode_mask(data)
        except DECODE_ERRORS as error:
            raise _broken(sample, f"the mask cannot be decoded: {error}") from error
        if mask.shape != sides:
            raise _broken(sample, f"the mask has (height, width) {mask.shape}, the image {sides}")
        counts = np.bincount(mask.reshape(-1), minlength=256)
        unknown = np.flatnonzero((counts > 0) & ~self._known_ids)
        if len(unknown):
            known = f"0..{self._info.num_classes - 1} or an ignored one {self._info.ignore_ids}"
            raise _broken(sample, f"the mask has class id {unknown[0]}, expected {known}")
        return counts


def _members(sample: Sample) -> dict[str, bytes]:
    """Return suffix -> payload for each field that the sample has."""
    members: dict[str, bytes] = {sample.image_format: sample.image}
    if sample.mask is not None:
        members["seg.png"] = sample.mask
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    if sample.boxes is not None:
        boxes = [_box_members(box) for box in sample.boxes]
        members["boxes.json"] = json.dumps(boxes, separators=(",", ":")).encode()
    return members


def _box_members(box: Box) -> dict[str, Any]:
    values = dataclasses.asdict(box)
    if box.area is None:
        del values["area"]
    return values


def _write_members(
    tar: Any, key: str, members: Mapping[str, bytes]
) -> Iterator[tuple[int, int, int]]:
    """Write a sample; yield (offset, size, crc32) of each field of `SUFFIXES`."""
    for suffixes in SUFFIXES.values():
        suffix = next((suffix for suffix in suffixes if suffix in members), None)
        if suffix is None:
            yield 0, 0, 0
            continue
        # One member a call: the tar's own offset then says where it lies, in an order that is ours.
        offset = tar.tarstream.offset + TAR_BLOCK_BYTES
        tar.write({"__key__": key, suffix: members[suffix]})
        assert tar.tarstream.offset == offset + _stored_bytes(members[suffix]), "one header each"
        yield offset, len(members[suffix]), zlib.crc32(members[suffix])


def _stored_bytes(data: bytes) -> int:
    return -(-len(data) // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES


def rows_of_tar(path: Path, number: int) -> npt.NDArray[np.void]:
    """Make the rows of a sound tar anew from its members.

    Args:
        path: a tar of `pack_shard`.
        number: of the shard in its split.

    Raises:
        DataError: it is no such tar.
    """
    places = {suffix: place for place, group in enumerate(SUFFIXES.values()) for suffix in group}
    rows: dict[str, list[Any]] = {}
    sides: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                spans = rows.setdefault(key, [(0, 0, 0)] * len(SUFFIXES))
                spans[places[suffix]] = (member.offset_data, member.size, zlib.crc32(data))
                if suffix in SUFFIXES["image"]:
                    with Image.open(io.BytesIO(data)) as image:
                        sides[key] = image.size[1], image.size[0]
        filled = [(key.encode(), number, *spans, *sides[key]) for key, spans in rows.items()]
    except (tarfile.TarError, KeyError, AttributeError, *DECODE_ERRORS) as error:
        raise DataError(f"{path}: not a shard of ours ({error})") from error
    return np.array(filled, record_dtype(KEY_BYTES))


def _check_promised_key(sample: Sample, entry: Entry) -> None:
    if sample.key != entry.key:
        raise _broken(sample, f"the reader promised the key '{entry.key}'")


def _check_key(sample: Sample) -> None:
    key = sample.key
    if not key or key.startswith("_") or set(key) & set("./\\\0"):
        raise _broken(sample, "a key must not be empty, start with '_' or hold . / \\ or NUL")
    if len(key.encode()) > KEY_BYTES:
        too_long = f"the key has {len(key.encode())} bytes, at most {KEY_BYTES} fit"
        raise _broken(sample, f"{too_long}; give the file a shorter name")


def _image_size(sample: Sample) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            width, height = image.size
            found = image.format
    except DECODE_ERRORS as error:
        raise _broken(sample, f"the image cannot be decoded: {error}") from error
    # MPO: a JPEG with further pictures behind the first, as some cameras store it.
    if found not in {"jpg": ("JPEG", "MPO"), "png": ("PNG",)}[sample.image_format]:
        raise _broken(sample, f"the image is a {found} file, not {sample.image_format}")
    if max(height, width) > _MAX_SIDE_PX:
        raise _broken(sample, f"the image is {height} x {width}, sides may have {_MAX_SIDE_PX} px")
    return height, width


def _broken(sample: Sample, problem: str) -> DataError:
    return DataError(f"{sample.source} (key '{sample.key}'): {problem}")
