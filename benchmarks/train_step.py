"""A training step of SegFormer beside Hugging Face's, and of HILA beside SegFormer, in one run.

Every model takes the same images and labels through forward pass, loss, backward pass and AdamW, in
interleaved turns, at 150 classes. Hugging Face's segmenter has random weights and computes its own
loss. For HILA the time over SegFormer's is set beside the multiply-adds over SegFormer's. Run by
`xattn bench train-step`.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from xattn.data.datasets import load_reader
from xattn.errors import MissingPackageError
from xattn.evaluate.cost import ShapesOnly, count_macs
from xattn.malloc import keep_freed_memory
from xattn.models.zoo import create_model, create_recipe
from xattn.structures import identity_mean
from xattn.train.distributed import resolve_device

_CLASSES = 150
_SIZES = {"b0": [32, 64, 160, 256], "b1": [64, 128, 320, 512]}
_HILA = "hila_segformer_b1_s234"
Step = Callable[[Tensor, Tensor], Tensor]
"""(images, labels) -> the loss."""


def measure(batch: int, side: int, turns: int, steps: int, precision: str) -> dict[str, Any]:
    """Time the steps.

    Args:
        batch: images a step.
        side: their height and width, px.
        turns: turns of each model, interleaved.
        steps: steps of a turn.
        precision: "fp32" or "bf16".

    Returns:
        Milliseconds a step of each model's best turn and of its median one, ratios of the best,
        and HILA's time ratio over its ratio of multiply-adds.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    keep_freed_memory()
    device = resolve_device("auto")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator).to(device)
    labels = torch.randint(_CLASSES, (batch, side, side), generator=generator).to(device)
    loops = {
        **{f"hf_{size}": _theirs(size, device) for size in _SIZES},
        **{f"ours_{size}": _ours(f"segformer_{size}", device) for size in _SIZES},
        "ours_hila": _ours(_HILA, device),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(turns + 1):  # the first turn warms up
        for name, (step, optimizer) in loops.items():
            started = time.perf_counter()
            for _ in range(steps):
                with _autocast(precision, device):
                    loss = step(images, labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - started) / steps * 1000)
    best = {name: min(all_ms[1:]) for name, all_ms in times.items()}
    macs_ratio = _macs(_HILA, side) / _macs("segformer_b1", side)
    time_ratio = best["ours_hila"] / best["ours_b1"]
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "batch": batch,
        "side_px": side,
        "precision": precision,
        "turns": turns,
        "steps": steps,
        "best_ms": {name: round(ms, 1) for name, ms in best.items()},
        "median_ms": {name: round(median(all_ms[1:]), 1) for name, all_ms in times.items()},
        "times_faster": {
            size: round(best[f"hf_{size}"] / best[f"ours_{size}"], 3) for size in _SIZES
        },
        "hila": {
            "model": _HILA,
            "time_ratio": round(time_ratio, 3),
            "macs_ratio": round(macs_ratio, 3),
            "time_over_macs": round(time_ratio / macs_ratio, 3),
        },
    }


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=6e-5, weight_decay=0.01)


def _ours(name: str, device: torch.device) -> tuple[Step, torch.optim.Optimizer]:
    reader = load_reader("ade20k")
    info = reader.describe(None, reader.Settings())  # type: ignore[arg-type]
    recipe = create_recipe(name, info)
    model = recipe.model.to(device).train()
    return (
        lambda images, labels: recipe.loss(model(images), labels, identity_mean)["loss"],
        _optimizer(model),
    )


def _theirs(size: str, device: torch.device) -> tuple[Step, torch.optim.Optimizer]:
    try:
        from transformers import (  # noqa: PLC0415
            SegformerConfig,
            SegformerForSemanticSegmentation,
        )
    except ImportError:
        raise MissingPackageError(
            "bench train-step: transformers is not installed; install the dev group"
        ) from None
    config = SegformerConfig(  # type: ignore[call-arg]
        num_labels=_CLASSES, hidden_sizes=_SIZES[size], depths=[2, 2, 2, 2], decoder_hidden_size=256
    )
    model: nn.Module = SegformerForSemanticSegmentation(config)
    model.to(device).train()
    return lambda images, labels: model(images, labels=labels).loss, _optimizer(model)


def _macs(name: str, side: int) -> int:
    with ShapesOnly():
        model = create_model(name, num_classes=_CLASSES)
    return count_macs(model, (3, side, side))
