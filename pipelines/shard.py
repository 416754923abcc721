"""Stage `shard`: a raw data set becomes WebDataset shards with an index.

Run by DVC: python -m pipelines.shard DATASET
"""

import os
import sys
from pathlib import Path

from pipelines.edge import progress_bar, run_to_exit
from xattn.config import load_config
from xattn.data.datasets import (
    DatasetConfig,
    GeneratingReader,
    load_reader,
    reader_settings,
    resolve_root,
    sample_reader,
)
from xattn.data.index import ShardIndex
from xattn.data.shards import link_shards, repair_shards, write_shards
from xattn.data.target import staging_of
from xattn.errors import UnknownNameError
from xattn.places import shards_dir
from xattn.remote import is_remote
from xattn.storage import alone_in, refused_disk
from xattn.structures import Progress


def shard(name: str, base: Path, jobs: int | None = None, repair: bool = False) -> ShardIndex:
    """Shard a data set of params.yaml into data/shards/NAME, see `write_dataset`."""
    config = load_config(base / "params.yaml")
    if name not in config.datasets:
        raise UnknownNameError("data set", name, config.datasets)
    dataset, out = config.datasets[name], shards_dir(base, name)
    if dataset.remote is None:
        return write_dataset(name, dataset, base, out, jobs, repair)
    index = write_dataset(name, dataset, base, dataset.remote, jobs, repair)
    with alone_in(out):
        link_shards(index, out)
    return ShardIndex.open(out)


def write_dataset(
    name: str,
    dataset: DatasetConfig,
    base: Path,
    out: Path | str,
    jobs: int | None = None,
    repair: bool = False,
) -> ShardIndex:
    """Read a raw data set (drawing it first if it is a drawn one) and write its shards.

    Args:
        name: for the progress bar.
        dataset: reader, root and settings.
        base: where relative roots start.
        out: the shard folder, or "s3://bucket/folder".
        jobs: processes that read and pack; by default one a core.
        repair: make only what is damaged anew.
    """
    with alone_in(staging_of(out, base) if is_remote(out) else Path(out).resolve()):
        return _write_alone(name, dataset, base, out, jobs, repair)


def _write_alone(
    name: str, dataset: DatasetConfig, base: Path, out: Path | str, jobs: int | None, repair: bool
) -> ShardIndex:
    reader, settings = load_reader(dataset.reader), reader_settings(dataset)
    root = resolve_root(dataset, base)
    if isinstance(reader, GeneratingReader):
        with progress_bar(f"draw {name}", "img") as show, refused_disk(root):
            reader.generate(root, settings, lambda done, total: show(Progress(done, total)))
    info = reader.describe(root, settings)
    entries = {split: reader.entries(root, split, settings) for split in info.splits}
    write = repair_shards if repair else write_shards
    with progress_bar(f"shard {name}", "img") as show:
        write(
            out,
            info,
            entries,
            sample_reader(dataset, info),
            dataset.shards,
            jobs=jobs or os.cpu_count() or 1,
            on_progress=lambda done, total: show(Progress(done, total)),
        )
    return ShardIndex.open(out)


if __name__ == "__main__":
    run_to_exit(lambda: shard(sys.argv[1], Path.cwd()))
