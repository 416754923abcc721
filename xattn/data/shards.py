"""Sample streams to a shard folder: the only place that knows webdataset.

Plain WebDataset tars (KEY.jpg|png, KEY.seg.png, KEY.cls, KEY.boxes.json) that any tool can read,
with the index of `xattn.data.index` beside them. The same samples give the same bytes on every run
and machine. Every file is written under a hidden name, synced and renamed; index.json comes last,
so a folder that has one is whole.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xattn.data.index import (
    INDEX_NAME,
    SCHEMA,
    SUFFIXES,
    TAR_BLOCK_BYTES,
    Shard,
    ShardIndex,
    decode_mask,
    fingerprint_of,
    record_dtype,
    records_name,
)
from xattn.errors import CapacityError, ConfigError, DataError
from xattn.storage import free_bytes, refused_disk
from xattn.structures import DatasetInfo, Sample

OnProgress = Callable[[str, int, int], None]

_KEY_BYTES = 88  # a ustar name without a directory has 100, the longest suffix 11
_MAX_SIDE_PX = 65535
_PARTIAL = ".partial"


def write_shards(
    out: Path,
    info: DatasetInfo,
    splits: Mapping[str, tuple[int, Iterable[Sample]]],
    *,
    samples_per_shard: int = 1000,
    max_shard_bytes: int = 256 << 20,
    expected_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> ShardIndex:
    """Write every split into the folder `out` and return its index.

    About 150 bytes a sample are held in memory, whatever the size of the images.

    Args:
        out: new, empty, or a shard folder of the same splits (finished or not), which is replaced.
        info: the data set.
        splits: name -> (number of samples, the samples in their order).
        samples_per_shard: a shard is closed when it has as many.
        max_shard_bytes: or before it would get larger than this (its 10 kB end blocks apart).
        expected_bytes: estimate of all bytes to write; more than is free is refused beforehand.
        on_progress: called after each sample with (split, done, total).

    Raises:
        DataError: a sample breaks its promise, or `out` holds files that are not ours.
        CapacityError: the disk is or gets full; no index.json is left then.
        ConfigError: `samples_per_shard` is not positive.
    """
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard is {samples_per_shard}, expected 1 or more")
    out.mkdir(parents=True, exist_ok=True)
    _clear(out, {*info.splits, *splits})
    _check_free_space(out, expected_bytes)
    with refused_disk(out), _nothing_kept_of_a_failure(out, {*info.splits, *splits}):
        entries = {}
        for name, (count, samples) in splits.items():
            writer = _SplitWriter(out, name, info, samples_per_shard, max_shard_bytes)
            entries[name] = writer.write(count, samples, on_progress)
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "dataset": dataclasses.asdict(info),
            "splits": entries,
        }
        # Through JSON and back, so that the tuples of `info` count as the lists they become.
        document["fingerprint"] = fingerprint_of(json.loads(json.dumps(document)))
        with _PublishedFile(out / INDEX_NAME) as file:
            file.write(json.dumps(document, indent=1).encode() + b"\n")
    return ShardIndex.open(out)


@contextmanager
def _nothing_kept_of_a_failure(out: Path, splits: set[str]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _clear(out, splits)
        raise


def _clear(out: Path, splits: set[str]) -> None:
    """Remove what an earlier run of ours left in `out`, the index first."""
    names = "|".join(re.escape(name) for name in sorted(splits))
    pattern = rf"index\.json|(?:{names})(?:-\d{{6}}\.tar|\.index\.npy)"
    ours = re.compile(rf"{pattern}|\.(?:{pattern}){re.escape(_PARTIAL)}")
    found = sorted(file.name for file in out.iterdir())
    foreign = [name for name in found if not ours.fullmatch(name)]
    if foreign:
        raise DataError(
            f"{out} holds '{foreign[0]}', which is not a file of these shards; "
            "give an empty folder or move the file away"
        )
    for name in sorted(found, key=lambda name: name != INDEX_NAME):
        (out / name).unlink()


def _check_free_space(out: Path, expected_bytes: int | None) -> None:
    free = free_bytes(out)
    if expected_bytes is not None and expected_bytes > free:
        raise CapacityError(
            f"about {expected_bytes} bytes will be written to {out}, but only {free} are free there"
        )


class _PublishedFile:
    """A file that appears under its name only when it is whole: hashed, synced, renamed.

    After `discard` it swallows what is written: tarfile writes its end blocks whenever it is
    closed, and after a failure they have nowhere to go.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}{_PARTIAL}")
        self._stream: io.BufferedWriter | None = self._partial.open("wb")
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        """Hash of all that was written."""
        return self._digest.hexdigest()

    def write(self, data: bytes, /) -> int:
        if self._stream is not None:
            self._stream.write(data)
            self._digest.update(data)
            self.num_bytes += len(data)
        return len(data)

    def publish(self) -> None:
        assert self._stream is not None, "published twice, or after discard"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        self._partial.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        if self._stream is not None:
            # raw: what is still in the buffer may be just what did not fit on the disk.
            self._stream.raw.close()
            self._stream = None
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> "_PublishedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            self.discard()


class _SplitWriter:
    """Writes the tars and rows of one split."""

    def __init__(
        self,
        out: Path,
        split: str,
        info: DatasetInfo,
        samples_per_shard: int,
        max_shard_bytes: int,
    ) -> None:
        self._out, self._split, self._info = out, split, info
        self._samples_per_shard, self._max_shard_bytes = samples_per_shard, max_shard_bytes
        self._shards: list[Shard] = []
        self._rows: list[npt.NDArray[np.void]] = []
        self._keys: set[str] = set()
        self._pixels = np.zeros(256, np.int64)
        self._images = np.zeros(info.num_classes, np.int64)
        self._known_ids = np.zeros(256, bool)
        self._known_ids[[*range(info.num_classes), *info.ignore_ids]] = True

    def write(
        self, count: int, samples: Iterable[Sample], on_progress: OnProgress | None
    ) -> dict[str, Any]:
        """Write all samples; return the split's entry of index.json."""
        stream = iter(samples)
        waiting = next(stream, None)
        while waiting is not None:
            waiting = self._write_shard(waiting, stream, count, on_progress)
        if len(self._keys) != count:
            raise DataError(
                f"{self._info.name}, split '{self._split}': the reader promised {count} samples "
                f"and gave {len(self._keys)}"
            )
        return self._publish_rows()

    def _write_shard(
        self,
        sample: Sample | None,
        stream: Iterator[Sample],
        count: int,
        on_progress: OnProgress | None,
    ) -> Sample | None:
        """Write one tar from `sample` on; return the first sample of the next one, if any."""
        import webdataset  # noqa: PLC0415 (it imports torch, which readers of this module may lack)

        name = f"{self._split}-{len(self._shards):06d}.tar"
        rows: list[tuple[Any, ...]] = []
        with _PublishedFile(self._out / name) as file:
            tar = webdataset.TarWriter(file, mtime=0, encoder=False)
            try:
                while sample is not None and len(rows) < self._samples_per_shard:
                    members = _members(sample)
                    stored = sum(_stored_bytes(data) for data in members.values())
                    if rows and tar.tarstream.offset + stored > self._max_shard_bytes:
                        break
                    sides = self._check(sample)
                    spans = _write_members(tar, sample.key, members)
                    rows.append((sample.key.encode(), len(self._shards), *spans, *sides))
                    if on_progress is not None:
                        on_progress(self._split, len(self._keys), count)
                    sample = next(stream, None)
            except BaseException:
                file.discard()
                raise
            finally:
                tar.close()
        self._shards.append(Shard(name, file.num_bytes, len(rows), file.sha256))
        self._rows.append(np.array(rows, record_dtype(_KEY_BYTES)))
        return sample

    def _check(self, sample: Sample) -> tuple[int, int]:
        """Check what the index needs, count the classes, return (height, width) in pixels."""
        _check_key(sample)
        if sample.key in self._keys:
            raise _broken(sample, "the key occurs twice in this split")
        self._keys.add(sample.key)
        sides = _image_size(sample)
        if sample.mask is not None:
            self._count_pixels(sample, sample.mask, sides)
        if sample.label is not None:
            self._check_class(sample, sample.label)
            self._images[sample.label] += 1
        for box in sample.boxes or ():
            self._check_class(sample, box.class_id)
        return sides

    def _check_class(self, sample: Sample, class_id: int) -> None:
        last = self._info.num_classes - 1
        if not 0 <= class_id <= last:
            raise _broken(sample, f"class id {class_id} is not in 0..{last}")

    def _count_pixels(self, sample: Sample, data: bytes, sides: tuple[int, int]) -> None:
        try:
            mask = decode_mask(data)
        except (OSError, ValueError) as error:
            raise _broken(sample, f"the mask cannot be decoded: {error}") from error
        if mask.shape != sides:
            raise _broken(sample, f"the mask has (height, width) {mask.shape}, the image {sides}")
        counts = np.bincount(mask.reshape(-1), minlength=256)
        unknown = np.flatnonzero((counts > 0) & ~self._known_ids)
        if len(unknown):
            known = f"0..{self._info.num_classes - 1} or an ignored one {self._info.ignore_ids}"
            raise _broken(sample, f"the mask has class id {unknown[0]}, expected {known}")
        self._pixels += counts

    def _publish_rows(self) -> dict[str, Any]:
        rows = np.concatenate(self._rows or [np.empty(0, record_dtype(_KEY_BYTES))])
        longest = max((len(key.encode()) for key in self._keys), default=1)
        rows = rows.astype(record_dtype(longest))
        with _PublishedFile(self._out / records_name(self._split)) as file:
            np.lib.format.write_array(file, rows, allow_pickle=False)
        ignored = list(self._info.ignore_ids)
        classes = self._pixels[: self._info.num_classes].copy()
        classes[[i for i in ignored if i < len(classes)]] = 0
        return {
            "samples": len(rows),
            "fields": {field: int((rows[field]["offset"] > 0).sum()) for field in SUFFIXES},
            "class_counts": {
                "pixels": classes.tolist(),
                "ignored_pixels": int(self._pixels[ignored].sum()),
                "images": self._images.tolist(),
            },
            "shards": [
                {
                    "name": shard.name,
                    "bytes": shard.num_bytes,
                    "samples": shard.num_samples,
                    "sha256": shard.sha256,
                }
                for shard in self._shards
            ],
            "records_sha256": file.sha256,
        }


def _members(sample: Sample) -> dict[str, bytes]:
    """Return suffix -> payload for each field that the sample has."""
    members: dict[str, bytes] = {sample.image_format: sample.image}
    if sample.mask is not None:
        members["seg.png"] = sample.mask
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    if sample.boxes is not None:
        boxes = [dataclasses.asdict(box) for box in sample.boxes]
        members["boxes.json"] = json.dumps(boxes, separators=(",", ":")).encode()
    return members


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
        yield offset, len(members[suffix]), zlib.crc32(members[suffix])


def _stored_bytes(data: bytes) -> int:
    return TAR_BLOCK_BYTES * (1 + -(-len(data) // TAR_BLOCK_BYTES))


def _check_key(sample: Sample) -> None:
    key = sample.key
    if not key or key.startswith("_") or set(key) & set("./\\\0"):
        raise _broken(sample, "a key must not be empty, start with '_' or hold . / \\ or NUL")
    if len(key.encode()) > _KEY_BYTES:
        raise _broken(sample, f"the key has {len(key.encode())} bytes, at most {_KEY_BYTES} fit")


def _image_size(sample: Sample) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            width, height = image.size
            found = image.format
    except (OSError, ValueError) as error:
        raise _broken(sample, f"the image cannot be decoded: {error}") from error
    # MPO: a JPEG with further pictures behind the first, as some cameras store it.
    if found not in {"jpg": ("JPEG", "MPO"), "png": ("PNG",)}[sample.image_format]:
        raise _broken(sample, f"the image is a {found} file, not {sample.image_format}")
    if max(height, width) > _MAX_SIDE_PX:
        raise _broken(sample, f"the image is {height} x {width}, sides may have {_MAX_SIDE_PX} px")
    return height, width


def _broken(sample: Sample, problem: str) -> DataError:
    return DataError(f"{sample.source} (key '{sample.key}'): {problem}")
