"""Boundary F of every class of an image: ours against the measure's definition, class by class.

The reference does what the DAVIS measure says (Perazzi et al. 2016; spec HILA 5.2) and nothing
else: two masks a class, their outlines, each dilated by a disk, counts. Both take the same label
maps in interleaved turns, on the CPU each on one thread, since scipy knows no more; the figure is
the ratio of the best turns. Run by `xattn bench metrics`.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from xattn.evaluate.boundary import THRESHOLDS, class_boundary_f, tolerance_px
from xattn.structures import IGNORE_INDEX
from xattn.train.distributed import resolve_device

_CLASSES, _HEIGHT, _WIDTH = 19, 1024, 2048  # Cityscapes
_Mask = npt.NDArray[np.bool_]


def measure(turns: int) -> dict[str, Any]:
    """Time both, at the smallest and at the largest tolerance of the papers.

    Args:
        turns: turns of each, interleaved.

    Returns:
        Milliseconds an image of the best turn of each, their ratio, and the largest difference.
    """
    device, threads = resolve_device("auto"), torch.get_num_threads()
    prediction, target = draw_labels(0), draw_labels(1)
    result: dict[str, Any] = {
        "classes": _CLASSES,
        "size_px": [_HEIGHT, _WIDTH],
        "device": str(device),
        "turns": turns,
        "outline_fraction": round(_outline_fraction(target), 4),
    }
    torch.set_num_threads(1)
    for threshold in (THRESHOLDS["meant"][0], THRESHOLDS["meant"][-1]):
        radius = tolerance_px(threshold, (_HEIGHT, _WIDTH))
        result[f"radius_{radius:g}_px"] = _compare(prediction, target, radius, device, turns)
    torch.set_num_threads(threads)
    return result


def _compare(
    prediction: Tensor, target: Tensor, radius: float, device: torch.device, turns: int
) -> dict[str, float]:
    plain_s, ours_s, difference = [], [], 0.0
    on_device = prediction.to(device), target.to(device)
    for _ in range(turns):
        started = time.perf_counter()
        expected = plain_boundary_f(prediction.numpy(), target.numpy(), _CLASSES, radius)
        plain_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        found = class_boundary_f(*on_device, _CLASSES, [radius])[0].cpu().numpy()
        ours_s.append(time.perf_counter() - started)
        difference = max(difference, float(np.abs(found - expected).max()))
    return {
        "plain_ms": round(min(plain_s) * 1000, 1),
        "ours_ms": round(min(ours_s) * 1000, 1),
        "ratio": round(min(plain_s) / min(ours_s), 1),
        "largest_difference": difference,
    }


def draw_labels(seed: int) -> Tensor:
    """Return a (1024, 2048) int64 label map: the same rough regions, finely bent by the seed."""
    regions = _smooth_noise(0, 16) + 0.15 * _smooth_noise(seed + 1, 128)
    labels = regions.argmax(dim=0)
    if seed == 1:  # the truth ignores some
        labels[_smooth_noise(7, 16)[0] > 2] = IGNORE_INDEX
    return labels


def _smooth_noise(seed: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, _CLASSES, rows, 2 * rows, generator=generator)
    return F.interpolate(noise, (_HEIGHT, _WIDTH), mode="bicubic")[0]


def _outline_fraction(labels: Tensor) -> float:
    changes = labels[:-1, :-1] != labels[1:, 1:]
    return float(changes.float().mean())


def plain_boundary_f(
    prediction: npt.NDArray[Any], target: npt.NDArray[Any], num_classes: int, radius: float
) -> npt.NDArray[np.float64]:
    """Return the (K,) boundary F of (H, W) label maps; see `evaluate.boundary`."""
    valid = target != IGNORE_INDEX
    return np.array(
        [
            _plain_f(_plain_outline((prediction == k) & valid), _plain_outline(target == k), radius)
            for k in range(num_classes)
        ]
    )


def _plain_f(predicted: _Mask, true: _Mask, radius: float) -> float:
    if not predicted.any() or not true.any():
        return float(predicted.any() == true.any())
    reach = np.arange(-int(radius), int(radius) + 1)
    disk = reach[:, None] ** 2 + reach[None, :] ** 2 <= radius**2
    precision = (predicted & ndimage.binary_dilation(true, disk)).sum() / predicted.sum()
    recall = (true & ndimage.binary_dilation(predicted, disk)).sum() / true.sum()
    total = precision + recall
    return float(2 * precision * recall / total) if total > 0 else 0.0


def _plain_outline(mask: _Mask) -> _Mask:
    """Mark what differs from its right, lower or lower right neighbour, where there is one."""
    outline = np.zeros_like(mask)
    outline[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    outline[:-1] |= mask[:-1] != mask[1:]
    outline[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return outline
