"""One way to write a file so that it is whole or absent, and one way to name its content.

A "partial" is the temporary name beside the final one: all that a kill can leave behind.
"""

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from xattn.errors import CapacityError, DataError

_CHUNK_BYTES = 1 << 20


@contextmanager
def refused_disk(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one line with the place and the space left.

    Raises:
        CapacityError: no space, or a quota or file size limit was reached.
        DataError: the place may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"{path}: the disk is full ({free_bytes(path) / 1e6:.0f} MB left, "
                f"{os.strerror(error.errno)}); nothing half-written was kept"
            ) from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{path}: cannot be written ({reason})") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep every other process from writing the same folder meanwhile.

    Raises:
        DataError: another process is at it.
    """
    with refused_disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise DataError(f"{folder}: another process is writing it") from None
    try:
        yield
    finally:
        lock.release()


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a partial beside `path`, flush it to disk and rename it into place.

    Args:
        path: the final name; its folder is made when missing.
        write: called with the name to fill.

    Raises:
        CapacityError, DataError: see `refused_disk`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with refused_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: the file is missing, is not JSON or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def copy_atomic(source: Path, target: Path) -> None:
    """Copy a file's bytes, whole or not at all."""
    write_atomic(target, lambda partial: shutil.copyfile(source, partial))


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def crc32_file(path: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    checksum = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
