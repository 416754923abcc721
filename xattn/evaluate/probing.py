"""Linear probing: how much segmentation is in the features of each stage after each iteration.

Leung et al., arXiv 2207.02126, appendix C and figure 10: all weights frozen, for each feature a
head of the main head's design is trained of its own, scored by mIoU. A stage's iterations are its
blocks and then, where the next stage exchanges, that stage's top-down updates of it, each with the
low block after it. Ours, since only curves are published: features are taken as they leave the
block, before any norm; a head reads one level, at that level's size; heads follow the recipe of
fine-tuning, without its clipping of gradients, which would tie them together.

Every head sees the same batches in one pass: the frozen part is the dearest and runs once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xattn.errors import ConfigError
from xattn.evaluate.segmentation import SegmentationMeter
from xattn.models.hila import Hila, LevelExchange
from xattn.models.pyramid import Pyramid, Stage
from xattn.models.segformer import SegFormerHead
from xattn.structures import Batch, MeanOverRanks, Recipe, identity_mean
from xattn.train.distributed import Ranks
from xattn.train.engine import FitConfig, State, StepLog, fit
from xattn.train.optim import OptimConfig, build_optimizer


@dataclass(frozen=True, slots=True)
class Feature:
    """One place in a backbone whose output is probed.

    Args:
        stage: 1..4.
        iteration: 1.. within the stage, in the order of computation.
        after: what made it: a block of the stage, or the next stage's top-down update.
    """

    stage: int
    iteration: int
    after: Literal["block", "top_down"]

    @property
    def head(self) -> str:
        """Name of its head."""
        return f"head_{self.stage}_{self.iteration}"


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """What a probe reached.

    Args:
        feature: where it read.
        channels: of the feature.
        first_loss: training loss at the first point of the curve.
        last_loss: at the last one.
        mean_iou: on the held-out split, a fraction.
    """

    feature: Feature
    channels: int
    first_loss: float
    last_loss: float
    mean_iou: float


class Probes(nn.Module):
    """A frozen backbone with a head for each of its features.

    Args:
        segmenter: a trained model; its backbone is frozen in place and stays in eval mode.

    Raises:
        ConfigError: it has no stages to probe.
    """

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        backbone, main = getattr(segmenter, "backbone", None), getattr(segmenter, "head", None)
        if not isinstance(backbone, Pyramid) or not isinstance(main, SegFormerHead):
            raise ConfigError(
                "model: found no stages under a SegFormer head, whose design the probes share"
            )
        self.backbone = backbone.requires_grad_(False)
        width, num_classes = main.fuse.out_channels, main.classifier.out_channels
        self.features = list_features(backbone)
        self.heads = nn.ModuleDict(
            {
                feature.head: SegFormerHead(
                    [backbone.dims[feature.stage - 1]], width, num_classes, main.dropout.p
                )
                for feature in self.features
            }
        )

    def train(self, mode: bool = True) -> Self:
        """Set the heads' mode; the backbone's is always eval."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (B, 3, H, W) images to each head's logits (B, K, H_l, W_l), by its name."""
        with torch.no_grad(), _recorded(self.backbone) as maps:
            self.backbone(images)
        return {
            feature.head: self.heads[feature.head]([maps[feature].permute(0, 3, 1, 2)])
            for feature in self.features
        }


def list_features(backbone: Pyramid) -> list[Feature]:
    """Return what can be probed, by stage and iteration."""
    found = []
    for number, module in enumerate(backbone.stages, start=1):
        depth = len(cast(Stage, module).blocks)
        found += [Feature(number, index + 1, "block") for index in range(depth)]
        exchange = _exchange_above(backbone, number)
        downs = sum(top_down for _, top_down in exchange.steps) if exchange else 0
        found += [Feature(number, depth + index + 1, "top_down") for index in range(downs)]
    return found


def train_probes(
    recipe: Recipe,
    batches: Iterable[Batch],
    held_out: Iterable[Batch],
    config: FitConfig,
    optim: OptimConfig,
    *,
    seed: int,
    device: torch.device,
    on_log: Callable[[StepLog], None] = lambda _log: None,
) -> list[ProbeScore]:
    """Train a head on each feature of a trained model and score them.

    Args:
        recipe: a segmentation recipe with trained weights, on `device`; its backbone is frozen.
        batches: `config.steps` training batches.
        held_out: batches to score on.
        config: length and precision.
        optim: of the heads, as for the main head.
        seed: of the heads' weights and their dropout.
        device: where the model is.
        on_log: called with each point of the curve.

    Returns:
        By stage and iteration.

    Raises:
        ConfigError: the model has no stages to probe.
    """
    torch.manual_seed(seed)
    probes = Probes(recipe.model).to(device)
    state = State(probes, probes, build_optimizer(probes, optim))
    logs: list[StepLog] = []

    def note(log: StepLog) -> None:
        logs.append(log)
        on_log(log)

    fit(
        state,
        batches,
        Recipe(probes, partial(_summed_loss, recipe.loss), recipe.decode, recipe.task),
        config.model_copy(update={"clip_norm": None}),
        optim,
        Ranks(device=device),
        seed=seed,
        on_log=note,
        after_step=lambda _state: None,
    )
    ious = _score(probes, recipe, held_out, device)
    return [
        ProbeScore(
            feature,
            probes.backbone.dims[feature.stage - 1],
            logs[0].losses[feature.head],
            logs[-1].losses[feature.head],
            ious[feature.head],
        )
        for feature in probes.features
    ]


def _summed_loss(
    loss: Callable[..., dict[str, Tensor]],
    outputs: Mapping[str, Tensor],
    target: Tensor,
    mean_over_ranks: MeanOverRanks,
) -> dict[str, Tensor]:
    """Return each head's loss by its name, and their sum, of which each gets its own gradient."""
    # Not kept but computed again: logits at the images' size, for every head at once, are what
    # would fill the memory.
    losses = {
        name: checkpoint(loss, logits, target, mean_over_ranks, use_reentrant=False)["loss"]
        for name, logits in outputs.items()
    }
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}


@torch.inference_mode()
def _score(
    probes: Probes, recipe: Recipe, held_out: Iterable[Batch], device: torch.device
) -> dict[str, float]:
    """Return the mIoU of every head."""
    probes.eval()
    num_classes = cast(SegFormerHead, next(iter(probes.heads.values()))).classifier.out_channels
    meters = {name: SegmentationMeter(num_classes, device) for name in probes.heads}
    for batch in held_out:
        on_device = batch.to(device)
        size = on_device.target.shape[-2], on_device.target.shape[-1]
        for name, logits in probes(on_device.images).items():
            meters[name].add(recipe.decode(logits, size).argmax(dim=1), on_device.target)
    return {name: meter.scores(identity_mean).mean_iou for name, meter in meters.items()}


def _exchange_above(backbone: Pyramid, stage: int) -> LevelExchange | None:
    """Return what refines the map of `stage` while the next stage is computed."""
    if not isinstance(backbone, Hila) or str(stage + 1) not in backbone.exchanges:
        return None
    exchange = cast(LevelExchange, backbone.exchanges[str(stage + 1)])
    return exchange if exchange.refines else None


@contextmanager
def _recorded(backbone: Pyramid) -> Iterator[dict[Feature, Tensor]]:
    """Give the (B, H, W, C) maps of one forward pass that is made inside."""
    maps: dict[Feature, Tensor] = {}
    features = list_features(backbone)

    def note(stage: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        feature = next(f for f in features if f.stage == stage and f not in maps)
        maps[feature] = output

    handles = []
    for number, module in enumerate(backbone.stages, start=1):
        parts = list(cast(Stage, module).blocks)
        if exchange := _exchange_above(backbone, number):
            low = exchange.low_block
            parts += low if isinstance(low, nn.ModuleList) else [low]
        handles += [part.register_forward_hook(partial(note, number)) for part in parts]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
