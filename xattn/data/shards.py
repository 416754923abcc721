"""Raw data set to shard folder: planned, packed by several processes, published as a whole.

The plan (which samples lie in which shard) follows from the list of entries alone, so shards can be
packed in any order and by any number of processes, and an interrupted run goes on: finished tars
wait in OUT/.partial (or in S3 already) with a record of what they hold, and are redone only if
their raw files changed. When all are there they move to OUT, and index.json comes last: a folder
that has one is whole.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import psutil

from xattn.data.datasets import Entry, check_unique
from xattn.data.index import (
    INDEX_NAME,
    LOCATION_NAME,
    SCHEMA,
    SUFFIXES,
    ShardIndex,
    fingerprint_of,
    record_dtype,
    records_name,
)
from xattn.data.order import permutation
from xattn.data.pack import (
    KEY_BYTES,
    PackedShard,
    Packing,
    ShardPlan,
    pack_shard,
    rows_of_tar,
    write_rows,
)
from xattn.data.stored import ShardSettings
from xattn.data.target import BucketTarget, Target, open_target, staging_of
from xattn.data.verify import verify
from xattn.errors import CapacityError, DataError
from xattn.remote import Bucket
from xattn.storage import (
    crc32_file,
    free_bytes,
    refused_disk,
    sha256_file,
    sha256_json,
    write_atomic,
    write_json,
)
from xattn.structures import DatasetInfo, Sample

QUARANTINE_NAME = "quarantine.json"

_SHARD_BYTES = 128 << 20
_MAX_PER_SHARD = 1000
_SIZED_ENTRIES = 256
_TAR_OVERHEAD_BYTES = 1536  # headers and padding of a sample with two members
_POLL_S = 0.2

OnProgress = Callable[[int, int], None]


def write_shards(
    out: Path | str,
    info: DatasetInfo,
    splits: Mapping[str, Sequence[Entry]],
    read: Callable[[Entry], Sample],
    settings: ShardSettings | None = None,
    *,
    jobs: int = 1,
    on_progress: OnProgress = lambda _done, _total: None,
) -> ShardIndex:
    """Write every split into the folder `out` and return its index.

    What a local `out` held stays until everything new is packed; in S3 its index.json goes before
    the first shard is replaced. A run that is killed leaves at most one unfinished shard a process
    to be done again.

    Args:
        out: a folder or "s3://bucket/folder": new, empty, or a shard folder (finished or not),
            which is replaced.
        info: the data set.
        splits: name -> its entries.
        read: opens the files of an entry; must pickle if `jobs` is above 1.
        settings: order, size and storage.
        jobs: processes that pack.
        on_progress: called now and then with (samples done, samples in all).

    Raises:
        DataError: a sample breaks its promise, too many are corrupt, or `out` holds files that are
            not ours.
        CapacityError: the disk is or gets full; `out` is then as it was.
    """
    settings = settings or ShardSettings()
    target, folder = open_target(out), staging_of(out, Path.cwd())
    with refused_disk(folder):
        _check_ours(target, folder, splits)
        folder.mkdir(parents=True, exist_ok=True)
    bucket = target.bucket if isinstance(target, BucketTarget) else None
    packing = Packing(info, read, settings.images, settings.quarantine, folder, bucket)
    for entries in splits.values():
        check_unique(entries)
    plans = plan_shards(info, splits, read, settings)
    done = _resume(target.names(), folder, plans)
    todo = [plan for plan in plans if plan.name not in done]
    total = sum(len(plan.entries) for plan in plans)
    counter = _Counter(total - sum(len(plan.entries) for plan in todo), total, on_progress)
    quarantine = _Quarantine(settings.quarantine)
    for packed in done.values():
        quarantine.add(packed)
    try:
        if bucket is not None and todo:
            target.delete(INDEX_NAME)
        elif settings.images.keeps_bytes:
            expected = _raw_bytes([entry for plan in todo for entry in plan.entries])
            _check_free_space(folder, expected)
        for packed in _pack_all(packing, todo, jobs, counter):
            quarantine.add(packed)
            done[packed.name] = packed
    except BaseException:
        _remove_if_empty(folder)
        raise
    with refused_disk(folder):
        _publish(target, folder, info, {split: _named(plans, split, done) for split in splits})
    return ShardIndex.open(out)


def link_shards(index: ShardIndex, folder: Path) -> None:
    """Make a local folder that stands for remote shards: their index, and where they are."""
    assert index.location is not None, "the shards are local"
    with refused_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX_NAME).unlink(missing_ok=True)
        for local in folder.glob("*.tar"):  # of a time before the shards were remote
            local.unlink()
    bucket = Bucket(index.location)
    for split, summary in index.splits.items():
        name = records_name(split)
        expected = summary.records_sha256
        bucket.download(name, folder / name, expected, bucket.size(name) or 0)
    write_json(folder / LOCATION_NAME, {"shards": index.location})
    data = bucket.read(INDEX_NAME)
    write_atomic(folder / INDEX_NAME, lambda partial: partial.write_bytes(data))


def repair_shards(
    out: Path | str,
    info: DatasetInfo,
    splits: Mapping[str, Sequence[Entry]],
    read: Callable[[Entry], Sample],
    settings: ShardSettings | None = None,
    *,
    jobs: int = 1,
    on_progress: OnProgress = lambda _done, _total: None,
) -> list[str]:
    """Make what `verify` finds damaged anew from the raw files, byte for byte as it was.

    Takes the arguments with which `write_shards` wrote the folder. A folder without a sound
    index.json is written as a whole.

    Returns:
        The names of the files that were mended or, being none of the index, removed.

    Raises:
        DataError: the raw files do not give the bytes that index.json vouches for; nothing of the
            folder is changed then.
    """
    settings = settings or ShardSettings()
    try:
        index = ShardIndex.open(out)
    except DataError:
        write_shards(out, info, splits, read, settings, jobs=jobs, on_progress=on_progress)
        return [INDEX_NAME]
    damaged = list(dict.fromkeys(finding.shard for finding in verify(out, deep=True)))
    listed = {shard.name: shard for split in index.splits.values() for shard in split.shards}
    plans = {plan.name: plan for plan in plan_shards(info, splits, read, settings)}
    todo = [plans[name] for name in damaged if name in plans and name in listed]
    target, folder = open_target(out), staging_of(out, Path.cwd())
    _check_same(target, "", set(plans) == set(listed), "the entries give other shards")
    with refused_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _resume({}, folder, [])  # whatever lay there is in the way
    packing = Packing(info, read, settings.images, settings.quarantine, folder)
    counter = _Counter(0, sum(len(plan.entries) for plan in todo), on_progress)
    try:
        for packed in _pack_all(packing, todo, jobs, counter):
            same = packed.sha256 == listed[packed.name].sha256
            _check_same(target, packed.name, same, "its raw files give other bytes now")
        with refused_disk(folder):
            for plan in todo:
                target.publish(folder / plan.name, plan.name)
            for split, summary in index.splits.items():
                name = records_name(split)
                if name in damaged:
                    tars = [index.shard_path(split, n) for n in range(len(summary.shards))]
                    rows = [rows_of_tar(tar, number) for number, tar in enumerate(tars)]
                    write_rows(folder / name, join_rows(rows))
                    same = sha256_file(folder / name) == summary.records_sha256
                    _check_same(target, name, same, "the shards give other rows")
                    target.publish(folder / name, name)
            for name in set(damaged) - set(listed) - {records_name(s) for s in index.splits}:
                target.delete(name)
    finally:
        shutil.rmtree(folder)
    return damaged


def _check_same(target: Target, name: str, same: bool, otherwise: str) -> None:
    if not same:
        raise DataError(
            f"{target.place}/{name}: cannot be repaired, {otherwise}; the raw data, the settings "
            "or this program changed since; make the folder anew with `xattn shard`"
        )


def _named(
    plans: Sequence[ShardPlan], split: str, done: Mapping[str, PackedShard]
) -> list[PackedShard]:
    return [done[plan.name] for plan in plans if plan.split == split]


def plan_shards(
    info: DatasetInfo,
    splits: Mapping[str, Sequence[Entry]],
    read: Callable[[Entry], Sample],
    settings: ShardSettings,
) -> list[ShardPlan]:
    """Decide which samples lie in which shard: a function of the entries and the settings.

    Only the fingerprints, by which an interrupted run is gone on with, depend on `read` and on the
    raw files' times.
    """
    reader = repr(read.args) if isinstance(read, functools.partial) else ""
    kept = settings.images.model_dump(), settings.quarantine > 0
    common = [dataclasses.asdict(info), reader, *kept, SCHEMA, PIL.__version__]
    every = [entry for entries in splits.values() for entry in entries]
    size = settings.samples_per_shard or _samples_per_shard(every)
    plans = []
    for split, entries in splits.items():
        ordered: Sequence[Entry] = entries
        if split.startswith("train") and settings.shuffle_seed is not None:
            order = permutation(len(entries), (settings.shuffle_seed, len(entries)))
            ordered = [entries[place] for place in order]
        for number, first in enumerate(range(0, len(ordered), size)):
            chosen = tuple(ordered[first : first + size])
            stamps = [(entry.key, entry.image, _stamp(entry)) for entry in chosen]
            fingerprint = sha256_json([common, split, number, stamps])
            plans.append(ShardPlan(split, number, chosen, fingerprint))
    return plans


def _samples_per_shard(entries: Sequence[Entry]) -> int:
    """Return how many samples fill a shard, judged by the size of some raw files."""
    chosen = entries[:: max(1, len(entries) // _SIZED_ENTRIES)]
    mean = _raw_bytes(chosen) / max(len(chosen), 1)
    return max(1, min(_MAX_PER_SHARD, int(_SHARD_BYTES / max(mean, 1.0))))


def _raw_bytes(entries: Sequence[Entry]) -> int:
    """Return the bytes of the raw files and of their tar headers; a missing file has none."""
    return sum(_TAR_OVERHEAD_BYTES + sum(size for size, _ in _stamp(entry)[0]) for entry in entries)


def _stamp(entry: Entry) -> tuple[list[tuple[int, int]], str]:
    """Return (bytes, time of change) of an entry's files, and its target as text."""
    target = entry.target if isinstance(entry.target, list | tuple) else [entry.target]
    files = [entry.image, *(item for item in target if isinstance(item, str))]
    stamps = []
    for file in files:
        try:
            state = os.stat(file)
        except OSError:
            continue  # its reader will say so
        stamps.append((state.st_size, state.st_mtime_ns))
    return stamps, repr(entry.target)


def _check_ours(target: Target, folder: Path, splits: Iterable[str]) -> None:
    """Raise a DataError if the target holds a file that a run of ours did not leave there.

    Args:
        target: where the shards go.
        folder: where an interrupted run packed them.
        splits: those of this run; others may have been written before.
    """
    packed = [record.name[: -len("-000000.tar.json")] for record in folder.glob("*.tar.json")]
    known_splits = {*splits, *packed}
    with contextlib.suppress(DataError):
        known_splits |= ShardIndex.open(target.place).splits.keys()
    names = "|".join(re.escape(name) for name in sorted(known_splits))
    known = (INDEX_NAME, QUARANTINE_NAME, LOCATION_NAME, ".partial")
    fixed = "|".join(re.escape(name) for name in known)
    ours = re.compile(
        rf"\.?(?:{fixed}|(?:{names})(?:-\d{{6}}\.tar|\.index\.npy))(?:\.\d+\.partial)?"
    )
    foreign = sorted(name for name in target.names() if not ours.fullmatch(name))
    if foreign:
        raise DataError(
            f"{target.place} holds '{foreign[0]}', which is not a file of these shards; "
            "give an empty folder or move the file away"
        )


def _resume(
    published: Mapping[str, int], folder: Path, plans: Sequence[ShardPlan]
) -> dict[str, PackedShard]:
    """Return the shards that an earlier run finished, and remove what else it left.

    Args:
        published: files of the target and their sizes: remote tars, and local ones that a run
            which was killed while it published has moved.
        folder: where shards are packed.
        plans: the shards that are wanted.
    """
    done = {}
    for plan in plans:
        with contextlib.suppress(DataError):
            packed = PackedShard.load(folder, plan.name)
            waiting = folder / plan.name
            found = waiting.stat().st_size if waiting.exists() else published.get(plan.name)
            if packed.plan == plan.fingerprint and packed.num_bytes == found:
                done[plan.name] = packed
    kept = {f"{name}{suffix}" for name in done for suffix in ("", ".json", ".npy")}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    return done


def _check_free_space(folder: Path, expected_bytes: int) -> None:
    free = free_bytes(folder)
    if expected_bytes > free:
        raise CapacityError(
            f"about {expected_bytes / 1e9:.3g} GB will be written to {folder.parent}, "
            f"but only {free / 1e9:.3g} GB are free there"
        )


def _remove_if_empty(folder: Path) -> None:
    """Leave no empty folders behind a run that finished no shard."""
    for path in (folder, folder.parent):
        with contextlib.suppress(OSError):
            path.rmdir()


class _Counter:
    """Sums the samples of all processes for the progress bar."""

    def __init__(self, done: int, total: int, on_progress: OnProgress) -> None:
        self._done, self._total, self._on_progress = done, total, on_progress

    def set(self, packed: int) -> None:
        self._on_progress(self._done + packed, self._total)


class _Quarantine:
    """Counts the samples that were set aside over all shards."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reasons: list[str] = []

    def add(self, packed: PackedShard) -> None:
        self._reasons += packed.quarantined.values()
        if len(self._reasons) > self._limit:
            raise DataError(
                f"{len(self._reasons)} corrupt samples, {self._limit} may be set aside "
                f"(quarantine); the last: {self._reasons[-1]}"
            )


def _pack_all(
    packing: Packing, plans: Sequence[ShardPlan], jobs: int, counter: _Counter
) -> Iterator[PackedShard]:
    """Yield shards as they are finished."""
    if jobs <= 1 or len(plans) <= 1:
        yield from _pack_here(packing, plans, counter)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["xattn.data.pack", "webdataset"])  # once, not once a process
    packed, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(
        min(jobs, len(plans)), context, initializer=_join_pool, initargs=(packed, stop, os.getpid())
    ) as pool:
        futures: set[Future[PackedShard]] = {
            pool.submit(_pack_in_pool, packing, plan) for plan in plans
        }
        try:
            while futures:
                finished, futures = wait(futures, _POLL_S, FIRST_COMPLETED)
                counter.set(packed.value)
                for future in finished:
                    yield future.result()
        except BrokenProcessPool:
            raise CapacityError(
                "a packing process was killed, perhaps for want of memory; the finished shards are "
                "kept: run again, with fewer --jobs"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _pack_here(
    packing: Packing, plans: Sequence[ShardPlan], counter: _Counter
) -> Iterator[PackedShard]:
    packed = 0

    def count() -> None:
        nonlocal packed
        packed += 1
        counter.set(packed)

    for plan in plans:
        yield pack_shard(packing, plan, count)


@dataclass(slots=True)
class _Pool:
    """What a packing process shares with the others: samples packed, and whether to stop."""

    packed: Any = None
    stop: Any = None


_POOL = _Pool()


class _Stopped(BaseException):
    """Another process met a fault; what is unfinished is given up."""


def _join_pool(packed: Any, stop: Any, parent: int) -> None:
    _POOL.packed, _POOL.stop = packed, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which says stop
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process when the one that it packs for was killed."""
    while psutil.pid_exists(parent):
        time.sleep(_POLL_S)
    os._exit(1)


def _pack_in_pool(packing: Packing, plan: ShardPlan) -> PackedShard:
    def count() -> None:
        if _POOL.stop.is_set():
            raise _Stopped
        with _POOL.packed.get_lock():
            _POOL.packed.value += 1

    return pack_shard(packing, plan, count)


def _publish(
    target: Target,
    folder: Path,
    info: DatasetInfo,
    of_split: Mapping[str, Sequence[PackedShard]],
) -> None:
    """Move everything from the partial folder to its place; index.json goes first, comes last."""
    entries = {
        split: _split_entry(split, info, shards, folder) for split, shards in of_split.items()
    }
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "dataset": dataclasses.asdict(info),
        "splits": entries,
    }
    # Through JSON and back, so that the tuples of `info` count as the lists they become.
    document["fingerprint"] = fingerprint_of(json.loads(json.dumps(document)))
    target.delete(INDEX_NAME)
    new = [shard.name for shards in of_split.values() for shard in shards]
    new += [records_name(split) for split in entries]
    quarantined = {
        split: {key: why for shard in shards for key, why in shard.quarantined.items()}
        for split, shards in of_split.items()
    }
    if any(quarantined.values()):
        write_json(folder / QUARANTINE_NAME, quarantined)
        new.append(QUARANTINE_NAME)
    for name in new:
        if (folder / name).exists():
            target.publish(folder / name, name)
    for name in target.names().keys() - {*new, folder.name}:
        target.delete(name)
    write_json(folder / INDEX_NAME, document)
    target.publish(folder / INDEX_NAME, INDEX_NAME)
    shutil.rmtree(folder)


def _split_entry(
    split: str, info: DatasetInfo, shards: Sequence[PackedShard], folder: Path
) -> dict[str, Any]:
    """Write the rows of a split and return its entry of index.json."""
    rows = join_rows([shard.rows(folder) for shard in shards])
    file = folder / records_name(split)
    write_rows(file, rows)
    ignored = list(info.ignore_ids)
    pixels = np.sum([shard.pixels for shard in shards], axis=0, dtype=np.int64, initial=0)
    pixels = np.zeros(256, np.int64) + pixels
    images = np.zeros(info.num_classes, np.int64)
    for shard in shards:
        images += shard.images
    classes = pixels[: info.num_classes].copy()
    classes[[i for i in ignored if i < len(classes)]] = 0
    return {
        "samples": len(rows),
        "fields": {field: int((rows[field]["offset"] > 0).sum()) for field in SUFFIXES},
        "class_counts": {
            "pixels": classes.tolist(),
            "ignored_pixels": int(pixels[ignored].sum()),
            "images": images.tolist(),
        },
        "shards": [
            {
                "name": shard.name,
                "bytes": shard.num_bytes,
                "samples": shard.num_samples,
                "sha256": shard.sha256,
            }
            for shard in shards
        ],
        "records_sha256": sha256_file(file),
        "records_crc32": crc32_file(file),
        "quarantined": sorted(key for shard in shards for key in shard.quarantined),
    }


def join_rows(parts: Sequence[npt.NDArray[np.void]]) -> npt.NDArray[np.void]:
    """Join the rows of a split's shards, the key as wide as the longest."""
    rows = np.concatenate([np.empty(0, record_dtype(KEY_BYTES)), *parts])
    longest = max((len(key) for key in rows["key"]), default=1)
    return rows.astype(record_dtype(longest))
