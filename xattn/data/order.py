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
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from xattn.errors import ConfigError, DataError

_SHARDS_DRAW, _BLOCK_DRAW = 0, 1
_KEPT_EPOCHS = 2


class OrderSettings(BaseModel):
    """How samples are shuffled.

    Args:
        partitions: streams that the order is cut into; any number of ranks that divides it lets
            each node read only its part. 24 has the divisors 1, 2, 3, 4, 6, 8, 12, 24.
        block_shards: shards whose samples are mixed with each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    partitions: int = Field(default=24, ge=1)
    block_shards: int = Field(default=8, ge=1)


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
        self._seed, self._partitions, self._block_shards = seed, partitions, block_shards
        self._epochs: dict[int, _Epoch] = {}
        self._blocks: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        # Each stream stands in one block, or between two of them.
        self._max_blocks = 2 * partitions + 1

    def sample(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample id) of the global position `position` >= 0."""
        epoch, local = divmod(position, self.num_samples)
        size, longer = divmod(self.num_samples, self._partitions)
        phase = epoch * self.num_samples % self._partitions
        stream = position % self._partitions
        # Streams phase, phase + 1, ... (`longer` of them, modulo the partitions) come once more
        # than the others in this epoch: count those before this one.
        end = phase + longer
        longer_before = max(0, min(stream, end) - phase) + max(
            0, min(stream, end - self._partitions)
        )
        start = stream * size + longer_before
        return epoch, self._id_at(epoch, start + local // self._partitions)

    def batch(
        self, step: int, global_batch: int, rank: int = 0, world: int = 1
    ) -> list[tuple[int, int]]:
        """Return (epoch, sample id) of what `rank` of `world` takes of global batch `step`.

        Raises:
            ConfigError: the ranks cannot share a batch evenly.
        """
        check_divides(global_batch, world)
        first = step * global_batch
        offset = (rank - first) % world
        return [self.sample(c) for c in range(first + offset, first + global_batch, world)]

    def _id_at(self, epoch: int, place: int) -> int:
        starts = self._epoch(epoch).block_starts
        block = bisect_right(starts, place) - 1
        return int(self._block(epoch, block)[place - starts[block]])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = _permutation(len(self._sizes), (self._seed, epoch, _SHARDS_DRAW))
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
            ids = ids[_permutation(len(ids), (self._seed, epoch, _BLOCK_DRAW, block))]
        self._blocks[epoch, block] = ids  # the one used last stands last
        if len(self._blocks) > self._max_blocks:
            del self._blocks[next(iter(self._blocks))]
        return ids


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


def _permutation(length: int, entropy: tuple[int, ...]) -> npt.NDArray[np.intp]:
    # numpy keeps the raw stream of a bit generator for ever, but not what Generator.permutation
    # makes of it: sorting raw draws gives the same order under every version.
    bits = np.random.Philox(np.random.SeedSequence(entropy))
    return np.argsort(bits.random_raw(length), kind="stable")
