"""Index, order and transforms to batches: torch's DataLoader over random reads of the shards.

What a step takes is computed in the parent from `Order`; workers only read, decode and augment. A
worker may get any sample without a difference to it, since all chance comes from (seed, epoch, id).
Each worker computes on one thread (DataLoader sets that), so workers do not crowd the cores.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from xattn.data.index import ShardIndex, ShardReader, decode_mask
from xattn.data.order import Order, OrderSettings, check_divides, eval_positions
from xattn.data.transforms import (
    ClassificationAugment,
    ClassificationEval,
    SegmentationAugment,
    SegmentationEval,
    rng_for,
)
from xattn.errors import ConfigError, DataError, XattnError
from xattn.structures import IGNORE_INDEX, Batch, Task

TrainTransform = SegmentationAugment | ClassificationAugment
EvalTransform = SegmentationEval | ClassificationEval

Ids = list[tuple[int, int]]
"""(epoch, sample id) of the samples of one batch."""
_Parts = tuple[Tensor, Tensor, list[str], list[tuple[int, int]], list[str]]

_FIELDS: dict[Task, str] = {"segmentation": "mask", "classification": "label"}


def build_train_loader(
    index: ShardIndex,
    split: str,
    task: Task,
    augment: TrainTransform | None,
    *,
    seed: int,
    global_batch: int,
    steps: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    order: OrderSettings | None = None,
    skip_damaged: bool = False,
) -> "BatchLoader":
    """Return the batches of global steps start_step .. start_step + steps - 1 for one rank.

    Args:
        index: the shard folder.
        split: name of the split.
        task: "segmentation" or "classification".
        augment: the recipe that fits the task; None gives the pixels as they are stored.
        seed: of the order and of the augmentation.
        global_batch: samples a step over all ranks; a multiple of `world`.
        steps: how many batches to give.
        start_step: the first one; any costs the same to start from.
        rank: 0..world-1.
        world: number of ranks.
        num_workers: processes that read and augment; 0 does it in this one.
        pin_memory: copy batches to page-locked memory for a GPU.
        order: how to shuffle; the default settings if None.
        skip_damaged: put the next sound sample of the split in a damaged one's place and say so in
            `Batch.damaged`, instead of raising. Which one that is depends on the data alone.

    Raises:
        ConfigError: task and recipe do not fit, or the ranks cannot share a batch evenly.
        DataError: the split is missing or empty, or not all its samples have what the task needs.
    """
    check_divides(global_batch, world)
    summary = index.split(split)
    settings = order or OrderSettings()
    sequence = Order(
        [shard.num_samples for shard in summary.shards],
        seed,
        settings.partitions,
        settings.block_shards,
    )
    samples = _Samples(index, split, task, augment, seed, skip_damaged)
    batches = _TrainBatches(
        sequence, range(start_step, start_step + steps), global_batch, rank, world
    )
    return BatchLoader(samples, batches, num_workers, pin_memory)


def build_eval_loader(
    index: ShardIndex,
    split: str,
    task: Task,
    transform: EvalTransform | None,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> "BatchLoader":
    """Return every sample of the split that falls to this rank, each once and in order.

    Neighbours whose images and targets have the same size share a batch of up to `batch`; so a
    split of images of all sizes comes one by one. Ranks may get different numbers of batches.

    Args:
        index: the shard folder.
        split: name of the split.
        task: "segmentation" or "classification".
        transform: the recipe that fits the task; None gives the pixels as they are stored.
        batch: most samples in a batch.
        rank: 0..world-1.
        world: number of ranks.
        num_workers: processes that read and decode; 0 does it in this one.
        pin_memory: copy batches to page-locked memory for a GPU.

    Raises:
        ConfigError: task and recipe do not fit.
        DataError: the split is missing, or not all its samples have what the task needs.
    """
    assert batch >= 1, batch
    samples = _Samples(index, split, task, transform, seed=0)
    rows = index.records(split)
    own = eval_positions(len(rows), rank, world)
    sizes = np.stack([rows["height"], rows["width"]], axis=1)[own.start :: own.step].tolist()
    if task == "classification" and transform is not None:
        sizes = [None] * len(sizes)
    return BatchLoader(samples, _group_equal(own, sizes, batch), num_workers, pin_memory)


class BatchLoader:
    """Iterates over `Batch`; each new iteration starts again from the first batch.

    A fault of the data raises the same `DataError` or `DamageError`, with the same one line of
    text, whether a worker met it or this process.
    """

    def __init__(
        self, samples: "_Samples", batches: "Sequence[Ids] | _TrainBatches", workers: int, pin: bool
    ) -> None:
        self._num_batches = len(batches)
        self._loader: DataLoader[Any] = DataLoader(
            samples,
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            pin_memory=pin,
            collate_fn=_unchanged,
            # DataLoader draws a number at each start: not from the generator that models use.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        for parts in self._loader:
            if isinstance(parts, XattnError):
                raise parts
            images, target, keys, sizes, damaged = parts
            shapes = tuple((height, width) for height, width in sizes)
            yield Batch(images, target, tuple(keys), shapes, tuple(damaged))


class _TrainBatches:
    """The ids of each step, computed as the loader asks for them."""

    def __init__(
        self, order: Order, steps: range, global_batch: int, rank: int, world: int
    ) -> None:
        self._order, self._steps, self._global_batch = order, steps, global_batch
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Ids]:
        for step in self._steps:
            yield self._order.batch(step, self._global_batch, self._rank, self._world)


class _Samples(Dataset[Any]):
    """Maps the ids of a batch to its tensors, or to the fault that was met on the way."""

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        task: Task,
        transform: TrainTransform | EvalTransform | None,
        seed: int,
        skip_damaged: bool = False,
    ) -> None:
        _check_fit(index, split, task, transform)
        self._reader = ShardReader(index, split)
        self._field, self._transform, self._seed = _FIELDS[task], transform, seed
        self._skip_damaged = skip_damaged
        self._targets = np.arange(256, dtype=np.uint8)
        self._targets[list(index.info.ignore_ids)] = IGNORE_INDEX

    def __getitem__(self, ids: Ids) -> _Parts | XattnError:
        damaged: list[str] = []
        try:
            samples = [self._load_sound(epoch, position, damaged) for epoch, position in ids]
        except XattnError as error:
            # DataLoader would put the worker's traceback into the text: pass it as a value.
            return error
        images, targets, positions = zip(*samples, strict=True)
        return (
            _stack(images),
            default_collate(list(targets)),
            [self._reader.key(position) for position in positions],
            [self._reader.size(position) for position in positions],
            damaged,
        )

    def _load_sound(
        self, epoch: int, position: int, damaged: list[str]
    ) -> tuple[Tensor, Tensor, int]:
        """Load a sample, or the next sound one; adds what was wrong to `damaged`."""
        for place in range(position, position + len(self._reader)):
            try:
                image, target = self._load(epoch, place % len(self._reader))
            except DataError as error:
                if not self._skip_damaged:
                    raise
                damaged.append(str(error))
            else:
                return image, target, place % len(self._reader)
        raise DataError(f"no sample of the split is sound; the last: {damaged[-1]}")

    def _load(self, epoch: int, position: int) -> tuple[Tensor, Tensor]:
        fields = self._reader.read(position)
        try:
            image = decode_image(fields["image"])
            if self._field == "label":
                target = torch.tensor(int(fields["label"]))
            else:
                target = torch.from_numpy(np.take(self._targets, decode_mask(fields["mask"])))
        except (RuntimeError, OSError, ValueError) as error:
            place = self._reader.place(position)
            raise DataError(f"{place}: cannot be decoded: {error}") from error
        image, target = self._apply(image, target, epoch, position)
        return image, target.long()

    def _apply(
        self, image: Tensor, target: Tensor, epoch: int, position: int
    ) -> tuple[Tensor, Tensor]:
        match self._transform:
            case SegmentationAugment() as augment:
                return augment(image, target, rng_for(self._seed, epoch, position))
            case ClassificationAugment() as augment:
                return augment(image, rng_for(self._seed, epoch, position)), target
            case SegmentationEval() as prepare:
                return prepare(image, target)
            case ClassificationEval() as prepare:
                return prepare(image), target
            case None:
                return image, target


def _check_fit(
    index: ShardIndex, split: str, task: Task, transform: TrainTransform | EvalTransform | None
) -> None:
    if task not in _FIELDS:
        raise ConfigError(f"task '{task}' has no loader, expected one of {', '.join(_FIELDS)}")
    segments = isinstance(transform, SegmentationAugment | SegmentationEval)
    if transform is not None and segments != (task == "segmentation"):
        raise ConfigError(f"{type(transform).__name__} is not a transform for task '{task}'")
    summary, field = index.split(split), _FIELDS[task]
    if summary.fields[field] != summary.count:
        raise DataError(
            f"{index.root}, split '{split}': {summary.fields[field]} of {summary.count} samples "
            f"have a {field}, which {task} needs"
        )


def decode_image(data: bytes) -> Tensor:
    """Decode a JPEG or PNG file to (3, H, W) uint8 RGB.

    Raises:
        RuntimeError: it cannot be decoded.
    """
    # Imported by who decodes: torchvision takes longer to import than torch itself.
    from torchvision import io  # noqa: PLC0415

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: Tensor = io.decode_image(encoded, mode=io.ImageReadMode.RGB)
    return image


def _stack(images: Sequence[Tensor]) -> Tensor:
    """Collate (3, H, W) images as they lie in memory; decoded ones have their channels last."""
    if len(images) == 1 and get_worker_info() is None:
        return images[0][None]
    if images[0].stride(0) == 1:
        stacked: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
        return stacked.permute(0, 3, 1, 2)
    collated: Tensor = default_collate(list(images))
    return collated


def _group_equal(positions: Iterable[int], sizes: Iterable[Any], most: int) -> list[Ids]:
    """Cut `positions` into runs of equal size, `most` long at most; evaluation has epoch 0."""
    groups: list[Ids] = []
    last = None
    for position, size in zip(positions, sizes, strict=True):
        if not groups or size != last or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append((0, position))
        last = size
    return groups


def _unchanged(parts: Any) -> Any:
    return parts
