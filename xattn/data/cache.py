"""Whole files of remote shard folders on this machine's disk, shared by all its processes.

A file is named by the sha256 of its bytes, so that two data sets never collide and equal shards are
kept once. It appears only when its hash has been checked, and the file not used for longest goes
when another needs its room. A kill leaves nothing but a partial, which the next download removes.

`XATTN_CACHE` is the folder, ~/.cache/xattn/shards by default; a disk of this machine is best.
`XATTN_CACHE_GB` is its limit, 50 by default; 0 keeps no shards, and every sample is a request.
"""

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from xattn.errors import CapacityError, ConfigError
from xattn.remote import Bucket
from xattn.storage import free_bytes, refused_disk, sha256_file

_DEFAULT_FOLDER = "~/.cache/xattn/shards"
_DEFAULT_GB = "50"
_PARTIAL = ".partial"
_OURS = re.compile(rf"[0-9a-f]{{64}}(?:{re.escape(_PARTIAL)})?")


def cache_folder() -> Path:
    """Return the folder that XATTN_CACHE names, or the default one."""
    return Path(os.environ.get("XATTN_CACHE") or _DEFAULT_FOLDER).expanduser()


def cache_bytes() -> int:
    """Return the limit that XATTN_CACHE_GB names, in bytes.

    Raises:
        ConfigError: it is not a number, or negative.
    """
    text = os.environ.get("XATTN_CACHE_GB") or _DEFAULT_GB
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ConfigError(f"XATTN_CACHE_GB is '{text}', expected gigabytes, 0 or more")
    return limit


class ShardCache:
    """A folder of whole files; any number of processes and threads may use it at once.

    Args:
        folder: made when missing.
        max_bytes: what it may hold. Downloads that run are counted but not broken off, so a file
            that is larger alone, or many downloads at once, may exceed it until the next one. A
            file that is removed while a process has it open stays readable there, and on the disk,
            until it is closed.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def fetch(self, bucket: Bucket, name: str, sha256: str, num_bytes: int | None = None) -> Path:
        """Return a local file with the bytes of an object, fetching it if it is not here.

        Open it at once: another process may need its room. Of several that ask for the same file,
        one fetches it and the others wait.

        Args:
            bucket: where it comes from.
            name: of the object.
            sha256: of its bytes.
            num_bytes: of the object, None if the store has to be asked.

        Raises:
            CapacityError: the disk has not enough room, even without everything else in here.
            DataError, DamageError: see `Bucket.download`.
        """
        file = self._folder / sha256
        with refused_disk(self._folder):
            if not _mark_used(file):
                with self._lock(sha256):
                    if not _mark_used(file):  # nobody fetched it meanwhile
                        self._download(bucket, name, file, num_bytes or bucket.size(name) or 0)
        return file

    def drop_damaged(self, sha256: str) -> None:
        """Remove a file whose bytes have changed on the disk; a sound one stays."""
        file = self._folder / sha256
        with refused_disk(self._folder), suppress(FileNotFoundError), self._lock(sha256):
            if sha256_file(file) != sha256:
                file.unlink()

    def _download(self, bucket: Bucket, name: str, file: Path, num_bytes: int) -> None:
        partial = file.with_name(file.name + _PARTIAL)
        try:
            with self._lock("room"):
                self._make_room(partial, num_bytes)
            bucket.fill(partial, name, file.name, num_bytes)
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
            partial.replace(file)
            _mark_used(file)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, partial: Path, num_bytes: int) -> None:
        """Remove what was not used for longest until `partial` fits, and reserve its size."""
        partial.unlink(missing_ok=True)
        self._remove_leftovers()
        files = self._files()
        held = sum(stat.st_size for stat in files.values())
        for file in sorted(files, key=lambda file: files[file].st_atime_ns):
            if held + num_bytes <= self._max_bytes and free_bytes(self._folder) >= num_bytes:
                break
            if file.suffix != _PARTIAL:
                file.unlink(missing_ok=True)
                held -= files[file].st_size
        free = free_bytes(self._folder)
        if free < num_bytes:
            raise CapacityError(
                f"{self._folder}: {num_bytes} bytes are needed for a shard and {free} are free; "
                "make room there, or let XATTN_CACHE name a folder on a larger disk"
            )
        with partial.open("wb") as stream:
            stream.truncate(num_bytes)  # so that others count it from now on

    def _files(self) -> dict[Path, os.stat_result]:
        """Return what is ours in the folder; whatever else lies there is left alone."""
        found = {}
        for entry in os.scandir(self._folder):
            if _OURS.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # renamed or dropped meanwhile
                    found[Path(entry.path)] = entry.stat()
        return found

    def _remove_leftovers(self) -> None:
        """Remove the partials of processes that are gone: nobody holds their locks."""
        for partial in [file for file in self._files() if file.suffix == _PARTIAL]:
            with suppress(Timeout), self._lock(partial.stem, timeout=0):
                partial.unlink(missing_ok=True)

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        folder = self._folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / name, timeout=timeout)


def _mark_used(file: Path) -> bool:
    """Note the time of use; return whether there is such a file."""
    try:
        # The time of change stays: it tells whether bytes that were checked are still the same.
        os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True
