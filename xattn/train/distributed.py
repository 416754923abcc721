"""Ranks, reductions, and what is put around a plain module to train it on many of them.

The one owner of torch.distributed. A model never learns of any of this: `apply_*` change or wrap
it from outside.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xattn.errors import CapacityError, ConfigError

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)
_CPU = torch.device("cpu")
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process's place among those that train together.

    Args:
        rank: 0..world-1 over all nodes.
        world: number of processes.
        device: where this process computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = _CPU

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0


def resolve_device(
    name: str, local_rank: int = 0, local_world: int = 1, key: str = "device"
) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into this process's device.

    Args:
        name: "auto" takes GPUs where each local rank can have one, so that ranks never mix.
        local_rank: 0..local_world-1 on this machine.
        local_world: ranks on this machine.
        key: what the setting is called, for messages.

    Raises:
        ConfigError: `name` is none of the three.
        CapacityError: CUDA was asked for where torch sees no GPU, or fewer than there are local
            ranks.
    """
    if name not in _DEVICES:
        raise ConfigError(f"{key}: found '{name}', expected one of {', '.join(_DEVICES)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and local_world > count:
        raise CapacityError(
            f"{key}: 'cuda' asks for {local_world} GPU{'s' if local_world > 1 else ''} on this "
            f"machine, torch sees {count}; set it to 'cpu' or 'auto'"
        )
    if name == "cuda" or (name == "auto" and count >= local_world):
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def join_ranks(device: str = "auto") -> Ranks:
    """Join the process group that torchrun or Ray describes in the environment.

    Without RANK and WORLD_SIZE in the environment, or with a world of one, there is nothing to
    join.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # Ray gives each of its workers its own view of the GPUs, torchrun shows all to every rank.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    place = resolve_device(device, local_rank, local_world, "cluster.device")
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=_TIMEOUT)
    return Ranks(rank, world, place)


def is_first_process() -> bool:
    """Whether this is rank 0 of those that torchrun started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of `value` over all ranks, without gradient; any shape and dtype."""
    if not _is_distributed():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a floating-point `value` over all ranks, without gradient."""
    return sum_over_ranks(value) / dist.get_world_size() if _is_distributed() else value


def gather_over_ranks(value: T) -> list[T]:
    """Return the picklable `value` of every rank, by rank."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if _is_distributed():
        dist.barrier()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _SumOverRanks(torch.autograd.Function):
    """All-reduced sum whose gradient is the all-reduced sum of the gradients."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return sum_over_ranks(value)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.contiguous())


class GlooSyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the pixels of all ranks, for CPU tensors.

    torch.nn.SyncBatchNorm needs a GPU; without this, two CPU workers would train another model than
    one. Every rank must hold the same number of pixels. Same parameters and buffers as
    nn.BatchNorm2d.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name of the base class)
        """Normalise (B, C, H, W) by the statistics of all ranks while training."""
        if not self.training or not _is_distributed():
            return super().forward(input)
        count = input.numel() // input.shape[1] * dist.get_world_size()
        mean = _all_reduce_sum(input.sum(dim=(0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = _all_reduce_sum(centred.square().sum(dim=(0, 2, 3))) / count
        self._update_running(mean.detach(), variance.detach() * count / max(count - 1, 1))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            return torch.addcmul(
                self.bias[:, None, None], centred, (scale * self.weight)[:, None, None]
            )
        return centred * scale[:, None, None]

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def _all_reduce_sum(value: Tensor) -> Tensor:
    result: Tensor = _SumOverRanks.apply(value)  # type: ignore[no-untyped-call]
    return result


def apply_sync_batchnorm(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Make every BatchNorm2d of `model` share its statistics over the ranks; names stay."""
    if ranks.world == 1:
        return model
    if ranks.device.type == "cuda":
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        return convert(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            # Same parameters, buffers and constructor state: only the forward differs.
            module.__class__ = GlooSyncBatchNorm2d
    return model


def apply_ddp(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Wrap `model` so that gradients are averaged over the ranks; alone, return it as it is."""
    if ranks.world == 1:
        return model
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        gradient_as_bucket_view=True,
        # Every step runs the same graph, so parameters without a gradient (the out-norms of a HILA
        # classifier) are found once and not searched for again.
        static_graph=True,
        broadcast_buffers=False,
    )


def to_device(model: nn.Module, ranks: Ranks, channels_last: bool) -> nn.Module:
    """Move `model` to this rank's device, its 4-D weights in channels-last order if asked."""
    model = model.to(ranks.device)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
