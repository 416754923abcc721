import time
import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest

from xattn.data.order import Order, eval_positions
from xattn.errors import ConfigError, DataError

SIZES = [7, 3, 11, 5, 9, 4, 8, 6, 10, 2]  # 65 samples, not a multiple of any partition count
N = sum(SIZES)
PINNED = [13, 19, 5, 1, 39, 51, 49, 26]


def make(**changes):
    return Order(
        **{"shard_sizes": SIZES, "seed": 3, "partitions": 12, "block_shards": 3, **changes}
    )


def definition(order_of_blocks, epochs, num_samples, partitions):
    """Cut the sequence of each epoch into streams; serve position c from stream c % P, slowly."""
    served = []
    for epoch in range(epochs):
        positions = range(epoch * num_samples, (epoch + 1) * num_samples)
        turns = Counter(c % partitions for c in positions)
        sequence, streams = iter(order_of_blocks(epoch)), {}
        for stream in range(partitions):
            streams[stream] = [next(sequence) for _ in range(turns[stream])]
        served += [(epoch, streams[c % partitions].pop(0)) for c in positions]
    return served


@pytest.mark.parametrize("partitions", [1, 5, 12, 24, 100])
def test_order_follows_its_definition(partitions):
    def sequence(epoch):
        # With one stream the order is the shuffled sequence itself.
        single = make(partitions=1)
        return [single.sample(epoch * N + i)[1] for i in range(N)]

    order = make(partitions=partitions)
    expected = definition(sequence, 4, N, partitions)
    assert [order.sample(c) for c in range(4 * N)] == expected


@pytest.mark.parametrize("sizes", [SIZES, [1], [4, 4], [1000] * 3])
@pytest.mark.parametrize("partitions", [1, 7, 24])
def test_each_sample_once_an_epoch(sizes, partitions):
    order, count = make(shard_sizes=sizes, partitions=partitions), sum(sizes)
    for epoch in range(3):
        drawn = [order.sample(c) for c in range(epoch * count, (epoch + 1) * count)]
        assert {number for number, _ in drawn} == {epoch}
        assert sorted(sample for _, sample in drawn) == list(range(count))


def test_epochs_and_seeds_differ_and_repeat():
    def epoch_of(order, epoch):
        return tuple(order.sample(c)[1] for c in range(epoch * N, (epoch + 1) * N))

    epochs = {epoch_of(make(), epoch) for epoch in range(5)} | {epoch_of(make(seed=4), 0)}
    assert len(epochs) == 6
    assert epoch_of(make(), 2) == epoch_of(make(), 2)


def test_order_never_changes_between_versions():
    """Pinned: another order would silently break every resumed run."""
    assert [make().sample(c)[1] for c in range(8)] == PINNED


def test_samples_of_a_block_stay_together():
    single = make(partitions=1)
    starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
    shards = [max(i for i, s in enumerate(starts) if s <= single.sample(c)[1]) for c in range(N)]
    blocks, at = [], 0
    while at < N:
        block = list(dict.fromkeys(shards[at:]))[:3]
        size = sum(SIZES[shard] for shard in block)
        assert set(shards[at : at + size]) == set(block)
        blocks, at = [*blocks, shards[at : at + size]], at + size
    assert any(a > b for block in blocks for a, b in pairwise(block))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_ranks_share_each_batch(world):
    order, batch = make(), 12
    for step in range(12):
        whole = order.batch(step, batch)
        parts = [order.batch(step, batch, rank, world) for rank in range(world)]
        assert whole == [order.sample(c) for c in range(step * batch, (step + 1) * batch)]
        assert {len(part) for part in parts} == {batch // world}
        assert sorted(ids for part in parts for ids in part) == sorted(whole)


def test_ranks_take_their_own_streams_when_the_batch_is_no_multiple_of_the_partitions():
    order, world, batch = make(), 4, 8
    for step in range(20):
        for rank in range(world):
            own = {order.sample(c) for c in range(4 * N) if c % 12 % world == rank}
            assert set(order.batch(step, batch, rank, world)) <= own


def test_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"global batch 10 .* 4 workers; the next that is: 12"):
        make().batch(0, 10, 0, 4)


def test_empty_split_is_refused():
    with pytest.raises(DataError, match="no samples"):
        make(shard_sizes=[])


def test_starting_anywhere_in_a_large_set_is_quick_and_small():
    sizes = [985] * 1300  # about ImageNet-1k
    tracemalloc.start()
    start = time.perf_counter()
    order = Order(sizes, seed=1)
    middle = sum(sizes) // 2 // 1024
    first = order.batch(middle, 1024)
    elapsed = time.perf_counter() - start
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert elapsed < 1.0
    assert peak_bytes < 16 << 20
    walked = Order(sizes, seed=1)
    for step in range(middle - 3, middle):
        walked.batch(step, 1024)
    assert walked.batch(middle, 1024) == first


@pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (2, 4)])
def test_evaluation_takes_each_sample_once(count, world):
    taken = [i for rank in range(world) for i in eval_positions(count, rank, world)]
    assert sorted(taken) == list(range(count))
