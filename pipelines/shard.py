"""Stage `shard`: a raw data set becomes WebDataset shards with an index.

Run by DVC: python -m pipelines.shard DATASET
"""

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
)
from xattn.data.index import ShardIndex
from xattn.data.shards import write_shards
from xattn.errors import UnknownNameError
from xattn.places import shards_dir
from xattn.storage import alone_in, refused_disk
from xattn.structures import Progress


def shard(name: str, base: Path) -> ShardIndex:
    """Shard a data set of params.yaml into data/shards/NAME."""
    config = load_config(base / "params.yaml")
    if name not in config.datasets:
        raise UnknownNameError("data set", name, config.datasets)
    return write_dataset(name, config.datasets[name], base, shards_dir(base, name))


def write_dataset(name: str, dataset: DatasetConfig, base: Path, out: Path) -> ShardIndex:
    """Read a raw data set (drawing it first if it is a drawn one) and write its shards.

    Args:
        name: for the progress bar.
        dataset: reader, root and settings.
        base: where relative roots start.
        out: the shard folder.
    """
    with alone_in(out):
        return _write_alone(name, dataset, base, out)


def _write_alone(name: str, dataset: DatasetConfig, base: Path, out: Path) -> ShardIndex:
    reader, settings = load_reader(dataset.reader), reader_settings(dataset)
    root = resolve_root(dataset, base)
    if isinstance(reader, GeneratingReader):
        with progress_bar(f"draw {name}", "img") as show, refused_disk(root):
            reader.generate(root, settings, lambda done, total: show(Progress(done, total)))
    info = reader.describe(root, settings)
    entries = {split: reader.entries(root, split, settings) for split in info.splits}
    counts = {split: len(found) for split, found in entries.items()}
    splits = {
        split: (len(found), (reader.read(entry, info, settings) for entry in found))
        for split, found in entries.items()
    }
    before = dict(zip(counts, _sums_before(list(counts.values())), strict=True))
    with progress_bar(f"shard {name}", "img") as show:
        return write_shards(
            out,
            info,
            splits,
            on_progress=lambda split, done, _total: show(
                Progress(before[split] + done, sum(counts.values()))
            ),
        )


def _sums_before(numbers: list[int]) -> list[int]:
    return [sum(numbers[:place]) for place in range(len(numbers))]


if __name__ == "__main__":
    run_to_exit(lambda: shard(sys.argv[1], Path.cwd()))
