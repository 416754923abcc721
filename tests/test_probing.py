"""Probes: every stage and iteration has one, the model stays as it was, and the probes learn."""

import pytest
import torch

from xattn.data.index import ShardIndex
from xattn.data.loader import build_eval_loader, build_train_loader
from xattn.data.transforms import SegmentationAugment, SegmentationEval
from xattn.errors import ConfigError
from xattn.evaluate.probing import Probes, list_features, train_probes
from xattn.models.hila import ExchangeConfig, HilaMiT
from xattn.models.mit import MiT
from xattn.models.segformer import SegFormerHead, Segmenter
from xattn.models.zoo import create_model, create_recipe
from xattn.structures import Recipe
from xattn.train.engine import FitConfig
from xattn.train.optim import OptimConfig

STEPS = 30
NUMBERS = {
    "dims": (8, 12, 16, 20),
    "depths": (1, 2, 3, 2),
    "heads": (1, 2, 2, 2),
    "sr_ratios": (4, 2, 2, 1),
}
BLOCKS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2)]


def backbones():
    return {
        "mit": MiT(**NUMBERS),
        "hila": HilaMiT(**NUMBERS, stages=(3, 4)),
        "own weights": HilaMiT(**NUMBERS, stages=(3, 4), exchange=ExchangeConfig(share=False)),
        "no top-down": HilaMiT(**NUMBERS, stages=(3, 4), exchange=ExchangeConfig(top_down=False)),
    }


def tiny(kind: str, num_classes: int) -> Segmenter:
    torch.manual_seed(2)
    backbone = backbones()[kind]
    return Segmenter(backbone, SegFormerHead(backbone.dims, 16, num_classes, 0.1)).eval()


@pytest.mark.parametrize("kind", ["mit", "hila", "own weights", "no top-down"])
def test_every_stage_and_iteration_is_listed_once_in_order(kind):
    features = list_features(tiny(kind, 3).backbone)
    found = [(f.stage, f.iteration, f.after) for f in features]
    expected = [(*place, "block") for place in BLOCKS]
    if kind in ("hila", "own weights"):  # stage 3 refines stage 2 twice, stage 4 stage 3 once
        refined = [(2, 3, "top_down"), (2, 4, "top_down"), (3, 4, "top_down")]
        expected = sorted(expected + refined)
    assert found == expected


@pytest.mark.parametrize("kind", ["mit", "hila", "own weights"])
def test_probes_read_the_maps_that_the_model_computes(kind):
    """The last map of a stage, normed as the model does it, is what the decoder sees."""
    model = tiny(kind, 3)
    seen = {}
    probes = Probes(model).eval()
    for name, head in probes.heads.items():
        head.register_forward_hook(lambda _m, maps, _o, name=name: seen.update({name: maps[0][0]}))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        probes(images)
        levels = model.backbone(images)
    assert list(seen) == [feature.head for feature in probes.features]
    for stage, level in enumerate(levels, start=1):
        last = max(f.iteration for f in probes.features if f.stage == stage)
        own = seen[f"head_{stage}_{last}"].permute(0, 2, 3, 1)
        norm = model.backbone.stages[stage - 1].norm
        if kind != "mit" and str(stage + 1) in model.backbone.exchanges:
            norm = model.backbone.exchanges[str(stage + 1)].low_norm
        assert torch.equal(norm(own).permute(0, 3, 1, 2), level)
    maps = [seen[name] for name in seen]
    assert not any(
        a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(maps) for b in maps[:i]
    )


def probe(kind, shards, steps=STEPS):
    index = ShardIndex.open(shards / "scenes")
    info = index.info
    model = tiny(kind, info.num_classes)
    plain = create_recipe("segformer_b0", info)
    recipe = Recipe(model, plain.loss, plain.decode, "segmentation")
    augment = SegmentationAugment(base=(64, 96), crop=(64, 64))
    batches = build_train_loader(
        index, "train", "segmentation", augment, seed=1, global_batch=4, steps=steps
    )
    held_out = build_eval_loader(index, "val", "segmentation", SegmentationEval(), batch=3)
    config = FitConfig(steps=steps, global_batch=4, log_every_steps=5)
    optim = OptimConfig(lr=1e-2, head_lr_multiplier=2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = train_probes(
        recipe, batches, held_out, config, optim, seed=3, device=torch.device("cpu")
    )
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return scores


@pytest.mark.parametrize("kind", ["mit", "hila"])
def test_probes_learn_and_leave_the_model_bit_for_bit(kind, shards):
    scores = probe(kind, shards)
    assert [score.feature for score in scores] == list_features(tiny(kind, 3).backbone)
    for score in scores:
        assert score.channels == NUMBERS["dims"][score.feature.stage - 1]
        assert score.last_loss < 0.98 * score.first_loss, score
        assert 0 < score.mean_iou < 1


def test_probes_are_the_same_twice_and_do_not_know_each_other(shards):
    first, second = (probe("mit", shards, steps=4) for _ in range(2))
    assert first == second


def test_each_head_learns_from_its_own_loss_alone():
    model = tiny("mit", 3)
    probes = Probes(model)
    outputs = probes(torch.randn(2, 3, 64, 64))
    outputs["head_2_1"].sum().backward()
    learning = {name for name, value in probes.named_parameters() if value.grad is not None}
    assert learning
    assert all(name.startswith("heads.head_2_1.") for name in learning)


def test_what_has_no_stages_is_refused():
    with torch.device("meta"):
        classifier = create_model("mit_b0", num_classes=3)
    with pytest.raises(ConfigError, match="no stages under a SegFormer head"):
        Probes(classifier)
