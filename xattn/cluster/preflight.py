"""Compares what a run asks for with what there is, before anything is started.

Ray waits for ever for resources that no node has; a run that can never start is refused here, in
seconds and with both numbers.
"""

import os
from collections.abc import Mapping

from xattn.cluster.settings import ClusterConfig
from xattn.errors import CapacityError


def is_remote() -> bool:
    """Whether RAY_ADDRESS names a cluster that somebody else keeps."""
    return bool(os.environ.get("RAY_ADDRESS"))


def check_this_machine(config: ClusterConfig) -> None:
    """Refuse a run that this machine cannot hold, before a local cluster is started for it.

    With RAY_ADDRESS set the cluster is asked instead, by `check_capacity`.

    Raises:
        CapacityError: too few cores, or GPUs asked for where torch sees fewer.
    """
    if is_remote():
        return
    available = {"CPU": float(os.cpu_count() or 1)}
    if config.device == "cuda":
        import torch  # noqa: PLC0415 (the laptop case does not need to wait for it)

        available["GPU"] = float(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    check_capacity(config, available, "this machine")


def check_capacity(config: ClusterConfig, available: Mapping[str, float], where: str) -> None:
    """Compare a request with resources.

    Args:
        config: workers, cores a worker, device.
        available: "CPU" and "GPU" counts.
        where: whose resources these are, for the message.

    Raises:
        CapacityError: with both numbers and the key to lower.
    """
    asked = {"CPU": config.workers * config.cpus_per_worker}
    if config.device == "cuda":
        asked["GPU"] = config.workers
    for kind, count in asked.items():
        have = int(available.get(kind, 0))
        if count > have:
            if not have:
                fix = "set cluster.device to 'cpu' or 'auto'"
            elif kind == "CPU" and config.cpus_per_worker > 1 and config.workers <= have:
                fix = f"lower cluster.cpus_per_worker to {have // config.workers}"
            else:
                fix = f"lower cluster.workers to {have}"
            raise CapacityError(
                f"cluster: {_count(config.workers, 'worker')} ask{'s' * (config.workers == 1)} for "
                f"{_count(count, kind)}, {where} has {have}; {fix}"
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
