"""Raw files as a data set's owner would have them, and what a reader makes of them."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xattn.data.datasets import Entry
from xattn.data.index import ShardIndex
from xattn.data.shards import write_shards
from xattn.data.stored import ShardSettings
from xattn.structures import DatasetInfo, Sample


class Samples:
    """Reads what was made in memory; notes what is opened, and fails where it is told to."""

    def __init__(
        self,
        samples: Iterable[Sample],
        fail_at: str | None = None,
        error: type[BaseException] | BaseException = KeyboardInterrupt,
    ) -> None:
        samples = list(samples)
        self.of_key = {sample.key: sample for sample in samples}
        self.entries = [Entry(sample.key, sample.source) for sample in samples]
        self.fail_at, self.error, self.opened = fail_at, error, []

    def __call__(self, entry: Entry) -> Sample:
        if entry.key == self.fail_at:
            raise self.error
        self.opened.append(entry.key)
        return self.of_key[entry.key]


def write_samples(
    out: Path, info: DatasetInfo, splits: dict[str, Iterable[Sample]], **settings: Any
) -> ShardIndex:
    """Shard samples in the order in which they are given."""
    of_split = {name: list(samples) for name, samples in splits.items()}
    entries = {
        name: [Entry(sample.key, sample.source, (name, row)) for row, sample in enumerate(samples)]
        for name, samples in of_split.items()
    }

    def read(entry: Entry) -> Sample:
        split, row = entry.target
        return of_split[split][row]

    return write_shards(out, info, entries, read, ShardSettings(shuffle_seed=None, **settings))


def samples_of(reader: Any, root: Path, split: str, settings: Any) -> Iterator[Sample]:
    """Read a split as sharding does: all entries first, then one sample after the other."""
    info = reader.describe(root, settings)
    for entry in reader.entries(root, split, settings):
        yield reader.read(entry, info, settings)


def write_image(path: Path, size=(8, 6), mode="RGB", value=90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fill = value if mode in ("L", "P", "I;16") else (value,) * len(mode)
    Image.new(mode, size, fill).save(path)
    return path


def write_mask(path: Path, ids, mode="L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.asarray(ids, np.uint8)
    image = Image.frombytes(mode, ids.shape[::-1], ids.tobytes())
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
