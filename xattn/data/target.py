"""Where shards are written: a folder of this machine, or one in S3."""

from pathlib import Path
from typing import Protocol

from xattn.remote import Bucket, is_remote
from xattn.storage import sha256_json


class Target(Protocol):
    """What a writer of shards needs of the place where they go."""

    place: str
    """For messages."""

    def names(self) -> dict[str, int]:
        """Return what is there, with its size in bytes; -1 for what is no file."""

    def publish(self, file: Path, name: str) -> None:
        """Move a local file there, whole or not at all."""

    def delete(self, name: str) -> None:
        """Remove a file, which need not exist."""


class LocalTarget:
    """A folder; `publish` renames, so the file must lie on the same disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, str(folder)

    def names(self) -> dict[str, int]:
        """See `Target`."""
        if not self.folder.exists():
            return {}
        return {
            path.name: path.stat().st_size if path.is_file() else -1
            for path in self.folder.iterdir()
        }

    def publish(self, file: Path, name: str) -> None:
        """See `Target`."""
        file.replace(self.folder / name)

    def delete(self, name: str) -> None:
        """See `Target`."""
        (self.folder / name).unlink(missing_ok=True)


class BucketTarget:
    """A folder in S3; `publish` uploads and proves the upload before the local file goes."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.place = bucket, bucket.place

    def names(self) -> dict[str, int]:
        """See `Target`."""
        return dict(self.bucket.list())

    def publish(self, file: Path, name: str) -> None:
        """See `Target`."""
        self.bucket.upload(file, name)
        file.unlink()

    def delete(self, name: str) -> None:
        """See `Target`."""
        self.bucket.delete(name)


def open_target(place: Path | str) -> Target:
    """Return the target of a path or of "s3://bucket/folder"."""
    return BucketTarget(Bucket(str(place))) if is_remote(place) else LocalTarget(Path(place))


def staging_of(place: Path | str, base: Path) -> Path:
    """Return the local folder in which the shards for a place are packed.

    Beside the shards if these are local, so that publishing is renaming.
    """
    if is_remote(place):
        return base / ".xattn" / "staging" / sha256_json(str(place))[:16]
    return Path(place) / ".partial"
