"""Index, order and transforms to batches: random reads of the shards, ahead of the training.

What a step takes is computed from the order; threads only read, decode and augment. Any thread may
make any batch without a difference to it, since all chance comes from (seed, visit, sample id).
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Barrier, local
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xattn.data.augment_detection import DetectionAugment, DetectionEval
from xattn.data.index import ShardIndex, ShardReader, decode_mask
from xattn.data.mixing import ClassificationMix
from xattn.data.order import (
    Order,
    OrderSettings,
    RepeatedOrder,
    build_order,
    check_divides,
    eval_positions,
    mixing_partners,
)
from xattn.data.transforms import (
    ClassificationAugment,
    ClassificationEval,
    SegmentationAugment,
    SegmentationEval,
    rng_for,
)
from xattn.errors import ConfigError, DamageError, DataError
from xattn.structures import IGNORE_INDEX, Batch, Box, BoxTarget, Task

TrainTransform = SegmentationAugment | ClassificationAugment | DetectionAugment
EvalTransform = SegmentationEval | ClassificationEval | DetectionEval

_AHEAD = 2  # batches that each thread is ahead of the training


@dataclass(frozen=True, slots=True)
class _Ids:
    """A batch's samples as (visit, sample id), its step, and who is mixed with whom."""

    samples: list[tuple[int, int]]
    step: int = 0
    partners: list[int] | None = None


class _Loaded(NamedTuple):
    """A sample as the model sees it; its target is not batched."""

    image: Tensor
    target: Tensor | BoxTarget
    objects: tuple[Box, ...]
    position: int


_FIELDS: dict[Task, str] = {
    "segmentation": "mask",
    "classification": "label",
    "detection": "boxes",
}
_TRANSFORMS: dict[Task, tuple[type, type]] = {
    "segmentation": (SegmentationAugment, SegmentationEval),
    "classification": (ClassificationAugment, ClassificationEval),
    "detection": (DetectionAugment, DetectionEval),
}


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
    threads: int = 0,
    pin_memory: bool = False,
    order: OrderSettings | None = None,
    skip_damaged: int = 0,
    mix: ClassificationMix | None = None,
) -> "BatchLoader":
    """Return the batches of global steps start_step .. start_step + steps - 1 for one rank.

    Args:
        index: the shard folder.
        split: name of the split.
        task: which of a sample's targets; in training, objects marked difficult or crowd are none.
        augment: the recipe that fits the task; None gives the pixels as they are stored.
        seed: of the order and of the augmentation.
        global_batch: samples a step over all ranks; a multiple of `world`.
        steps: how many batches to give.
        start_step: the first one; any costs the same to start from.
        rank: 0..world-1.
        world: number of ranks.
        threads: that read and augment ahead, each on one core; 0 does it as batches are asked for.
        pin_memory: copy batches to page-locked memory for a GPU.
        order: how to shuffle; the default settings if None.
        skip_damaged: that many damaged samples of a batch give their place to the next sound one
            of the split, which `Batch.damaged` tells; the caller counts over batches. Which sample
            that is depends on the data alone.
        mix: mixes the images of a classification batch and their labels, the same ones on any
            number of ranks; the target is then (B, K) shares of the classes.

    Raises:
        ConfigError: task and recipe do not fit, or the ranks cannot share a batch evenly.
        DataError: the split is missing or empty, or not all its samples have what the task needs.
    """
    check_divides(global_batch, world)
    if mix is not None and task != "classification":
        raise ConfigError(f"mix: images are mixed for classification, not for {task}")
    summary = index.split(split)
    settings = order or OrderSettings()
    sequence = build_order([shard.num_samples for shard in summary.shards], seed, settings)
    samples = _Samples(index, split, task, augment, seed, skip_damaged, mix)
    steps_to_take = range(start_step, start_step + steps)
    batches = _TrainBatches(sequence, steps_to_take, global_batch, rank, world, mix is not None)
    return BatchLoader(samples, batches, threads, pin_memory)


def build_eval_loader(
    index: ShardIndex,
    split: str,
    task: Task,
    transform: EvalTransform | None,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    threads: int = 0,
    pin_memory: bool = False,
) -> "BatchLoader":
    """Return every sample of the split that falls to this rank, each once and in order.

    Neighbours whose images and targets have the same size share a batch of up to `batch`; so a
    split of images of all sizes comes one by one. Ranks may get different numbers of batches.

    Args:
        index: the shard folder.
        split: name of the split.
        task: which of a sample's targets.
        transform: the recipe that fits the task; None gives the pixels as they are stored.
        batch: most samples in a batch.
        rank: 0..world-1.
        world: number of ranks.
        threads: that read and decode ahead; 0 does it as batches are asked for.
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
    if task != "segmentation" and transform is not None:
        sizes = [None] * len(sizes)  # all are shown at one size
    return BatchLoader(samples, _group_equal(own, sizes, batch), threads, pin_memory)


class BatchLoader:
    """Iterates over `Batch`; each new iteration starts again from the first batch.

    Threads, not processes: reading, decoding and augmenting run in C++ without Python's lock, and a
    process would have to copy every batch through shared memory, which costs a third of its time.
    """

    def __init__(
        self,
        samples: "_Samples",
        batches: "Sequence[_Ids] | _TrainBatches",
        threads: int,
        pin: bool,
    ) -> None:
        self._samples, self._batches, self._threads, self._pin = samples, batches, threads, pin

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        if self._threads == 0:
            yield from map(self._make, self._batches)
        else:
            yield from _ahead(self._make, iter(self._batches), self._threads)

    def _make(self, ids: "_Ids") -> Batch:
        batch = self._samples.batch(ids)
        return batch.pin_memory() if self._pin else batch


def _ahead(
    make: Callable[["_Ids"], Batch], items: Iterator["_Ids"], threads: int
) -> Iterator[Batch]:
    """Yield `make` of each item in their order, computed ahead by threads."""
    with _single_threaded_pool(threads) as pool:
        waiting = deque(pool.submit(make, item) for item in islice(items, _AHEAD * threads))
        try:
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(pool.submit(make, item) for item in islice(items, 1))
                yield batch
        finally:
            for future in waiting:
                future.cancel()


def _single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool whose threads compute on one core each; this thread keeps its own number."""
    started = Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that start later
        started.wait()

    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "xattn-loader", start)
    try:
        for _ in range(threads):
            pool.submit(int)
        started.wait()
    except BaseException:
        started.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(own)
    return pool


class _TrainBatches:
    """The ids of each step, computed as the loader asks for them."""

    def __init__(
        self,
        order: Order | RepeatedOrder,
        steps: range,
        global_batch: int,
        rank: int,
        world: int,
        mixes: bool,
    ) -> None:
        self._order, self._steps, self._global_batch = order, steps, global_batch
        self._rank, self._world, self._mixes = rank, world, mixes

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator["_Ids"]:
        place = self._global_batch, self._rank, self._world
        for step in self._steps:
            ids = self._order.batch(step, *place)
            partners = (
                mixing_partners(step, self._global_batch, self._order.partitions, *place[1:])
                if self._mixes
                else None
            )
            yield _Ids(ids, step, partners)


class _Samples:
    """Makes batches of a split; several threads may at once."""

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        task: Task,
        transform: TrainTransform | EvalTransform | None,
        seed: int,
        skip_damaged: int = 0,
        mix: ClassificationMix | None = None,
    ) -> None:
        _check_fit(index, split, task, transform)
        index.records(split)  # what is damaged is said now, not by a thread
        self._index, self._split, self._local = index, split, local()
        self._field, self._transform, self._seed = _FIELDS[task], transform, seed
        self._mix = mix
        self._skip_damaged = skip_damaged
        self._targets = np.arange(256, dtype=np.uint8)
        self._targets[list(index.info.ignore_ids)] = IGNORE_INDEX

    @property
    def _reader(self) -> ShardReader:
        """This thread's reader: it keeps files open and may close them at any read."""
        if not hasattr(self._local, "reader"):
            self._local.reader = ShardReader(self._index, self._split)
        reader: ShardReader = self._local.reader
        return reader

    def batch(self, ids: "_Ids") -> Batch:
        """Read, decode, augment, collate and mix."""
        damaged: list[str] = []
        samples = [self._load_sound(visit, position, damaged) for visit, position in ids.samples]
        pixels = _stack([sample.image for sample in samples])
        target = _collate([sample.target for sample in samples])
        if self._mix is not None and ids.partners is not None:
            rng = rng_for(self._seed, ids.step)
            pixels, target = self._mix(
                pixels, target, self._index.info.num_classes, ids.partners, rng
            )
        return Batch(
            pixels,
            target,
            tuple(self._reader.key(sample.position) for sample in samples),
            tuple(self._reader.size(sample.position) for sample in samples),
            tuple(damaged),
            tuple(sample.objects for sample in samples) if self._field == "boxes" else (),
        )

    def _load_sound(self, visit: int, position: int, damaged: list[str]) -> _Loaded:
        """Load a sample, or the next sound one; adds what was wrong to `damaged`."""
        for place in range(position, position + len(self._reader)):
            try:
                return self._load(visit, place % len(self._reader))
            except DamageError as error:  # not a store that does not answer
                if len(damaged) >= self._skip_damaged:
                    raise
                damaged.append(str(error))
        raise DataError(f"no sample of the split is sound; the last: {damaged[-1]}")

    def _load(self, visit: int, position: int) -> _Loaded:
        fields = self._reader.read(position)
        objects: tuple[Box, ...] = ()
        target: Tensor | BoxTarget
        try:
            image = decode_image(fields["image"])
            if self._field == "label":
                target = torch.tensor(int(fields["label"]))
            elif self._field == "mask":
                target = torch.from_numpy(np.take(self._targets, decode_mask(fields["mask"])))
            else:
                objects = _boxes(fields["boxes"])
                target = _box_target(objects)
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            place = self._reader.place(position)
            raise DamageError(f"{place}: cannot be decoded: {error}") from error
        image, target = self._apply(image, target, visit, position)
        if isinstance(target, Tensor):
            target = target.long()
        return _Loaded(image, target, objects, position)

    def _apply(
        self, image: Tensor, target: Any, visit: int, position: int
    ) -> tuple[Tensor, Tensor | BoxTarget]:
        match self._transform:
            case SegmentationAugment() as augment:
                image, target = augment(image, target, rng_for(self._seed, visit, position))
            case ClassificationAugment() as augment:
                image = augment(image, rng_for(self._seed, visit, position))
            case DetectionAugment() as augment:
                rng = rng_for(self._seed, visit, position)
                image, boxes, kept = augment(image, target.boxes, rng)
                target = BoxTarget(boxes, target.labels[kept])
            case SegmentationEval() as prepare:
                image, target = prepare(image, target)
            case ClassificationEval() as prepare:
                image = prepare(image)
            case DetectionEval() as prepare:
                image, boxes = prepare(image, target.boxes)
                target = BoxTarget(boxes, target.labels)
        return image, target


def _check_fit(
    index: ShardIndex, split: str, task: Task, transform: TrainTransform | EvalTransform | None
) -> None:
    if transform is not None and not isinstance(transform, _TRANSFORMS[task]):
        raise ConfigError(f"{type(transform).__name__} is not a transform for task '{task}'")
    summary, field = index.split(split), _FIELDS[task]
    if summary.fields[field] != summary.count:
        raise DataError(
            f"{index.place}, split '{split}': {summary.fields[field]} of {summary.count} samples "
            f"have a {field}, which {task} needs"
        )


def check_has_objects(index: ShardIndex, split: str, key: str) -> None:
    """Look for an object in a detection split, as far as the first one or the first damage.

    Damage is left to who reads the split, who names it.

    Raises:
        DataError: there is none but difficult ones and crowds; the message opens with `key`.
    """
    reader = ShardReader(index, split)
    for position in range(len(reader)):
        try:
            boxes = _boxes(reader.read(position)["boxes"])
        except (DamageError, KeyError, ValueError, TypeError):
            return
        if any(box.is_sought for box in boxes):
            return
    raise DataError(
        f"{key}: split '{split}' of '{index.info.name}' has no object in its {len(reader)} images "
        "that is neither difficult nor a crowd"
    )


def _boxes(data: bytes) -> tuple[Box, ...]:
    return tuple(Box(**row) for row in json.loads(data))


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
    if len(images) == 1:
        return images[0][None]
    if images[0].stride(0) == 1:
        return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return torch.stack(list(images))


def _box_target(objects: Sequence[Box]) -> BoxTarget:
    """Return the boxes (M, 4) and labels (M,) of the objects that are to be learnt."""
    learnt = [box for box in objects if box.is_sought]
    corners = [(box.x1, box.y1, box.x2, box.y2) for box in learnt]
    boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 4)
    return BoxTarget(boxes, torch.tensor([box.class_id for box in learnt], dtype=torch.int64))


def _collate(targets: Sequence[Tensor | BoxTarget]) -> Any:
    """Stack targets; those of boxes are padded with none to the same number."""
    if not isinstance(targets[0], BoxTarget):
        return torch.stack([target for target in targets if isinstance(target, Tensor)])
    boxes, labels = (list(parts) for parts in zip(*targets, strict=True))
    return BoxTarget(pad_sequence(boxes, True), pad_sequence(labels, True, -1))


def _group_equal(positions: Iterable[int], sizes: Iterable[Any], most: int) -> list[_Ids]:
    """Cut `positions` into runs of equal size, `most` long at most; evaluation has visit 0."""
    groups: list[_Ids] = []
    last = None
    for position, size in zip(positions, sizes, strict=True):
        if not groups or size != last or len(groups[-1].samples) == most:
            groups.append(_Ids([]))
        groups[-1].samples.append((0, position))
        last = size
    return groups
