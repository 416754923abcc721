"""The list of small classes of a data set's split, for mIoU_small."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.edge import progress_bar
from xattn.config import PARAMS, load_config
from xattn.data.index import ShardIndex
from xattn.data.loader import build_eval_loader
from xattn.errors import UnknownNameError
from xattn.evaluate.small_classes import (
    Mask,
    SmallClass,
    SmallClassOptions,
    count_small,
    list_file,
)
from xattn.places import shards_dir
from xattn.remote import is_remote
from xattn.storage import write_text
from xattn.structures import Progress


def list_small_classes(
    dataset: str, split: str, base: Path, options: SmallClassOptions, out: Path
) -> list[SmallClass]:
    """Count every class over the masks of a split and write the list of the small ones.

    Args:
        dataset: a key of `datasets` in params.yaml, or a shard folder, local or s3://...
        split: its split; the paper's is the validation set.
        base: the project folder.
        options: what counts as small.
        out: the list, see `xattn.evaluate.small_classes.list_file`.

    Raises:
        ConfigError: there is no such data set.
        DataError: there is no such split, or not all its samples have a mask.
    """
    index = ShardIndex.open(_place_of(dataset, base))
    loader = build_eval_loader(index, split, "segmentation", None, batch=1)

    def masks() -> Iterator[Mask]:
        with progress_bar("small classes", "image") as show:
            for number, batch in enumerate(loader, start=1):
                yield batch.target[0].numpy()
                show(Progress(number, len(loader)))

    classes = count_small(masks(), index.info.class_names, options)
    count = index.split(split).count
    write_text(out, list_file(classes, f"{dataset}/{split}, {count} images", options))
    return classes


def _place_of(dataset: str, base: Path) -> str | Path:
    """Return the shard folder that a name or a place stands for."""
    if is_remote(dataset) or Path(dataset).is_dir():
        return dataset
    known = load_config(base / PARAMS).datasets
    if dataset not in known:
        raise UnknownNameError("data set", dataset, known)
    return shards_dir(base, dataset)
