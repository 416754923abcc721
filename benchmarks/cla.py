"""CLA's two orders of products beside each other, and its memory beside AFMA's, in one run.

`forms`: both pairs of CLA on B1 at d = 2, forward and backward, in interleaved turns; a figure is
the ratio of the best turns. `afma`: how much AFMA keeps with patches as small and channels as many
as CLA's. `segmenters`: what the whole models keep for one training step. Kept is what stays
between forward and backward: outputs and what autograd holds, each tensor once, without the
weights. Run by `xattn bench cla`.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from xattn.models.afma import AFMA
from xattn.models.cla import CLAConfig, CrossLayerAttention
from xattn.models.zoo import create_model
from xattn.train.distributed import resolve_device

_DIMS, _WIDTH, _D = (64, 128, 320, 512), 256, 2  # B1
_PAIRS = ((1, 2), (0, 3))
_CHANNELS = 8  # of the comparison at equal channels; memory is proportional to them
_CLASSES = 150
_FORMS = ("factored", "literal")
_SEGMENTERS = ("segformer_b0", "cla_segformer_b0", "afma_segformer_b0")


def measure(side: int, turns: int, threads: int | None = None) -> dict[str, Any]:
    """Time both forms, and measure the memory that they and AFMA keep.

    Args:
        side: height and width of a square image, in pixels; a multiple of 64.
        turns: turns of each form, interleaved, after one that warms up.
        threads: torch's threads; on a machine that others use too, one gives steadier figures.

    Returns:
        What the module's head names, times in milliseconds, memory in MiB of one image.
    """
    device = resolve_device("auto")
    if threads is not None:
        torch.set_num_threads(threads)
    return {
        "model": f"CLA on B1, pairs 23 and 14, d = {_D}, {side}x{side}, batch 1",
        "device": str(device),
        "threads": torch.get_num_threads(),
        "turns": turns,
        "forms": compare_forms(side, turns, device),
        "afma": compare_afma(side, device),
        "segmenters": {
            f"{name}_kept_mib": _segmenter_kept(name, side, device) for name in _SEGMENTERS
        },
    }


def compare_forms(side: int, turns: int, device: torch.device) -> dict[str, float]:
    """Time both forms and measure what they keep."""
    built = {form: _build_pairs(form, _DIMS, _WIDTH, side, device) for form in _FORMS}
    kept = forms_kept_mib(side, device)
    times: dict[str, list[float]] = {form: [] for form in _FORMS}
    for _ in range(turns + 1):
        for form, pairs in built.items():
            times[form].append(sum(_time(*pair) for pair in pairs) * 1000)
    best = {form: min(of_form[1:]) for form, of_form in times.items()}
    return {
        **{f"{form}_ms": round(best[form], 1) for form in _FORMS},
        "times_faster": round(best["literal"] / best["factored"], 2),
        **{f"{form}_kept_mib": round(kept[form], 1) for form in _FORMS},
        "times_less_memory": round(kept["literal"] / kept["factored"], 2),
    }


def forms_kept_mib(side: int, device: torch.device) -> dict[str, float]:
    """Return what both pairs on B1 keep in each form, MiB."""
    return {
        form: sum(_kept_mib(*pair) for pair in _build_pairs(form, _DIMS, _WIDTH, side, device))
        for form in _FORMS
    }


def compare_afma(side: int, device: torch.device) -> dict[str, float]:
    """Compare at equal patches and channels: the paper's ratio is that of the attentions."""
    dims = (_CHANNELS,) * 4
    pairs = _build_pairs("literal", dims, _CHANNELS, side, device)
    attentions = sum(attention.attention(*maps[:2]).numel() for attention, maps in pairs)
    kept = sum(_kept_mib(*pair) for pair in pairs)
    factored = sum(
        _kept_mib(*pair) for pair in _build_pairs("factored", dims, _CHANNELS, side, device)
    )
    afma = AFMA(_CHANNELS, _CHANNELS, patch=_D).to(device)
    images = torch.randn(1, 3, side, side, device=device)
    level = torch.randn(1, _CHANNELS, side // 32, side // 32, device=device, requires_grad=True)
    logits = torch.randn(1, _CHANNELS, side // 4, side // 4, device=device, requires_grad=True)
    with torch.no_grad():
        own = afma.attention(images, level).numel()
    of_afma = _kept_mib(afma, (images, level, logits))
    return {
        "channels": _CHANNELS,
        "attention_mib": round(own * 4 / 2**20, 1),
        "cla_attentions_mib": round(attentions * 4 / 2**20, 1),
        "attention_times_cla": round(own / attentions, 3),
        "kept_mib": round(of_afma, 1),
        "cla_literal_kept_mib": round(kept, 1),
        "cla_factored_kept_mib": round(factored, 1),
        "kept_times_cla_literal": round(of_afma / kept, 2),
        "kept_times_cla_factored": round(of_afma / factored, 2),
    }


def _segmenter_kept(name: str, side: int, device: torch.device) -> float:
    torch.manual_seed(0)
    model = create_model(name, num_classes=_CLASSES).to(device).train()
    return round(_kept_mib(model, (torch.randn(2, 3, side, side, device=device),)) / 2, 1)


def _build_pairs(
    form: str, dims: tuple[int, ...], width: int, side: int, device: torch.device
) -> list[tuple[CrossLayerAttention, tuple[Tensor, ...]]]:
    """Return each pair's module and maps."""
    pairs: list[tuple[CrossLayerAttention, tuple[Tensor, ...]]] = []
    for fine, coarse in _PAIRS:
        torch.manual_seed(0)
        config = CLAConfig(d=_D, impl=form, proj="always")
        attention = CrossLayerAttention(dims[fine], dims[coarse], width, config).to(device)
        sizes = [(level, dims[level]) for level in (fine, coarse)] + [(coarse, width)]
        maps = tuple(
            torch.randn(1, *[side // 2 ** (level + 2)] * 2, dim, device=device, requires_grad=True)
            for level, dim in sizes
        )
        pairs.append((attention, maps))
    return pairs


def _kept_mib(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Return the MiB that a forward pass leaves for the backward one, weights not counted."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    kept: dict[int, Tensor] = {}  # holds them, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, _as_it_is):
        outputs = module(*inputs)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        keep(output)
    storages = {at: tensor.untyped_storage().nbytes() for at, tensor in kept.items()}
    return sum(size for at, size in storages.items() if at not in weights) / 2**20


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _time(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Return the seconds of a pass forward and back."""
    wanted = [*inputs, *module.parameters()]
    started = time.perf_counter()
    out = module(*inputs)
    torch.autograd.grad(out, wanted, torch.ones_like(out))
    if out.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
