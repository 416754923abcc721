import random
import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest

from xattn.data.order import (
    MixtureOrder,
    Order,
    OrderSettings,
    RepeatedOrder,
    build_order,
    eval_positions,
    mixing_partners,
)
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


@pytest.mark.parametrize("num_shards", [1300, 14_200])  # ImageNet-1k and ImageNet-21k
@pytest.mark.parametrize("repeats", [1, 3])
def test_starting_anywhere_in_a_large_set_is_quick_and_small(num_shards, repeats):
    sizes, settings = [1000] * num_shards, OrderSettings(repeats=repeats)
    middle = repeats * sum(sizes) // 2 // 1024
    tracemalloc.start()
    order = build_order(sizes, 1, settings)
    first = order.batch(middle, 1024)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8 << 20
    single = order if repeats == 1 else order._order
    # Each stream is in one block of 8 shards, two at most: nothing else was computed, as nothing
    # more fits in what is kept.
    assert len(single._blocks) <= 2 * 24
    assert sum(len(block) for block in single._blocks.values()) <= 2 * 24 * 8000
    walked = build_order(sizes, 1, settings)
    for step in range(middle - 3, middle):
        walked.batch(step, 1024)
    assert walked.batch(middle, 1024) == first


@pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (2, 4)])
def test_evaluation_takes_each_sample_once(count, world):
    taken = [i for rank in range(world) for i in eval_positions(count, rank, world)]
    assert sorted(taken) == list(range(count))


def plain():
    return make()


def repeated():
    return RepeatedOrder(make(), 3)


def mixture():
    return MixtureOrder([make(), make(shard_sizes=[4] * 5, seed=9), repeated()], [5, 2, 3])


@pytest.mark.parametrize("build", [plain, repeated, mixture])
def test_first_ten_thousand_are_the_same_for_all_ranks_and_workers(build):
    """Each worker of each rank has its own order and asks it for its own batches only."""
    batch = 48
    steps = -(-10_000 // batch)
    order = build()
    expected = [order.sample(c) for c in range(steps * batch)]
    numbers = (1, 2, 3, 4, 6, 8) if build is plain else (1, 3, 8)
    for world in numbers:
        for workers in numbers:
            seen = [None] * len(expected)
            for rank in range(world):
                for worker in range(workers):
                    own = build()
                    for step in range(worker, steps, workers):
                        offset = step * batch + (rank - step * batch) % world
                        seen[offset : (step + 1) * batch : world] = own.batch(
                            step, batch, rank, world
                        )
            assert seen == expected, (world, workers)


@pytest.mark.parametrize("build", [plain, repeated, mixture])
def test_no_visit_comes_twice(build):
    """The pair decides a sample's augmentation: none may come again."""
    order = build()
    drawn = [order.sample(c) for c in range(3000)]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(("partitions", "repeats"), [(12, 3), (5, 2), (1, 4), (24, 1)])
def test_repeats_follow_their_definition(partitions, repeats):
    single = make(partitions=partitions)
    order = RepeatedOrder(make(partitions=partitions), repeats)
    rounds = partitions * repeats
    for start in range(0, 5 * rounds, rounds):
        for stream in range(partitions):
            epoch, sample = single.sample(start // repeats + stream)
            copies = [order.sample(start + copy * partitions + stream) for copy in range(repeats)]
            assert copies == [(epoch * repeats + copy, sample) for copy in range(repeats)]


@pytest.mark.parametrize("sizes", [SIZES, [12, 12]])
def test_each_sample_comes_as_often_as_it_is_repeated(sizes):
    order, count = RepeatedOrder(make(shard_sizes=sizes), 3), sum(sizes)
    served = Counter(order.sample(c) for c in range(3 * 12 * count))  # whole rounds of 12 epochs
    assert set(served.values()) == {1}
    assert {visit for visit, _ in served} == set(range(36))
    assert len(served) == 36 * count


def test_copies_share_a_batch_and_a_rank():
    order = RepeatedOrder(make(shard_sizes=[50] * 40), 3)
    for step in range(6):
        # A multiple of repeats x partitions never parts copies; another batch only at its ends.
        assert set(Counter(i for _, i in order.batch(step, 72)).values()) == {3}
        ragged = Counter(i for _, i in order.batch(step, 240))
        assert sum(count for count in ragged.values() if count < 3) <= 2 * 2 * 12
        for world in (2, 3, 4, 6):
            parts = [{i for _, i in order.batch(step, 72, rank, world)} for rank in range(world)]
            assert sum(map(len, parts)) == len(set().union(*parts))


def test_settings_say_which_order():
    assert isinstance(build_order(SIZES, 3, OrderSettings()), Order)
    order = build_order(SIZES, 3, OrderSettings(partitions=12, block_shards=3, repeats=3))
    assert isinstance(order, RepeatedOrder)
    assert [order.sample(c) for c in range(99)] == [repeated().sample(c) for c in range(99)]


WEIGHTS = [(1,), (1, 1), (3, 1), (1, 1, 1), (7, 2, 1), (97, 2, 1), (5, 4, 3, 2, 1), (499, 251, 250)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_of_a_mixture_has_its_shares(weights):
    order = MixtureOrder([make(seed=s) for s in range(len(weights))], weights)
    counts, total = [0] * len(weights), sum(weights)
    for position in range(2 * total + 50):
        counts[order.locate(order.sample(position)[1])[0]] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count * total - weight * (position + 1)) < total


def test_random_weights_keep_their_shares():
    draw = random.Random(0)
    for _ in range(60):
        weights = [draw.randint(1, 60) for _ in range(draw.randint(2, 7))]
        order = MixtureOrder([make(shard_sizes=[1])] * len(weights), weights)
        counts, total = [0] * len(weights), sum(weights)
        for position in range(total):
            counts[order.sample(position)[1]] += 1
            share = [weight * (position + 1) / total for weight in weights]
            assert all(abs(c - s) < 1 for c, s in zip(counts, share, strict=True))


def test_each_source_of_a_mixture_runs_its_own_order():
    small = [4] * 5
    sources = [make(), make(shard_sizes=small, seed=9)]
    order = MixtureOrder(sources, [30, 10])
    assert order.num_samples == N + 20
    drawn = [[], []]
    for position in range(400):
        visits, number = order.sample(position)
        source, sample = order.locate(number)
        drawn[source].append((visits, sample))
    for source, pairs in zip([make(), make(shard_sizes=small, seed=9)], drawn, strict=True):
        assert pairs == [source.sample(k) for k in range(len(pairs))]
    # The small one is in its fifth epoch while the large one is in its fourth.
    assert (drawn[0][-1][0], drawn[1][-1][0]) == (300 // N, 99 // 20)
    # A common factor changes nothing.
    lowest = MixtureOrder(sources, [3, 1])
    assert all(lowest.sample(c) == order.sample(c) for c in range(400))


def test_far_into_a_large_mixture_costs_no_more():
    large = [[1000] * 14_200, [1000] * 1300]
    tracemalloc.start()
    order = MixtureOrder([Order(sizes, seed=1) for sizes in large], [90, 10])
    order.batch(10**6, 1024)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 16 << 20


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ([1], r"\[1\] are not 2 whole numbers"),
        ([1, 0], r"\[1, 0\] are not 2 whole numbers above 0"),
        ([10_000, 1], "add up to 10001"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(weights, fault):
    with pytest.raises(ConfigError, match=fault):
        MixtureOrder([make(), make()], weights)


def pairs_of(step, batch, partitions, world):
    """Return {(position, position of its partner)} over all ranks, from what each computes."""
    pairs = set()
    for rank in range(world):
        own = [c for c in range(step * batch, (step + 1) * batch) if c % world == rank]
        partners = mixing_partners(step, batch, partitions, rank, world)
        pairs |= {(c, own[partner]) for c, partner in zip(own, partners, strict=True)}
    return pairs


@pytest.mark.parametrize(("batch", "partitions"), [(24, 24), (48, 24), (120, 24), (1032, 24)])
def test_partners_are_the_same_on_any_number_of_ranks(batch, partitions):
    for step in (0, 1, 5, 1001):
        whole = pairs_of(step, batch, partitions, 1)
        assert len(whole) == batch
        for world in (2, 3, 4, 6, 8, 12, 24):
            assert pairs_of(step, batch, partitions, world) == whole
        # Partners are mutual, and the order's samples are those at the positions.
        assert {(b, a) for a, b in whole} == whole
        assert all(a % partitions == b % partitions for a, b in whole)


def test_partners_of_samples_are_the_same_on_any_number_of_ranks():
    order, batch = repeated(), 96
    for step in range(4):
        expected = None
        for world in (1, 2, 3, 4, 6, 12):
            pairs = set()
            for rank in range(world):
                own = order.batch(step, batch, rank, world)
                partners = mixing_partners(step, batch, 12, rank, world)
                pairs |= {(ids, own[p]) for ids, p in zip(own, partners, strict=True)}
            expected = expected or pairs
            assert pairs == expected


def test_partners_of_a_batch_that_is_no_multiple_of_the_partitions():
    """Streams have one member more or less; the middle one of an odd number stays alone."""
    for step in range(30):
        pairs = pairs_of(step, 64, 24, 1)
        for world in (2, 4, 8):
            assert pairs_of(step, 64, 24, world) == pairs
        sizes = Counter(a % 24 for a, _ in pairs)
        assert set(sizes.values()) == {2, 3}
        alone = [a for a, b in pairs if a == b]
        assert len(alone) == sum(size % 2 for size in sizes.values())


def test_small_batch_has_no_partners():
    assert all(a == b for a, b in pairs_of(3, 16, 24, 2))


def test_ranks_that_do_not_divide_the_partitions_cannot_mix():
    with pytest.raises(ConfigError, match=r"24 partitions .* 5 workers.* the next that is: 25"):
        mixing_partners(0, 40, 24, 0, 5)
    with pytest.raises(ConfigError, match="global batch 10"):
        mixing_partners(0, 10, 24, 0, 4)
