"""What our loop adds to a training step, over a bare torch loop on the same batches.

Both loops take the same steps from the same weights on batches held in memory, in interleaved
turns; the figure is the ratio of the best turns. Run by `xattn bench engine`.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from xattn.data.datasets import load_reader
from xattn.models.zoo import create_recipe
from xattn.structures import Batch, DatasetInfo, Recipe
from xattn.train.distributed import Ranks, resolve_device
from xattn.train.engine import FitConfig, State, StepLog, fit
from xattn.train.optim import OptimConfig, build_optimizer

_MODEL, _BATCH, _SIDE = "segformer_b0", 4, 192


def measure(steps: int, turns: int) -> dict[str, Any]:
    """Time both loops.

    Args:
        steps: steps of a turn.
        turns: turns of each loop, interleaved.

    Returns:
        Milliseconds a step of the best turn of each loop, and their ratio.
    """
    camvid = load_reader("camvid")
    info = camvid.describe(None, camvid.Settings())  # type: ignore[arg-type]
    device = resolve_device("auto")
    batches = _batches(steps, info, device)
    ours, bare = [], []
    for _ in range(turns):
        bare.append(_time(_bare_loop, _recipe(info, device), batches, device))
        ours.append(_time(_our_loop, _recipe(info, device), batches, device))
    bare_ms, ours_ms = (min(times) / steps * 1000 for times in (bare, ours))
    return {
        "model": _MODEL,
        "batch": _BATCH,
        "side_px": _SIDE,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "steps": steps,
        "turns": turns,
        "bare_ms_per_step": round(bare_ms, 2),
        "ours_ms_per_step": round(ours_ms, 2),
        "ratio": round(ours_ms / bare_ms, 4),
    }


def _batches(steps: int, info: DatasetInfo, device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((_SIDE, _SIDE),) * _BATCH
    return [
        Batch(
            torch.randn(_BATCH, 3, _SIDE, _SIDE, generator=generator).to(device),
            torch.randint(info.num_classes, (_BATCH, _SIDE, _SIDE), generator=generator).to(device),
            ("",) * _BATCH,
            sizes,
        )
        for _ in range(steps)
    ]


def _recipe(info: DatasetInfo, device: torch.device) -> Recipe:
    torch.manual_seed(0)
    recipe = create_recipe(_MODEL, info)
    recipe.model.to(device)
    return recipe


def _bare_loop(recipe: Recipe, batches: list[Batch], _device: torch.device) -> None:
    model = recipe.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, weight_decay=0.01)
    for batch in batches:
        logits = model(batch.images)
        logits = F.interpolate(logits, batch.target.shape[-2:], mode="bilinear")
        loss = F.cross_entropy(logits, batch.target, ignore_index=255)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _our_loop(recipe: Recipe, batches: list[Batch], device: torch.device) -> None:
    optim = OptimConfig(lr=6e-5)
    config = FitConfig(steps=len(batches), global_batch=_BATCH)
    state = State(recipe.model, recipe.model, build_optimizer(recipe.model, optim))
    logs: list[StepLog] = []
    fit(
        state,
        batches,
        recipe,
        config,
        optim,
        Ranks(device=device),
        seed=0,
        on_log=logs.append,
        after_step=lambda _state: None,
    )


def _time(
    loop: Callable[[Recipe, list[Batch], torch.device], None],
    recipe: Recipe,
    batches: list[Batch],
    device: torch.device,
) -> float:
    started = time.perf_counter()
    loop(recipe, batches, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
