import gc
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tests.raw_files import write_samples
from xattn.data.loader import build_eval_loader, build_train_loader
from xattn.data.mixing import ClassificationMix
from xattn.data.order import Order, OrderSettings
from xattn.data.transforms import (
    ClassificationAugment,
    ClassificationEval,
    SegmentationAugment,
    SegmentationEval,
    rng_for,
)
from xattn.errors import ConfigError, DamageError, DataError
from xattn.structures import IGNORE_INDEX, DatasetInfo, Sample

INFO = DatasetInfo(
    name="tiny",
    tasks=("segmentation", "classification"),
    class_names=("a", "b", "c"),
    palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
    splits=("train", "val"),
    ignore_ids=(200, 255),
    licence="none",
    url="",
    citation="",
    layout="",
)
COUNT = 131
AUGMENT = SegmentationAugment(base=(8, 12), crop=(8, 8))
# The val split holds runs of images of these (height, width) px.
VAL_SIZES = [(8, 12)] * 5 + [(12, 8)] * 2 + [(8, 12)]


def encode(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def make_sample(number, size=(8, 12)):
    rng = np.random.default_rng(number)
    mask = rng.integers(0, 3, size).astype(np.uint8)
    mask[0, 0], mask[0, 1] = 200, 255
    image = encode(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return Sample(f"s{number:04d}", image, "png", f"raw/{number}", encode(mask), number % 3)


def write(out):
    splits = {
        "train": [make_sample(i) for i in range(COUNT)],
        "val": [make_sample(i, s) for i, s in enumerate(VAL_SIZES)],
    }
    return write_samples(out, INFO, splits, samples_per_shard=10)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "shards")


def train(index, **changes):
    settings = {"seed": 5, "global_batch": 12, "steps": 20, **changes}
    return build_train_loader(index, "train", "segmentation", AUGMENT, **settings)


def keys_of(loader):
    return [batch.keys for batch in loader]


def test_batch_holds_what_it_promises(index):
    (batch,) = train(index, steps=1)
    assert batch.images.shape == (12, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    assert batch.target.shape == (12, 8, 8)
    assert batch.target.dtype == torch.int64
    assert set(batch.target.unique().tolist()) <= {0, 1, 2, IGNORE_INDEX}
    assert len(batch.keys) == 12
    assert batch.sizes == ((8, 12),) * 12


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_first_two_thousand_ids_do_not_depend_on_ranks_and_workers(index, world, threads):
    steps, batch = 34, 60
    loaders = [
        build_train_loader(
            index,
            "train",
            "classification",
            ClassificationAugment(size=2),  # little to compute: only the keys matter here
            seed=5,
            global_batch=batch,
            steps=steps,
            rank=rank,
            world=world,
            threads=threads,
        )
        for rank in range(world)
    ]
    merged = [""] * (steps * batch)
    for rank, loader in enumerate(loaders):
        merged[rank::world] = [key for keys in keys_of(loader) for key in keys]
    order = Order([shard.num_samples for shard in index.splits["train"].shards], seed=5)
    assert merged == [f"s{order.sample(c)[1]:04d}" for c in range(steps * batch)]


def test_start_step_goes_on_where_the_others_stopped(index):
    whole = list(train(index, steps=30))
    resumed = list(train(index, start_step=18, steps=12))
    for expected, batch in zip(whole[18:], resumed, strict=True):
        assert batch.keys == expected.keys
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.target, expected.target)


def test_sample_is_augmented_alike_in_every_worker_and_otherwise_in_every_epoch(index):
    def images(**changes):
        batches = list(train(index, global_batch=COUNT, steps=2, **changes))
        return [dict(zip(batch.keys, batch.images, strict=True)) for batch in batches]

    state = torch.get_rng_state()
    first, second = images()
    for parallel, alone in zip(images(threads=2), (first, second), strict=True):
        assert parallel.keys() == alone.keys()
        assert all(torch.equal(parallel[key], alone[key]) for key in alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(torch.equal(first[key], second[key]) for key in first) == 0


def test_batches_repeat_when_iterated_again(index):
    loader = train(index, steps=3)
    assert len(loader) == 3
    assert keys_of(loader) == keys_of(loader)


def test_ignored_ids_become_the_ignore_index(index):
    (batch, *_) = build_eval_loader(index, "val", "segmentation", SegmentationEval(), batch=4)
    assert (batch.target[:, 0, :2] == IGNORE_INDEX).all()
    assert int(batch.target[:, 1:].max()) == 2


def test_evaluation_batches_neighbours_of_one_size(index):
    loader = build_eval_loader(index, "val", "segmentation", SegmentationEval(), batch=3)
    batches = list(loader)
    assert len(loader) == len(batches) == 4
    assert [len(batch.keys) for batch in batches] == [3, 2, 2, 1]
    assert [key for batch in batches for key in batch.keys] == [f"s{i:04d}" for i in range(8)]
    assert [size for batch in batches for size in batch.sizes] == VAL_SIZES
    for batch in batches:
        assert batch.images.shape[-2:] == (32, 32)
        assert batch.target.shape[-2:] == batch.sizes[0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_evaluate_each_sample_once(index, world):
    transform, seen = SegmentationEval(), []
    for rank in range(world):
        loader = build_eval_loader(
            index, "val", "segmentation", transform, batch=2, rank=rank, world=world
        )
        seen += [key for batch in loader for key in batch.keys]
    assert sorted(seen) == [f"s{i:04d}" for i in range(8)]


def test_classification_gives_labels(index):
    (batch,) = build_eval_loader(
        index, "val", "classification", ClassificationEval(size=8, resize=8), batch=8
    )
    assert batch.images.shape == (8, 3, 8, 8)
    assert batch.target.tolist() == [i % 3 for i in range(8)]
    augment = ClassificationAugment(size=8)
    loader = build_train_loader(
        index, "train", "classification", augment, seed=0, global_batch=4, steps=2
    )
    for batch in loader:
        assert batch.target.dtype == torch.int64
        assert batch.target.tolist() == [int(key[1:]) % 3 for key in batch.keys]


def test_augmentation_is_that_of_the_samples_generator(index):
    (batch,) = train(index, steps=1, global_batch=1)
    number = int(batch.keys[0][1:])
    sample = make_sample(number)
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(sample.image)))).permute(2, 0, 1)
    mask = torch.from_numpy(np.array(Image.open(io.BytesIO(sample.mask))))
    mask[mask == 200] = IGNORE_INDEX
    pixels, target = AUGMENT(image, mask, rng_for(5, 0, number))
    torch.testing.assert_close(batch.images[0], pixels)
    assert torch.equal(batch.target[0], target.long())


@pytest.mark.parametrize("threads", [0, 2])
def test_damage_is_named_in_one_line_from_any_thread(tmp_path, threads):
    index = write(tmp_path / "shards")
    offset, _, _ = index.records("train")[37]["image"].item()
    with (tmp_path / "shards" / "train-000003.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"?")
    expected = rf"shard train-000003\.tar, key s0037, offset {offset}"
    with pytest.raises(DamageError, match=expected) as caught:
        list(train(index, threads=threads))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threads", [0, 1])
def test_damaged_samples_may_be_skipped_but_are_told(tmp_path, threads):
    index = write(tmp_path / "shards")
    whole = list(train(index))
    for position in (36, 37):
        offset = index.records("train")[position]["mask"]["offset"].item()
        with open(tmp_path / "shards/train-000003.tar", "r+b") as file:
            file.seek(offset)
            file.write(b"?")
    skipped = list(train(index, threads=threads, skip_damaged=9))
    told = [problem for batch in skipped for problem in batch.damaged]
    for before, after in zip(whole, skipped, strict=True):
        expected = ["s0038" if key in ("s0036", "s0037") else key for key in before.keys]
        assert list(after.keys) == expected
    hits = sum(key in ("s0036", "s0037") for batch in whole for key in batch.keys)
    assert hits >= 2
    assert {text.split(", ")[1] for text in told} == {"key s0036", "key s0037"}
    assert len(told) >= hits


def test_undecodable_image_is_named(tmp_path):
    cut = make_sample(0)
    whole = Image.open(io.BytesIO(cut.image)).size
    header_only = cut.image[:50]
    assert whole == (12, 8)
    sample = Sample("s", header_only, "png", "raw", cut.mask, 0)
    index = write_samples(tmp_path / "shards", INFO, {"val": [sample]})
    loader = build_eval_loader(index, "val", "segmentation", SegmentationEval(), batch=1)
    with pytest.raises(DataError, match=r"val-000000\.tar, key s: cannot be decoded"):
        list(loader)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("xattn-loader")]


def test_abandoned_iteration_leaves_no_thread(index):
    batches = iter(train(index, threads=2))
    next(batches)
    assert len(loader_threads()) == 2
    del batches
    gc.collect()
    assert loader_threads() == []


def test_threads_leave_this_one_its_cores(index):
    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = iter(train(index, threads=2))
        next(batches)
        assert torch.get_num_threads() == 2
        batches.close()
    finally:
        torch.set_num_threads(own)


def test_mixing_and_repeats_do_not_depend_on_ranks(index):
    """The rows of all ranks together are the batch of one, mixed targets and all."""

    def batch(rank, world, threads):
        loader = build_train_loader(
            index,
            "train",
            "classification",
            ClassificationAugment(size=8),
            seed=5,
            global_batch=60,
            steps=1,
            start_step=2,
            rank=rank,
            world=world,
            threads=threads,
            order=OrderSettings(partitions=6, repeats=3),
            mix=ClassificationMix(),
        )
        return next(iter(loader))

    whole = batch(0, 1, 0)
    assert whole.target.shape == (60, 3)
    assert torch.allclose(whole.target.sum(1), torch.ones(60))
    assert len(set(whole.keys)) < 60, "copies"
    parts = [batch(rank, 3, 2) for rank in range(3)]
    first = 2 * 60 % 3
    for rank, part in enumerate(parts):
        rows = slice((rank - first) % 3, None, 3)
        assert part.keys == whole.keys[rows]
        assert torch.equal(part.images, whole.images[rows])
        assert torch.equal(part.target, whole.target[rows])


def test_wrong_settings_are_refused(tmp_path, index):
    with pytest.raises(ConfigError, match=r"global batch 12 .* 5 workers"):
        train(index, world=5)
    with pytest.raises(ConfigError, match="SegmentationEval is not a transform for task 'class"):
        build_eval_loader(index, "val", "classification", SegmentationEval(), batch=1)
    with pytest.raises(ConfigError, match="SegmentationEval is not a transform for task 'detect"):
        build_eval_loader(index, "val", "detection", SegmentationEval(), batch=1)
    with pytest.raises(DataError, match="no split 'test'"):
        build_eval_loader(index, "test", "segmentation", SegmentationEval(), batch=1)
    unlabelled = Sample("a", make_sample(0).image, "png", "raw")
    bare = write_samples(tmp_path / "bare", INFO, {"val": [unlabelled]})
    with pytest.raises(DataError, match="0 of 1 samples have a mask, which segmentation needs"):
        build_eval_loader(bare, "val", "segmentation", SegmentationEval(), batch=1)
