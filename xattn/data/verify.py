"""Shards against their index: every kind of damage is found and named, with what mends it."""

import io
import json
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from xattn.data.index import (
    DECODE_ERRORS,
    INDEX_NAME,
    SUFFIXES,
    TAR_BLOCK_BYTES,
    Shard,
    ShardIndex,
    decode_mask,
    records_name,
)
from xattn.data.target import open_target
from xattn.errors import DataError
from xattn.remote import Bucket
from xattn.storage import sha256_file
from xattn.structures import Box, DatasetInfo

REPAIR = "`xattn shard` with --repair makes it anew from the raw files, `dvc pull` fetches it"
RESHARD = "the raw files were like this: mend them, then `xattn shard`"
REMOVE = "remove it"

_MAX_LOCATED = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of a shard folder.

    Args:
        shard: the file's name in the folder.
        key: the sample that is hit, None where the whole file is.
        offset: of the damaged field's bytes in the file, None likewise.
        problem: what was found and what was expected.
        fix: what to do.
    """

    shard: str
    key: str | None
    offset: int | None
    problem: str
    fix: str


def verify(
    place: Path | str,
    deep: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Finding]:
    """Compare a shard folder with its index.

    Args:
        place: the folder, or "s3://bucket/folder".
        deep: read every byte: sha256 of each shard, and what each sample holds (masks of the
            image's size, known class ids). Otherwise only the presence and size of the shards and
            the rows are looked at.
        on_progress: called with (shards done, shards in all).

    Returns:
        The faults in the order of splits and shards; empty when there are none. Where a shard
        differs, its damaged samples follow it, the first ten by name.

    Raises:
        DataError: this is no shard folder, or the store does not answer.
    """
    try:
        index = ShardIndex.open(place)
    except DataError as error:
        names = open_target(place).names()
        if not any(name.endswith(".tar") or name == INDEX_NAME for name in names):
            raise
        return [Finding(INDEX_NAME, None, None, str(error), REPAIR)]
    sizes = open_target(index.place).names()
    findings: list[Finding] = []
    owners = {s.sha256: s.name for split in index.splits.values() for s in split.shards}
    done, total = 0, sum(len(split.shards) for split in index.splits.values())
    for name, split in index.splits.items():
        records, faults = _load_sound_records(index, name)
        findings += faults
        for number, shard in enumerate(split.shards):
            rows = None if records is None else records[records["shard"] == number]
            findings += _check_shard(index, shard, sizes.get(shard.name), rows, owners, deep)
            done += 1
            on_progress(done, total)
    listed = {shard.name for split in index.splits.values() for shard in split.shards}
    for extra in sorted({name for name in sizes if name.endswith(".tar")} - listed):
        findings.append(Finding(extra, None, None, "the index does not list it", REMOVE))
    return findings


def _load_sound_records(
    index: ShardIndex, split: str
) -> tuple[npt.NDArray[np.void] | None, list[Finding]]:
    """Return a split's rows and their faults; no rows where they are not those of the index."""
    name, expected = records_name(split), index.splits[split].records_sha256
    if index.location is not None:
        try:
            records = index.records(split)
        except DataError as error:
            return None, [Finding(name, None, None, str(error), REPAIR)]
        return records, list(_check_rows(index, split, records))
    try:
        actual = sha256_file(index.root / name)
    except FileNotFoundError:
        return None, [Finding(name, None, None, "the file is missing", REPAIR)]
    if actual != expected:
        problem = f"sha256 is {actual}, expected {expected}"
        return None, [Finding(name, None, None, problem, REPAIR)]
    records = index.records(split)
    return records, list(_check_rows(index, split, records))


def _check_rows(index: ShardIndex, split: str, records: npt.NDArray[np.void]) -> Iterator[Finding]:
    """Find keys that occur twice and samples that lack what others of their split have."""
    summary = index.splits[split]

    def finding(row: int, problem: str) -> Finding:
        shard = summary.shards[int(records[row]["shard"])].name
        return Finding(shard, bytes(records[row]["key"]).decode(), None, problem, RESHARD)

    order = np.argsort(records["key"], kind="stable")
    keys = records["key"][order]
    for place in np.flatnonzero(keys[1:] == keys[:-1]) + 1:
        yield finding(int(order[place]), "the key occurs twice in this split")
    for field in SUFFIXES:
        has = records[field]["offset"] > 0
        if has.any():
            for row in np.flatnonzero(~has):
                yield finding(int(row), f"has no {field}, while {int(has.sum())} others have one")


def _check_shard(
    index: ShardIndex,
    shard: Shard,
    num_bytes: int | None,
    rows: npt.NDArray[np.void] | None,
    owners: dict[str, str],
    deep: bool,
) -> list[Finding]:
    """Check one tar of `num_bytes` bytes, None if it is not there."""
    if num_bytes is None:
        return [Finding(shard.name, None, None, "the file is missing", REPAIR)]
    if num_bytes < 0:
        return [Finding(shard.name, None, None, "it is no regular file", REMOVE)]
    if num_bytes == 0:
        problem = f"the file is empty, expected {shard.num_bytes} bytes"
        return [Finding(shard.name, None, None, problem, REPAIR)]
    if num_bytes == shard.num_bytes and not deep:
        return []
    with _local_copy(index, shard.name) as file:
        return _check_bytes(file, num_bytes, shard, rows, owners, index.info)


@contextmanager
def _local_copy(index: ShardIndex, name: str) -> Iterator[Path]:
    """Give the path of a tar; one in S3 is fetched for the time being, damaged or not."""
    if index.location is None:
        yield index.root / name
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        copy.write_bytes(Bucket(index.location).read(name))
        yield copy


def _check_bytes(
    file: Path,
    num_bytes: int,
    shard: Shard,
    rows: npt.NDArray[np.void] | None,
    owners: dict[str, str],
    info: DatasetInfo,
) -> list[Finding]:
    if num_bytes != shard.num_bytes:
        problem = f"the file has {num_bytes} bytes, expected {shard.num_bytes}"
    elif (actual := sha256_file(file)) != shard.sha256:
        problem = f"sha256 is {actual}, expected {shard.sha256}"
        if actual in owners:
            problem += f": it holds what belongs in {owners[actual]}"
    else:
        return [] if rows is None else list(_check_samples(file, shard.name, rows, info))
    findings = [Finding(shard.name, None, None, problem, REPAIR)]
    if rows is not None:
        located = list(_locate_damage(file, shard.name, rows))
        findings += located[:_MAX_LOCATED]
        if len(located) > _MAX_LOCATED:
            problem = f"{len(located) - _MAX_LOCATED} more fields are damaged"
            findings.append(Finding(shard.name, None, None, problem, REPAIR))
    return findings


def _locate_damage(file: Path, name: str, rows: npt.NDArray[np.void]) -> Iterator[Finding]:
    """Find the fields whose bytes or tar header are not those that the rows tell of."""
    with file.open("rb") as stream:
        for row in rows:
            key = bytes(row["key"]).decode()
            for field, suffixes in SUFFIXES.items():
                offset, size, crc32 = row[field].item()
                if offset == 0:
                    continue
                stream.seek(offset - TAR_BLOCK_BYTES)
                header, data = stream.read(TAR_BLOCK_BYTES), stream.read(size)
                if len(data) < size:
                    problem = f"the file ends inside the {field} or before it"
                elif zlib.crc32(data) != crc32:
                    problem = f"crc32 of the {field} is {zlib.crc32(data):08x}, not {crc32:08x}"
                elif not _is_header_of(header, {f"{key}.{suffix}" for suffix in suffixes}, size):
                    problem = f"the tar header before the {field} is damaged or another member's"
                else:
                    continue
                yield Finding(name, key, offset, problem, REPAIR)


def _is_header_of(header: bytes, names: set[str], size: int) -> bool:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        return False
    return member.name in names and member.size == size


def _check_samples(
    file: Path, name: str, rows: npt.NDArray[np.void], info: DatasetInfo
) -> Iterator[Finding]:
    """Find what a sound file should not hold; the bytes are those that were written."""
    yield from _locate_damage(file, name, rows)
    checks: dict[str, Callable[[bytes, tuple[int, int], DatasetInfo], str | None]] = {
        "image": _image_fault,
        "mask": _mask_fault,
        "label": _label_fault,
        "boxes": _boxes_fault,
    }
    with file.open("rb") as stream:
        for row in rows:
            sides = int(row["height"]), int(row["width"])
            for field, fault_of in checks.items():
                offset, size, _ = row[field].item()
                if offset == 0:
                    continue
                stream.seek(offset)
                try:
                    fault = fault_of(stream.read(size), sides, info)
                except DECODE_ERRORS as error:
                    fault = f"the {field} cannot be decoded ({error})"
                if fault:
                    yield Finding(name, bytes(row["key"]).decode(), offset, fault, RESHARD)


def _image_fault(data: bytes, sides: tuple[int, int], _info: DatasetInfo) -> str | None:
    with Image.open(io.BytesIO(data)) as image:
        found = image.size[1], image.size[0]
    if found != sides:
        return f"the image has (height, width) {found}, its row says {sides}"
    return None


def _mask_fault(data: bytes, sides: tuple[int, int], info: DatasetInfo) -> str | None:
    mask = decode_mask(data)
    if mask.shape != sides:
        return f"the mask has (height, width) {mask.shape}, the image {sides}"
    counts = np.bincount(mask.reshape(-1), minlength=256)
    known = {*range(info.num_classes), *info.ignore_ids}
    unknown = [int(i) for i in np.flatnonzero(counts) if i not in known]
    if unknown:
        return (
            f"the mask has class id {unknown[0]}, expected 0..{info.num_classes - 1} "
            f"or an ignored one {info.ignore_ids}"
        )
    return None


def _label_fault(data: bytes, _sides: tuple[int, int], info: DatasetInfo) -> str | None:
    return _class_fault(int(data), info)


def _boxes_fault(data: bytes, _sides: tuple[int, int], info: DatasetInfo) -> str | None:
    try:
        boxes = [Box(**box) for box in json.loads(data)]
    except TypeError as error:
        raise ValueError(str(error)) from None
    return next((fault for box in boxes if (fault := _class_fault(box.class_id, info))), None)


def _class_fault(class_id: int, info: DatasetInfo) -> str | None:
    if 0 <= class_id < info.num_classes:
        return None
    return f"class id {class_id} is not in 0..{info.num_classes - 1}"
