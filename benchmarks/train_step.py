"""A training step of SegFormer beside Hugging Face's, and of HILA beside SegFormer, in one run.

Every model takes the same images and labels through forward pass, loss, backward pass and AdamW, in
turns interleaved with those that it is compared with, at 150 classes; each in a process of its own,
set up as its users run it: ours keeps freed memory, as our trainer does, Hugging Face's runs in
plain torch. So that the allocator's part can be told from the rest, theirs is timed with it too
("hf_kept"). Hugging Face's segmenter has random weights and computes its own loss. For HILA the
time over SegFormer's is set beside the multiply-adds over SegFormer's; for SegViT-B what its head
adds to timm's bare ViT-B, both without a loss. Run by `xattn bench train-step`.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Peer, Turn, take_turns
from xattn.data.datasets import load_reader
from xattn.errors import MissingPackageError
from xattn.evaluate.cost import ShapesOnly, count_macs
from xattn.models.zoo import create_model, create_recipe
from xattn.structures import identity_mean
from xattn.train.distributed import resolve_device

_CLASSES = 150
_SIZES = {"b0": [32, 64, 160, 256], "b1": [64, 128, 320, 512]}
_HILA = "hila_segformer_b1_s234"
Step = Callable[[Tensor, Tensor], Tensor]
"""(images, labels) -> the loss."""
Builder = Callable[[torch.device], tuple[Step, torch.optim.Optimizer]]


@dataclass(frozen=True, slots=True)
class _Setting:
    """The arguments of `measure` that a peer needs."""

    batch: int
    side: int
    steps: int
    precision: str


def _turns(build: Builder, setting: _Setting) -> Turn:
    """Return what trains for a turn and measures its milliseconds a step."""
    device = resolve_device("auto")
    generator = torch.Generator().manual_seed(0)
    shape = setting.batch, setting.side, setting.side
    images = torch.randn(shape[0], 3, *shape[1:], generator=generator).to(device)
    labels = torch.randint(_CLASSES, shape, generator=generator).to(device)
    step, optimizer = build(device)

    def turn() -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(setting.steps):
            with _autocast(setting.precision, device):
                loss = step(images, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"step": (time.perf_counter() - started) / setting.steps * 1000}

    return turn


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
    _check_transformers()
    setting = _Setting(batch, side, steps, precision)
    # Only what is compared lives at a time: all nine together take more than 24 GiB.
    groups: list[dict[str, tuple[Builder, bool]]] = [
        *map(_segformers, _SIZES),
        {
            "ours_b1_beside_hila": (partial(_ours, "segformer_b1"), True),
            "ours_hila": (partial(_ours, _HILA), True),
        },
        {
            "timm_vit_b": (partial(_bare_vit, side), True),
            "ours_segvit_b": (partial(_segvit, side), True),
        },
    ]
    times: dict[str, list[float]] = {}
    for group in groups:
        peers = {
            name: Peer(partial(_turns, build, setting), keeps)
            for name, (build, keeps) in group.items()
        }
        measured = take_turns(peers, turns)
        times |= {name: by_key["step"] for name, by_key in measured.items()}
    best = {name: min(all_ms) for name, all_ms in times.items()}
    macs_ratio = _macs(_HILA, side) / _macs("segformer_b1", side)
    time_ratio = best["ours_hila"] / best["ours_b1_beside_hila"]
    segvit_time = best["ours_segvit_b"] / best["timm_vit_b"]
    segvit_macs = _segvit_macs_ratio(side)
    return {
        "device": str(resolve_device("auto")),
        "threads": torch.get_num_threads(),
        "batch": batch,
        "side_px": side,
        "precision": precision,
        "turns": turns,
        "steps": steps,
        "best_ms": {name: round(ms, 1) for name, ms in best.items()},
        "median_ms": {name: round(median(all_ms), 1) for name, all_ms in times.items()},
        "times_faster": {
            size: round(best[f"hf_{size}"] / best[f"ours_{size}"], 3) for size in _SIZES
        },
        "times_faster_same_allocator": {
            size: round(best[f"hf_kept_{size}"] / best[f"ours_{size}"], 3) for size in _SIZES
        },
        "hila": {
            "model": _HILA,
            "time_ratio": round(time_ratio, 3),
            "macs_ratio": round(macs_ratio, 3),
            "time_over_macs": round(time_ratio / macs_ratio, 3),
        },
        "segvit": {
            "model": "segvit_b",
            "time_ratio": round(segvit_time, 3),
            "macs_ratio": round(segvit_macs, 3),
            "added_time_over_added_macs": round((segvit_time - 1) / (segvit_macs - 1), 3),
        },
    }


def _segformers(size: str) -> dict[str, tuple[Builder, bool]]:
    """Return who builds a size of SegFormer, and whether freed memory is kept there."""
    return {
        f"hf_{size}": (partial(_theirs, size), False),
        f"hf_kept_{size}": (partial(_theirs, size), True),
        f"ours_{size}": (partial(_ours, f"segformer_{size}"), True),
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


def _check_transformers() -> None:
    if find_spec("transformers") is None:
        raise MissingPackageError(
            "bench train-step: transformers is not installed; install the dev group"
        )


def _theirs(size: str, device: torch.device) -> tuple[Step, torch.optim.Optimizer]:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation  # noqa: PLC0415

    config = SegformerConfig(  # type: ignore[call-arg]
        num_labels=_CLASSES, hidden_sizes=_SIZES[size], depths=[2, 2, 2, 2], decoder_hidden_size=256
    )
    model: nn.Module = SegformerForSemanticSegmentation(config)
    model.to(device).train()
    return lambda images, labels: model(images, labels=labels).loss, _optimizer(model)


def _bare_vit(side: int, device: torch.device) -> tuple[Step, torch.optim.Optimizer]:
    import timm  # noqa: PLC0415

    model = timm.create_model("vit_base_patch16_224", img_size=side, num_classes=0)
    model.to(device).train()
    return lambda images, _: model.forward_features(images).mean(), _optimizer(model)


def _segvit(side: int, device: torch.device) -> tuple[Step, torch.optim.Optimizer]:
    model = create_model("segvit_b", num_classes=_CLASSES, crop=[side, side]).to(device).train()

    def step(images: Tensor, _labels: Tensor) -> Tensor:
        outputs = model(images)
        mean: Tensor = outputs.classes.mean() + outputs.masks.mean()
        return mean

    return step, _optimizer(model)


def _segvit_macs_ratio(side: int) -> float:
    """Return the multiply-adds of SegViT-B over those of its backbone."""
    with ShapesOnly():
        whole = create_model("segvit_b", num_classes=_CLASSES, crop=[side, side])
    backbone = whole.get_submodule("backbone")
    macs = [count_macs(model, (3, side, side), counting="fvcore") for model in (whole, backbone)]
    return macs[0] / macs[1]


def _macs(name: str, side: int) -> int:
    with ShapesOnly():
        model = create_model(name, num_classes=_CLASSES)
    return count_macs(model, (3, side, side))
