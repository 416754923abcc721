"""Inter-level attention beside the listing that HILA's paper prints, in one run.

Both take the same maps and weights through one forward and backward pass of every direction and
stage pair of HILA-B1, in interleaved turns. A figure is the ratio of the best turns' sums; memory
is what a pass takes at its peak above what it starts from. Run by `xattn bench attention`.

`listing` is written from listing 1.1 (arXiv 2207.02126, appendix A.2) with what its authors' code
does otherwise: the output projection follows the sum over patches, bottom-up logits are scaled by
the width of the high feature. It exponentiates raw logits, as they do.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xattn.nn.interlevel import BottomUpAttention, TopDownAttention
from xattn.train.distributed import resolve_device

_DIMS = (64, 128, 320, 512)
_PAIRS = ((0, 1), (1, 2), (2, 3))
_DIRECTIONS = ("bottom_up", "top_down")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
Attention = BottomUpAttention | TopDownAttention
Form = Callable[[Attention, Tensor, Tensor], Tensor]
"""(attention, target, source) -> what to add to the target."""


def measure(
    sides: list[int], turns: int, threads: int | None = None, compiled: bool = False
) -> dict[str, Any]:
    """Time both forms and measure their memory.

    Args:
        sides: heights and widths of square images, in pixels; multiples of 32.
        turns: turns of each form, interleaved.
        threads: torch's threads; on a machine that others use too, one gives steadier figures.
        compiled: whether to time ours under torch.compile too, which takes minutes to compile.

    Returns:
        For each side milliseconds (sum over the pairs) and MiB (of the pair that takes most) of
        both forms, by direction and together, with the ratios listing / ours; of the compiled form
        only the time.
    """
    device = resolve_device("auto")
    if threads is not None:
        torch.set_num_threads(threads)
    times = {side: _all_times(side, turns, device, compiled) for side in sides}
    # In a process of its own: memory that the timed passes have freed would be reused unseen.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_return_freed_memory) as child:
        peaks = dict(zip(sides, child.map(_all_peaks, sides, [device] * len(sides)), strict=True))
    return {
        "model": "HILA-B1, attentions of S(2,3,4)",
        "batch": 1,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "turns": turns,
        "sides": {str(side): _figures(times[side], peaks[side]) for side in sides},
    }


def _all_times(
    side: int, turns: int, device: torch.device, compiled: bool
) -> dict[str, dict[str, float]]:
    """Return for each direction every form's milliseconds, best turns summed over the pairs."""
    names = [*_FORMS, "compiled"] if compiled else [*_FORMS]
    result = {direction: dict.fromkeys(names, 0.0) for direction in _DIRECTIONS}
    for direction, (low, high) in product(_DIRECTIONS, _PAIRS):
        attention, maps = _build(direction, low, high, side, device)
        forms = {**_FORMS, "compiled": _compile(attention)} if compiled else _FORMS
        times: dict[str, list[float]] = {form: [] for form in forms}
        for _ in range(turns + 1):  # the first turn warms up
            for form, call in forms.items():
                times[form].append(_time(call, attention, maps))
        for form in forms:
            result[direction][form] += min(times[form][1:]) * 1000
    return result


def _all_peaks(side: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return for each direction the MiB that both forms take, of the pair that takes most."""
    result = {direction: dict.fromkeys(_FORMS, 0.0) for direction in _DIRECTIONS}
    for direction, (low, high) in product(_DIRECTIONS, _PAIRS):
        attention, maps = _build(direction, low, high, side, device)
        for form, call in _FORMS.items():
            peak = _peak_mib(call, attention, maps)
            result[direction][form] = max(result[direction][form], peak)
    return result


def _figures(
    ms: dict[str, dict[str, float]], peak: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    forms = next(iter(ms.values()))
    both_ms = {form: sum(part[form] for part in ms.values()) for form in forms}
    both_peak = {form: max(part[form] for part in peak.values()) for form in _FORMS}
    figures = {}
    for part, part_ms, part_peak in (
        *((part, ms[part], peak[part]) for part in _DIRECTIONS),
        ("both", both_ms, both_peak),
    ):
        figures[part] = {
            **{f"{form}_ms": round(part_ms[form], 2) for form in forms},
            **{
                f"{form}_times_faster": round(part_ms["listing"] / part_ms[form], 2)
                for form in forms
                if form != "listing"
            },
            **{f"{form}_peak_mib": round(part_peak[form], 1) for form in _FORMS},
            "times_less_memory": round(part_peak["listing"] / part_peak["ours"], 2),
        }
    return figures


def _build(
    direction: str, low: int, high: int, side: int, device: torch.device
) -> tuple[Attention, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    low_side, high_side = side // 2 ** (low + 2), side // 2 ** (high + 2)
    low_map = torch.randn(1, low_side, low_side, _DIMS[low], device=device, requires_grad=True)
    high_map = torch.randn(1, high_side, high_side, _DIMS[high], device=device, requires_grad=True)
    if direction == "bottom_up":
        return BottomUpAttention(_DIMS[high], _DIMS[low], 4).to(device), (high_map, low_map)
    return TopDownAttention(_DIMS[low], _DIMS[high], 4).to(device), (low_map, high_map)


def _pass(call: Form, attention: Attention, maps: tuple[Tensor, Tensor]) -> None:
    """Run forward and backward, as a training step does, and drop the gradients."""
    out = call(attention, *maps)
    torch.autograd.grad(out, [*maps, *attention.parameters()], maps[0].detach())
    if out.is_cuda:
        torch.cuda.synchronize()


def _time(call: Form, attention: Attention, maps: tuple[Tensor, Tensor]) -> float:
    started = time.perf_counter()
    _pass(call, attention, maps)
    return time.perf_counter() - started


def _return_freed_memory() -> None:
    """Have glibc hand back every freed tensor at once, else resident memory says little."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 2**16)
        libc.mallopt(_TRIM_THRESHOLD, 2**16)


def _peak_mib(call: Form, attention: Attention, maps: tuple[Tensor, Tensor]) -> float:
    """Return the MiB that a pass takes at its peak; nan on a CPU whose system does not tell."""
    _pass(call, attention, maps)
    gc.collect()
    if maps[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _pass(call, attention, maps)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    reset.write_text("5")  # the high-water mark falls to what is resident now
    before = _resident_kib("VmRSS")
    _pass(call, attention, maps)
    return (_resident_kib("VmHWM") - before) / 2**10


def _resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def listing(attention: Attention, target: Tensor, source: Tensor) -> Tensor:
    """Compute what `attention` does in the listing's way; even low sides only.

    Args:
        attention: gives the weights.
        target: (B, H, W, C) map that is updated.
        source: (B, H, W, D) other map.

    Returns:
        A map in the shape of `target`.
    """
    if isinstance(attention, BottomUpAttention):
        return _listing_bottom_up(attention, target, source)
    return _listing_top_down(attention, target, source)


def _patches(map_BHWC: Tensor, patch: int) -> Tensor:
    """Return (B, N, p * p, C): the cells of every patch, copied out."""
    cells: Tensor = F.unfold(map_BHWC.permute(0, 3, 1, 2), patch, padding=patch // 2 - 1, stride=2)
    cells = cells.unflatten(1, (map_BHWC.shape[3], -1))
    return cells.permute(0, 3, 2, 1)


def _listing_bottom_up(attention: BottomUpAttention, high: Tensor, low: Tensor) -> Tensor:
    cells = _patches(low, attention.patch)
    query = attention.query(high.flatten(1, 2).unsqueeze(2))
    key, value = attention.key_value(cells).chunk(2, dim=3)
    logits = query @ key.transpose(2, 3) * attention.scale + attention.position_bias
    out: Tensor = attention.output(logits.softmax(3) @ value).view_as(high)
    return out


def _listing_top_down(attention: TopDownAttention, low: Tensor, high: Tensor) -> Tensor:
    patch, size = attention.patch, low.shape[1:3]
    fold = {"kernel_size": patch, "padding": patch // 2 - 1, "stride": 2}
    query = attention.query(_patches(low, patch))
    key, value = attention.key_value(high.flatten(1, 2).unsqueeze(2)).chunk(2, dim=3)
    logits = query @ key.transpose(2, 3) * attention.scale
    weights = (logits + attention.position_bias.unsqueeze(1)).exp()
    totals = F.fold(weights.squeeze(3).transpose(1, 2), size, **fold)
    spread = F.unfold(totals, **fold).transpose(1, 2).unsqueeze(3)
    spread = torch.where(spread == 0, 1.0, spread)
    parts = (weights / spread) @ value
    summed = F.fold(parts.permute(0, 3, 2, 1).flatten(1, 2), size, **fold)
    out: Tensor = attention.output(summed.permute(0, 2, 3, 1))
    return out


def _ours(attention: Attention, target: Tensor, source: Tensor) -> Tensor:
    out: Tensor = attention(target, source)
    return out


def _compile(attention: Attention) -> Form:
    torch.compiler.reset()  # forget the pair before
    call = torch.compile(attention, dynamic=False, fullgraph=True)
    return lambda _, target, source: call(target, source)


_FORMS: dict[str, Form] = {"listing": listing, "ours": _ours}
