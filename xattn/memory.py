"""The memory of tensors: kept from step to step on the CPU, and named where it does not suffice."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from xattn.errors import CapacityError

# malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4

_CPU_REFUSAL = "DefaultCPUAllocator"
"""In the message of torch's allocator of the CPU, which has no error of its own."""


def keep_freed_memory() -> None:
    """Serve large tensors from memory that is kept, not from fresh pages of the kernel.

    Training and decoding on the CPU take and free the same large tensors over and over. By default
    glibc maps each afresh, page fault by page fault: 13 % of a step of SegFormer-B0, and half the
    time of its augmentation. Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def memory_in_words(setting: str) -> Iterator[None]:
    """Make one line of what torch says when a tensor does not fit the memory of its device.

    Args:
        setting: the key that made it so large, and its value.

    Raises:
        CapacityError: something within did not fit.
    """
    try:
        yield
    except RuntimeError as error:
        import torch  # noqa: PLC0415 (who computes has it; who only times others need not)

        said = str(error).strip().splitlines()[0]
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_REFUSAL not in said:
            raise
        raise CapacityError(f"{setting}: does not fit the memory; lower it ({said})") from error
