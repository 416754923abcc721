"""Who sees which sample when: a pure function of (seed, epoch, data set), for any number of ranks.

Definition. Samples have ids 0..N-1 in the order of the index. Global positions c = 0, 1, 2, ...
run over all epochs; epoch = c // N. In each epoch the shards are permuted, consecutive groups of
`block_shards` of them form blocks, and the samples are permuted inside each block: a sequence of
all N ids that at any place needs only a few shards. It is cut into `partitions` contiguous streams
whose sizes differ by at most one. Position c is served by stream c % partitions with that stream's
next id of the epoch. Batch n holds positions n*B .. (n+1)*B - 1 whatever the number of ranks, and
rank r of W takes those with c % W == r; where W divides the partitions, a rank reads only its own
streams.

So each id comes exactly once an epoch, every batch is full (a batch may hold the tail of one epoch
and the head of the next), and the state of a run is one number.

`RepeatedOrder` shows each sample several times in a row, `MixtureOrder` deals positions to several
orders. Both keep these promises and give the same kind of pair: the number of the visit, which in
the plain order is the epoch, and the id. A sample's augmentation is drawn from the pair, which
never comes again, so no two visits look alike.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from xattn.errors import ConfigError, DataError

_SHARDS_DRAW, _BLOCK_DRAW = 0, 1
_KEPT_EPOCHS = 2
_MAX_PERIOD = 10_000


class OrderSettings(BaseModel):
    """How samples are shuffled.

    Args:
        partitions: streams that the order is cut into; any number of ranks that divides it lets
            each node read only its part. 24 has the divisors 1, 2, 3, 4, 6, 8, 12, 24.
        block_shards: shards whose samples are mixed with each other.
        repeats: how many times each sample comes in a row, see `RepeatedOrder`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    partitions: int = Field(default=24, ge=1)
    block_shards: int = Field(default=8, ge=1)
    repeats: int = Field(default=1, ge=1)


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The shards of an epoch in their order, and where each block of them starts in the epoch."""

    shards: npt.NDArray[np.intp]
    block_starts: list[int]


class Order:
    """The order of one split.

    Args:
        shard_sizes: samples in each shard, all positive.
        seed: any non-negative number.
        partitions: see `OrderSettings`.
        block_shards: see `OrderSettings`.

    Raises:
        DataError: there is no sample.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, partitions: int = 24, block_shards: int = 8
    ) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.num_samples = int(self._sizes.sum())
        if self.num_samples == 0:
            raise DataError("the split has no samples, so there is no order of them")
        self.partitions = partitions
        self._seed, self._block_shards = seed, block_shards
        self._epochs: dict[int, _Epoch] = {}
        self._blocks: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        # Each stream stands in one block, or between two of them.
        self._max_blocks = 2 * partitions + 1

    def sample(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample id) of the global position `position` >= 0."""
        epoch, local = divmod(position, self.num_samples)
        size, longer = divmod(self.num_samples, self.partitions)
        phase = epoch * self.num_samples % self.partitions
        stream = position % self.partitions
        # Streams phase, phase + 1, ... (`longer` of them, modulo the partitions) come once more
        # than the others in this epoch: count those before this one.
        end = phase + longer
        longer_before = max(0, min(stream, end) - phase) + max(
            0, min(stream, end - self.partitions)
        )
        start = stream * size + longer_before
        return epoch, self._id_at(epoch, start + local // self.partitions)

    def batch(
        self, step: int, global_batch: int, rank: int = 0, world: int = 1
    ) -> list[tuple[int, int]]:
        """Return (epoch, sample id) of what `rank` of `world` takes of global batch `step`.

        Raises:
            ConfigError: the ranks cannot share a batch evenly.
        """
        return [self.sample(c) for c in rank_positions(step, global_batch, rank, world)]

    def _id_at(self, epoch: int, place: int) -> int:
        starts = self._epoch(epoch).block_starts
        block = bisect_right(starts, place) - 1
        return int(self._block(epoch, block)[place - starts[block]])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = permutation(len(self._sizes), (self._seed, epoch, _SHARDS_DRAW))
            ends = np.cumsum(self._sizes[shards])
            block_starts = [0, *ends[self._block_shards - 1 : -1 : self._block_shards].tolist()]
            self._epochs[epoch] = _Epoch(shards, block_starts)
            if len(self._epochs) > _KEPT_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]

    def _block(self, epoch: int, block: int) -> npt.NDArray[np.int64]:
        ids = self._blocks.pop((epoch, block), None)
        if ids is None:
            first = block * self._block_shards
            shards = self._epoch(epoch).shards[first : first + self._block_shards]
            runs = [np.arange(self._sizes[shard]) + self._starts[shard] for shard in shards]
            ids = np.concatenate(runs)
            ids = ids[permutation(len(ids), (self._seed, epoch, _BLOCK_DRAW, block))]
        self._blocks[epoch, block] = ids  # the one used last stands last
        if len(self._blocks) > self._max_blocks:
            del self._blocks[next(iter(self._blocks))]
        return ids


class RepeatedOrder:
    """Repeated augmentation (Hoffer et al. 2020; Berman et al. 2019), as PVT and HILA pretrained.

    Definition. Each stream of `order` gives each of its ids `repeats` times in a row: with P
    partitions, c = t * P + s takes what `order` has at (t // repeats) * P + s. The copies of a
    sample so stand at c, c + P, c + 2 P, ...: on one rank, for every number of ranks that divides
    P, and its node has the shard at hand. They meet in one batch where that is much larger than P:
    at most (repeats - 1) * P positions at each end of it have copies in the batch beside it, none
    where the batch is a multiple of repeats * P. An epoch of `order` takes repeats * N positions.

    DeiT's RASampler deals the copies to neighbouring ranks, which comes to the same in the mean of
    all ranks' gradients, and draws a new permutation after each N positions, so that a random
    third of the samples comes there; here it is a third without replacement.

    Args:
        order: the order of single visits.
        repeats: copies of each sample, at least 1; 3 in DeiT, PVT and HILA.
    """

    def __init__(self, order: Order, repeats: int) -> None:
        assert repeats >= 1, repeats
        self.num_samples, self.partitions = order.num_samples, order.partitions
        self._order, self._repeats = order, repeats

    def sample(self, position: int) -> tuple[int, int]:
        """Return (visit, sample id) of the global position `position` >= 0."""
        turn, stream = divmod(position, self.partitions)
        turn, copy = divmod(turn, self._repeats)
        epoch, sample_id = self._order.sample(turn * self.partitions + stream)
        return epoch * self._repeats + copy, sample_id

    def batch(
        self, step: int, global_batch: int, rank: int = 0, world: int = 1
    ) -> list[tuple[int, int]]:
        """Return what `sample` gives for `rank` of `world` in global batch `step`."""
        return [self.sample(c) for c in rank_positions(step, global_batch, rank, world)]


class MixtureOrder:
    """Several data sets at fixed shares, each in its own order and with its own epochs.

    Definition. Positions go in turn to the source that is due: of those that have had fewer than
    their exact share of all positions up to this one, the source whose next sample is the one with
    the earliest end, (count + 1) / weight (the quota method of Balinski and Young 1975). In any
    prefix a source's count is so less than one off its share. After a period, the sum of the
    weights, everything is even and the rule starts anew; so counts are found by one division. A
    source's k-th position takes its own order's position k.

    Ids count through the sources: those of the second one start where the first one's end. A rank
    may meet any of a source's streams, unlike in a single order.

    Args:
        orders: the sources.
        weights: whole numbers above 0, one for each source, in proportion to their shares; a factor
            that all have in common makes no difference.

    Raises:
        ConfigError: the number of weights is not that of the sources, or their sum is so large that
            the rule would take long to lay out.
    """

    def __init__(self, orders: "Sequence[Order | RepeatedOrder]", weights: Sequence[int]) -> None:
        if len(weights) != len(orders) or min(weights, default=0) < 1:
            raise ConfigError(
                f"weights {list(weights)} are not {len(orders)} whole numbers above 0, one a source"
            )
        common = gcd(*weights)
        self._weights = [weight // common for weight in weights]
        self._period = sum(self._weights)
        if self._period > _MAX_PERIOD:
            raise ConfigError(
                f"weights {list(weights)} add up to {self._period} in lowest terms, expected at "
                f"most {_MAX_PERIOD}: round them"
            )
        self._orders = list(orders)
        sizes = [order.num_samples for order in orders]
        self._starts = [sum(sizes[:source]) for source in range(len(sizes))]
        self.num_samples = sum(sizes)
        self._turns = _lay_out(self._weights)

    def sample(self, position: int) -> tuple[int, int]:
        """Return (visit, id) of the global position `position` >= 0."""
        periods, place = divmod(position, self._period)
        source, earlier = self._turns[place]
        visits, sample_id = self._orders[source].sample(periods * self._weights[source] + earlier)
        return visits, self._starts[source] + sample_id

    def batch(
        self, step: int, global_batch: int, rank: int = 0, world: int = 1
    ) -> list[tuple[int, int]]:
        """Return what `sample` gives for `rank` of `world` in global batch `step`."""
        return [self.sample(c) for c in rank_positions(step, global_batch, rank, world)]

    def locate(self, number: int) -> tuple[int, int]:
        """Return (source, sample id in it) of an id 0..num_samples-1 of this order."""
        source = bisect_right(self._starts, number) - 1
        return source, number - self._starts[source]


def _lay_out(weights: Sequence[int]) -> list[tuple[int, int]]:
    """Return (source, earlier turns of it) for each turn of one period."""
    period, counts = sum(weights), [0] * len(weights)
    turns = []
    for end in range(1, period + 1):
        due = [s for s, weight in enumerate(weights) if counts[s] * period < weight * end]
        source = min(due, key=lambda s: (counts[s] + 1) / weights[s])
        turns.append((source, counts[source]))
        counts[source] += 1
    return turns


def build_order(
    shard_sizes: Sequence[int], seed: int, settings: OrderSettings
) -> Order | RepeatedOrder:
    """Return the order of one split as the settings say.

    Raises:
        DataError: there is no sample.
    """
    order = Order(shard_sizes, seed, settings.partitions, settings.block_shards)
    return order if settings.repeats == 1 else RepeatedOrder(order, settings.repeats)


def rank_positions(step: int, global_batch: int, rank: int, world: int) -> range:
    """Return the positions of global batch `step` that `rank` of `world` takes, ascending.

    Raises:
        ConfigError: the ranks cannot share a batch evenly.
    """
    check_divides(global_batch, world)
    first = step * global_batch
    return range(first + (rank - first) % world, first + global_batch, world)


def mixing_partners(
    step: int, global_batch: int, partitions: int, rank: int = 0, world: int = 1
) -> list[int]:
    """Return with which sample of its own batch each sample of a rank is mixed.

    The positions of a global batch that leave the same remainder divided by the partitions, which
    one rank holds whatever the number of ranks, are paired from both ends: the first with the last.
    The middle one of an odd number is its own partner; so are all where the batch is not larger
    than the partitions. Of a `RepeatedOrder` at most one pair of a remainder are copies of one
    sample.

    Args:
        step: which global batch.
        global_batch: samples a step over all ranks.
        partitions: those of the order.
        rank: 0..world-1.
        world: number of ranks.

    Returns:
        For each of what `Order.batch` gives the same rank the index of its partner therein.

    Raises:
        ConfigError: the ranks cannot share a batch evenly, or do not divide the partitions.
    """
    if partitions % world:
        raise ConfigError(
            f"{partitions} partitions are not a multiple of the {world} workers, so partners would "
            f"lie on different ones; the next that is: {-(-partitions // world) * world}"
        )
    own = rank_positions(step, global_batch, rank, world)
    first, last = step * global_batch, (step + 1) * global_batch - 1
    partners = []
    for c in own:
        # The first and the last position with the remainder of c.
        low, high = first + (c - first) % partitions, last - (last - c) % partitions
        partners.append((low + high - c - own.start) // world)
    return partners


def check_divides(global_batch: int, world: int) -> None:
    """Check that every rank gets the same number of samples of a batch.

    Raises:
        ConfigError: `global_batch` is not a positive multiple of `world`.
    """
    if global_batch < 1 or global_batch % world:
        raise ConfigError(
            f"global batch {global_batch} is not a positive multiple of the {world} workers; "
            f"the next that is: {max(1, -(-global_batch // world)) * world}"
        )


def eval_positions(num_samples: int, rank: int, world: int) -> range:
    """Return the ids that `rank` of `world` evaluates: each id on one rank, none twice."""
    return range(rank, num_samples, world)


def permutation(length: int, entropy: tuple[int, ...]) -> npt.NDArray[np.intp]:
    """Return a shuffle of 0..length-1 that depends on the numbers of `entropy` alone."""
    # numpy keeps the raw stream of a bit generator for ever, but not what Generator.permutation
    # makes of it: sorting raw draws gives the same order under every version.
    bits = np.random.Philox(np.random.SeedSequence(entropy))
    return np.argsort(bits.random_raw(length), kind="stable")
