"""Shards against their index: every kind of damage is found and named, with what mends it."""

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xattn.data.index import RESTORE, SUFFIXES, TAR_BLOCK_BYTES, Shard, ShardIndex, records_name
from xattn.storage import sha256_file

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


def verify(path: Path, deep: bool = False) -> list[Finding]:
    """Compare a shard folder with its index.

    Args:
        path: the folder.
        deep: read every shard and compare its sha256; otherwise only the presence and size of the
            shards and the hash of the rows are looked at.

    Returns:
        The faults in the order of splits and shards; empty when there are none. Where a shard
        differs, its damaged samples follow it, the first ten by name.

    Raises:
        DataError: see `ShardIndex.open`.
    """
    index = ShardIndex.open(path)
    findings: list[Finding] = []
    for name, split in index.splits.items():
        records, faults = _load_sound_records(index, name)
        findings += faults
        for number, shard in enumerate(split.shards):
            findings += _check_shard(index.root / shard.name, shard, number, records, deep)
    listed = {shard.name for split in index.splits.values() for shard in split.shards}
    for extra in sorted({file.name for file in path.glob("*.tar")} - listed):
        findings.append(Finding(extra, None, None, "the index does not list it", "remove the file"))
    return findings


def _load_sound_records(
    index: ShardIndex, split: str
) -> tuple[npt.NDArray[np.void] | None, list[Finding]]:
    name, expected = records_name(split), index.splits[split].records_sha256
    try:
        actual = sha256_file(index.root / name)
    except FileNotFoundError:
        return None, [Finding(name, None, None, "the file is missing", RESTORE)]
    if actual != expected:
        problem = f"sha256 is {actual}, expected {expected}"
        return None, [Finding(name, None, None, problem, RESTORE)]
    return index.records(split), []


def _check_shard(
    file: Path, shard: Shard, number: int, records: npt.NDArray[np.void] | None, deep: bool
) -> list[Finding]:
    if not file.exists():
        return [Finding(shard.name, None, None, "the file is missing", RESTORE)]
    num_bytes = file.stat().st_size
    if num_bytes == 0:
        problem = f"the file is empty, expected {shard.num_bytes} bytes"
        return [Finding(shard.name, None, None, problem, RESTORE)]
    if num_bytes != shard.num_bytes:
        problem = f"the file has {num_bytes} bytes, expected {shard.num_bytes}"
    elif deep and (actual := sha256_file(file)) != shard.sha256:
        problem = f"sha256 is {actual}, expected {shard.sha256}"
    else:
        return []
    findings = [Finding(shard.name, None, None, problem, RESTORE)]
    if records is not None:
        located = list(_locate_damage(file, shard.name, records[records["shard"] == number]))
        findings += located[:_MAX_LOCATED]
        if len(located) > _MAX_LOCATED:
            problem = f"{len(located) - _MAX_LOCATED} more fields are damaged"
            findings.append(Finding(shard.name, None, None, problem, RESTORE))
    return findings


def _locate_damage(file: Path, name: str, rows: npt.NDArray[np.void]) -> Iterator[Finding]:
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
                yield Finding(name, key, offset, problem, RESTORE)


def _is_header_of(header: bytes, names: set[str], size: int) -> bool:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        return False
    return member.name in names and member.size == size
