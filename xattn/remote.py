"""A folder in S3, or in any store that speaks S3: the only place that knows boto3.

Endpoint, region and credentials come from the usual AWS chain (AWS_* variables, ~/.aws, the role of
a container or instance) and from nowhere else; no message repeats what a store or boto3 said beyond
its error code, so that none can hold a secret.

Three kinds of patience: botocore repeats requests that were throttled, failed with 5xx or lost
their connection; a body that is cut is continued where it ended; a body that arrives changed is
asked for once more.
"""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xattn.errors import ConfigError, DamageError, DataError, MissingPackageError, XattnError
from xattn.storage import refused_disk, write_atomic

SCHEME = "s3://"

_PLACE = re.compile(r"s3:/{1,2}([^/]+)(?:/(.*))?")  # pathlib makes one slash of two
_MAX_ATTEMPTS = 8  # of one request, and of a body that is cut again and again
_MAX_PAUSE_S = 20.0
_CHUNK_BYTES = 1 << 20
_PART_BYTES = 16 << 20  # S3 takes 10 000 parts: objects of up to 160 GB
_MAX_PARTS_AT_ONCE = 4

_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, the profile AWS_PROFILE (or 'default') of "
    "~/.aws, a web identity, the role of the container or instance"
)
_DENIED = {
    "403",
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}
_MEANINGS = {
    "InvalidRange": "the object ends before the bytes that were asked for",
    "NoSuchBucket": "no such bucket",
    "PreconditionFailed": "the object was replaced while it was read; try again",
}
_CHANGED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"}
_NO_CREDENTIALS = ("Credential", "SSO", "Token", "Profile", "Metadata")
"""Parts of the names of botocore's errors about credentials."""


def is_remote(place: Path | str) -> bool:
    """Return whether `place` names a store and not a local path."""
    return str(place).startswith("s3:/")


class Bucket:
    """The objects below s3://BUCKET/FOLDER, by their names relative to it.

    May be pickled, carried through a fork and used by several threads: each process makes a client
    of its own at its first request.

    Args:
        place: "s3://bucket" or "s3://bucket/folder".

    Raises:
        ConfigError: `place` is not of that form.

    Every method raises besides:
        DataError: no such bucket, access denied, no credentials, or the store does not answer.
        MissingPackageError: boto3 is not installed.
    """

    def __init__(self, place: str) -> None:
        match = _PLACE.fullmatch(place)
        if match is None:
            raise ConfigError(f"found '{place}', expected s3://BUCKET/FOLDER")
        self._bucket, self._folder = match[1], (match[2] or "").strip("/")
        self.place = SCHEME + "/".join(filter(None, (self._bucket, self._folder)))

    def __repr__(self) -> str:
        return f"Bucket('{self.place}')"

    def __reduce__(self) -> tuple[type["Bucket"], tuple[str]]:
        return Bucket, (self.place,)

    def read(self, name: str) -> bytes:
        """Return the bytes of an object.

        Raises:
            DataError: there is none.
        """
        return b"".join(self._stream(name))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of an object from `offset` on; fewer where it ends before.

        Raises:
            DataError: there is none, or it ends at `offset` or before.
        """
        return b"".join(self._stream(name, offset, size)) if size else b""

    def size(self, name: str) -> int | None:
        """Return the number of bytes of an object, None where there is none (or no such bucket)."""
        head = self._head(name)
        return None if head is None else int(head["ContentLength"])

    def list(self) -> Mapping[str, int]:
        """Return name -> number of bytes of everything below the folder, sorted by name."""
        prefix = self._key("") if self._folder else ""
        with self._told(""):
            pages = _client(os.getpid()).get_paginator("list_objects_v2")
            found = {
                entry["Key"].removeprefix(prefix): int(entry["Size"])
                for page in pages.paginate(Bucket=self._bucket, Prefix=prefix)
                for entry in page.get("Contents", ())
            }
        return dict(sorted(found.items()))

    def download(self, name: str, path: Path, sha256: str, num_bytes: int) -> None:
        """Fetch an object into the file `path`, which appears only when its hash is the right one.

        Args:
            name: of the object.
            path: the file; its folder is made when missing.
            sha256: of the object's bytes, 64 hexadecimal digits.
            num_bytes: of the object.

        Raises:
            DataError: there is no such object, or `path` may not be written.
            DamageError: its bytes are others, twice in a row.
            CapacityError: the disk is full.
        """
        write_atomic(path, lambda partial: self.fill(partial, name, sha256, num_bytes))

    def fill(self, file: Path, name: str, sha256: str, num_bytes: int) -> None:
        """Fetch like `download`, but straight into `file`: a fault leaves it half-written."""
        for _ in range(2):
            digest, written = hashlib.sha256(), 0
            # Not "wb": what the caller has reserved of the disk stays reserved.
            with refused_disk(file), file.open("r+b" if file.exists() else "wb") as stream:
                for chunk in self._stream(name):
                    stream.write(chunk)
                    digest.update(chunk)
                    written += len(chunk)
                    if written > num_bytes:  # another object, of whatever size
                        break
                stream.truncate()
            if digest.hexdigest() == sha256:
                return
        raise DamageError(
            f"{self._url(name)}: {written} bytes with sha256 {digest.hexdigest()} arrived, "
            f"expected {num_bytes} bytes with {sha256}; upload it again with `xattn shard`"
        )

    def upload(self, path: Path, name: str) -> None:
        """Store a file as an object, which appears only when it is whole and is then proven.

        An object that already has these bytes is left as it is, so that a broken-off series of
        uploads can simply be run again. Proof is the store's ETag where it is the MD5 of the bytes
        or of their parts; where it is not (KMS encryption, some stores) the object is read back.

        Args:
            path: the file; must not change meanwhile.
            name: of the object.

        Raises:
            DamageError: what arrived is something else, twice in a row; the object is deleted.
        """
        sums = _sums_of_file(path)
        head = self._head(name)
        if head is not None and _etag(head) == sums.etag:
            return
        bucket, key = self._bucket, self._key(name)
        self._put(
            name,
            sums,
            lambda client: client.upload_file(str(path), bucket, key, Config=_transfer_config()),
        )

    def write(self, name: str, data: bytes) -> None:
        """Store a few bytes as an object, proven like those of `upload`."""
        bucket, key = self._bucket, self._key(name)
        self._put(
            name,
            _sums_of_bytes(data),
            lambda client: client.put_object(Bucket=bucket, Key=key, Body=data),
        )

    def delete(self, name: str) -> None:
        """Remove an object, if there is one."""
        with self._told(name):
            _client(os.getpid()).delete_object(Bucket=self._bucket, Key=self._key(name))

    def _put(self, name: str, sums: "_Sums", send: Callable[[Any], object]) -> None:
        for _ in range(2):
            with suppress(DamageError), self._told(name):
                send(_client(os.getpid()))
                if self._is_proven(name, sums):
                    return
        self.delete(name)
        raise DamageError(
            f"{self._url(name)}: what arrived there twice is not what was sent "
            f"({sums.num_bytes} bytes with sha256 {sums.sha256}); the object was deleted"
        )

    def _is_proven(self, name: str, sums: "_Sums") -> bool:
        head = self._head(name)
        if head is None or int(head["ContentLength"]) != sums.num_bytes:
            return False
        if _etag(head) == sums.etag:
            return True
        digest = hashlib.sha256()
        for chunk in self._stream(name):
            digest.update(chunk)
        return digest.hexdigest() == sums.sha256

    def _head(self, name: str) -> dict[str, Any] | None:
        with self._told(name):
            client = _client(os.getpid())
            try:
                head: dict[str, Any] = client.head_object(Bucket=self._bucket, Key=self._key(name))
            except client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
                return None
        return head

    def _stream(self, name: str, offset: int = 0, size: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes (or a range of them), going on where a connection was cut."""
        end = None if size is None else offset + size
        cuts = 0
        same: dict[str, str] = {}
        while True:
            with self._told(name):
                wanted = {} if (offset, end) == (0, None) else {"Range": _range(offset, end)}
                answer = _client(os.getpid()).get_object(
                    Bucket=self._bucket, Key=self._key(name), **wanted, **same
                )
            end = offset + int(answer["ContentLength"])
            same = {"IfMatch": answer["ETag"]}  # the rest must come from the same object
            with closing(answer["Body"]) as body:
                for chunk in _until_cut(body):
                    offset += len(chunk)
                    yield chunk
            if offset >= end:
                return
            cuts += 1
            if cuts == _MAX_ATTEMPTS:
                raise DataError(
                    f"{self._url(name)}: the connection was cut {cuts} times, the last time "
                    f"{end - offset} bytes before the end; try again"
                )
            time.sleep(_pause_s(cuts))

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def _url(self, name: str) -> str:
        return f"{self.place}/{name}" if name else self.place

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Turn what boto3 raises about an object into one line."""
        place = self._url(name)
        try:
            from boto3.exceptions import Boto3Error  # noqa: PLC0415
            from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415
        except ImportError as error:
            raise MissingPackageError(f"{place}: needs boto3, which is not installed") from error
        try:
            yield
        except Boto3Error as error:  # of an upload: the whole text around the error that it met
            raise _fault(place, error.__context__ or error) from None
        except (BotoCoreError, ClientError) as error:
            raise _fault(place, error) from None


def _until_cut(body: Any) -> Iterator[bytes]:
    """Yield a body's bytes until there are no more or the connection is cut."""
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    try:
        while chunk := body.read(_CHUNK_BYTES):
            yield chunk
    except (BotoCoreError, HTTPError, OSError):
        return


@dataclass(frozen=True, slots=True)
class _Sums:
    """What is known of bytes before they are sent; `etag` is what S3 makes of them unencrypted."""

    num_bytes: int
    sha256: str
    etag: str


def _sums_of_file(path: Path) -> _Sums:
    whole, num_bytes = hashlib.sha256(), 0
    parts: list[bytes] = []
    try:
        with path.open("rb") as stream:
            while part := stream.read(_PART_BYTES):
                whole.update(part)
                parts.append(hashlib.md5(part, usedforsecurity=False).digest())
                num_bytes += len(part)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if num_bytes < _PART_BYTES:  # sent whole
        etag = parts[0].hex() if parts else hashlib.md5(b"", usedforsecurity=False).hexdigest()
    else:
        joined = hashlib.md5(b"".join(parts), usedforsecurity=False)
        etag = f"{joined.hexdigest()}-{len(parts)}"
    return _Sums(num_bytes, whole.hexdigest(), etag)


def _sums_of_bytes(data: bytes) -> _Sums:
    etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return _Sums(len(data), hashlib.sha256(data).hexdigest(), etag)


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')


def _range(offset: int, end: int | None) -> str:
    return f"bytes={offset}-{'' if end is None else end - 1}"


@lru_cache(maxsize=2)
def _client(_process: int) -> Any:
    """Return a process's client; one inherited through a fork would share its connections."""
    import boto3  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    config = Config(
        retries={"mode": "standard", "total_max_attempts": _MAX_ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=4 * _MAX_PARTS_AT_ONCE,
        # Whoever reads here compares a hash or a crc32 of the index.
        response_checksum_validation="when_required",
    )
    # A session of its own: the default one must not be shared by threads.
    try:
        client = boto3.session.Session().client("s3", config=config)
    except ValueError:
        raise ConfigError("AWS_ENDPOINT_URL is not an address, expected https://HOST") from None
    client.meta.events.register("needs-retry.s3", _retry_429)
    return client


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig  # noqa: PLC0415

    return TransferConfig(
        multipart_threshold=_PART_BYTES,
        multipart_chunksize=_PART_BYTES,
        max_concurrency=_MAX_PARTS_AT_ONCE,
        preferred_transfer_client="classic",  # the other one has its own retries
    )


def _retry_429(response: Any, attempts: int, **_: Any) -> float | None:
    """Tell botocore how long to wait: its standard mode knows 503 SlowDown, but not status 429."""
    throttled = response is not None and response[0].status_code == 429
    return _pause_s(attempts) if throttled and attempts < _MAX_ATTEMPTS else None


def _pause_s(failures: int) -> float:
    # Not from the generator that models and augmentation may have seeded.
    return random.SystemRandom().uniform(0, min(_MAX_PAUSE_S, 0.5 * 2.0**failures))


def _fault(place: str, error: BaseException) -> XattnError:
    """Return the line about a fault that boto3, botocore or a store reported."""
    from botocore.exceptions import (  # noqa: PLC0415
        BotoCoreError,
        ClientError,
        ConnectionError,  # noqa: A004
        HTTPClientError,
    )

    name = type(error).__name__
    if isinstance(error, ClientError):
        return _refusal(place, error)
    if isinstance(error, HTTPClientError | ConnectionError):
        return DataError(f"{place}: {_endpoint()} does not answer ({name}); try again")
    if isinstance(error, BotoCoreError) and any(part in name for part in _NO_CREDENTIALS):
        return DataError(f"{place}: no usable AWS credentials ({name}); looked for {_CREDENTIALS}")
    return DataError(f"{place}: boto3 cannot ask for it ({name})")


def _refusal(place: str, error: Any) -> XattnError:
    code = re.sub(r"\W+", " ", str(error.response.get("Error", {}).get("Code", "")))
    answer = error.response.get("ResponseMetadata", {})
    status, repeats = answer.get("HTTPStatusCode"), answer.get("RetryAttempts", 0)
    if code in _CHANGED:
        return DamageError(f"{place}: the bytes changed on their way there ({code})")
    if code in _DENIED:
        found = f"access denied ({code}): check the AWS credentials and what they may do there"
    elif code in _MEANINGS:
        found = _MEANINGS[code]
    elif status == 404:
        found = "no such object"
    else:
        found = f"{error.operation_name} failed ({code}, HTTP status {status}, {repeats} repeats)"
    return DataError(f"{place}: {found}")


def _endpoint() -> str:
    """Name the store's host, without what else an address may hold."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return str(urlsplit(url).hostname) if url else "S3"
